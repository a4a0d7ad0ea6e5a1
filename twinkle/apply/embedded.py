"""The embedded kernels for the layers and functions of a model, found by the structure of their code.

They are what ``twinkle/ops/twinkle.toml`` registers, a document of bindings like any other. The loss and the
fused forwards alone are no layers and no functions, and have no document.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch.nn import Sequential

from twinkle.apply import documents
from twinkle.apply.bound import Bound, specialise
from twinkle.apply.recognised_functions import specialise_function
from twinkle.fuse import forward as fused
from twinkle.match.instance import Facts
from twinkle.match.structure import check_instance, recognise
from twinkle.ops.backends import backend_for
from twinkle.ops.catalog import document, find_op
from twinkle.runtime import runtime
from twinkle.sources.embedded import EmbeddedFunction, EmbeddedLayer
from twinkle.targets import Op, class_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from twinkle.apply.functions_beside import RecognisedFunction
    from twinkle.deferred.install import DeferralPlan
    from twinkle.match.recognition import Recognition
    from twinkle.ops.backends import Backend
    from twinkle.records import FunctionKernel, LayerKernel, Source

__all__ = [
    "apart_from_head",
    "defers",
    "function_kernels",
    "layer_rule",
    "looked_at_with",
    "may_have_places",
    "offer",
    "plan_deferral",
]

_ORIGIN = "embedded"


def offer() -> None:
    """Register the document of the embedded kernels, once, beneath what a program registers.

    Raises:
        ConfigError: The document is damaged.
    """
    if runtime.embedded.layer_targets:
        return
    documents.register(
        document(),
        where="twinkle/ops/twinkle.toml",
        locate=lambda key: _ORIGIN,
        allow_objects=False,
        into=runtime.embedded,
        chosen_by="twinkle",
    )


def wanted(op: str | None) -> bool:
    """Whether the settings ask for the embedded kernels of an op."""
    return op is not None and runtime.options.wants(op)


def _offered(op: str) -> tuple[LayerKernel, ...]:
    names = [target.kernel_name for target in runtime.embedded.layer_targets if target.target == Op(op)]
    return tuple(kernel for name in names for kernel in runtime.embedded.kernels_named(name))


def layer_rule(cls: type, found: Recognition, where: str) -> Callable[[type, nn.Module], Bound | None] | None:
    """How a layer of a class is bound to embedded kernels; None where no layer of it is.

    Args:
        cls: Its class without Twinkle.
        found: What the class is recognised as.
        where: The device the kernels are for.
    """
    if found.op is None or find_op(found.op).kind == "inside":
        ops = [op for op in fused.OPS if wanted(op)] if fused.serves(where) else []
        return partial(_with_fused_places, where, ops) if ops else None
    kernels = _offered(found.op) if wanted(found.op) else ()
    backend = backend_for(found.op, found.variant, where) if kernels else None
    if backend is None:
        return None
    if found.facts.get("requires"):  # it is that op only for some calls; the kernel has no other way
        return None
    return partial(_as_recognised, where, found, backend, kernels)


def may_have_places(cls: type) -> bool:
    """Whether an instance of a class may get an embedded kernel, for its forward or for steps in it."""
    op = recognise(cls).op
    return (op is not None and find_op(op).kind != "inside") or fused.may_have_places(cls)


def looked_at_with(cls: type) -> tuple[type[nn.Module], ...]:
    """Classes of torch whose layers may have places for layers of a class, looked at for them alone."""
    return (Sequential,) if recognise(cls).op == "group_norm" and wanted("group_norm") else ()


def defers(cls: type) -> bool:
    """Whether a class is one of models whose logits may be deferred."""
    return wanted("causal_lm_loss") and recognise(cls).op == "causal_lm_loss"


def _with_fused_places(where: str, ops: Sequence[str], cls: type, module: nn.Module) -> Bound | None:
    """Bind a layer whose forward has places for fused kernels, between layers of its own."""
    if not module._modules:
        return None
    kernel = fused.layer_kernel(module, cls, where, ops)
    return None if kernel is None else Bound(module, cls, cls, (kernel,), asked_for=False)


def _as_recognised(
    where: str,
    found: Recognition,
    backend: Backend,
    kernels: tuple[LayerKernel, ...],
    cls: type,
    module: nn.Module,
) -> Bound | None:
    """Bind a layer that is what its class was recognised as, and not merely of that class."""
    facts = check_instance(found, module)
    if not isinstance(facts, dict):
        return None
    if (why := backend.supports(found.variant, facts=facts)) is not None:
        runtime.session.remark(f"the {found.op} of {class_path(cls)} is left alone: {why}")
        return None

    def source(registered: Source) -> EmbeddedLayer:
        return EmbeddedLayer(str(found.op), found.variant, facts, backend.name, registered)

    # Also by dtype: a verdict is for a dtype of the inputs, and weights may have another (float32 norms).
    sizes = tuple((tensor.shape, tensor.dtype) for tensor in (*module.parameters(), *module.buffers()))
    made = specialise(cls, kernels, facts, source, device=where, sizes=sizes)
    return Bound(module, cls, cls, made, asked_for=False) if made else None


def plan_deferral(model: nn.Module, taken: Callable[[nn.Module], bool]) -> DeferralPlan | None:
    """Plan deferred logits for any module whose forward computes a loss that is recognised.

    Args:
        model: Is only read.
        taken: Whether a module was planned to have another kernel, which it keeps.
    """
    from twinkle.swap.layers import original_class

    cls = original_class(model)
    if not wanted("causal_lm_loss"):
        return None
    found = recognise(cls)
    if found.op != "causal_lm_loss":
        return None
    from twinkle.deferred.install import plan_deferral as plan

    made = plan(model, found, known=runtime.registry.bindings)
    if not isinstance(made, str) and any(map(taken, (model, made.head))):
        made = "it or its head has a kernel already"
    if isinstance(made, str):
        runtime.session.remark(f"the logits of {class_path(cls)} are not deferred: {made}")
        return None
    return made


def function_kernels(found: RecognisedFunction, where: str) -> list[FunctionKernel]:
    """The embedded kernels for a function that is an op.

    Args:
        found: The function.
        where: The device the kernels are for.
    """
    op, variant = found.recognition.op, found.recognition.variant
    facts = Facts(found.recognition.facts, found.recognition.reads)
    backend = backend_for(op, variant, where) if op is not None and wanted(op) else None
    if backend is None:
        return []
    if (why := backend.supports(variant, where, facts)) is not None:
        runtime.session.remark(f"the {op} of {found.module}:{found.name} is left alone: {why}")
        return []

    def source(registered: Source) -> EmbeddedFunction:
        return EmbeddedFunction(str(op), variant, facts, found.original, backend.name, registered)

    return [
        specialise_function(kernel, found, source, device=where)
        for kernel in runtime.embedded.function_kernels
        if kernel.op == op
    ]


def apart_from_head(
    cls: type, offered: Callable[[RecognisedFunction], Sequence[FunctionKernel]]
) -> Callable[[RecognisedFunction], Sequence[FunctionKernel]]:
    """What is offered for functions, but for those that a forward was recognised with.

    Args:
        cls: The class of a model whose logits are deferred.
        offered: Gives the embedded kernels for a function.
    """
    head = recognise(cls)

    def apart(found: RecognisedFunction) -> Sequence[FunctionKernel]:
        return () if head.rests_on(found.original) else offered(found)

    return apart
