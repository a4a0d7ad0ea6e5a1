"""The embedded kernels for the layers and functions of a model, found by the structure of their code.

Those for layers are what ``twinkle/ops/twinkle.toml`` registers, a document of bindings like any other.
"""

from __future__ import annotations

import pkgutil
import sys
from typing import TYPE_CHECKING, Any

from twinkle.apply import documents, fitting
from twinkle.apply.options import options
from twinkle.fuse import forward as fused
from twinkle.match.names import class_path
from twinkle.match.source import function_of
from twinkle.match.structure import check_instance, recognise
from twinkle.ops.variants import covering, declined
from twinkle.records import FunctionKernel
from twinkle.registry import offers, registry
from twinkle.report.records import session
from twinkle.sources.embedded import EmbeddedFunction, EmbeddedLayer

if TYPE_CHECKING:
    from torch import nn

    from twinkle.records import Binding, LayerKernel
    from twinkle.sources.base import Source

__all__ = ["defer_logits", "forget", "layer_kernels", "offer", "register_functions"]

_FUNCTIONS = ("rotary",)
_ORIGIN = "embedded"


def offer() -> None:
    """Register the document of the pack, once, beneath everything that a program registers itself.

    Raises:
        ConfigError: The document is damaged.
    """
    if offers.layer_targets:
        return
    from twinkle.config.files import parse

    where = "twinkle/ops/twinkle.toml"
    text = pkgutil.get_data("twinkle.ops", "twinkle.toml") or b""
    document, _ = parse(text.decode(), where)
    documents.register(document, where=where, locate=lambda key: _ORIGIN, allow_objects=False, into=offers)


def wanted(op: str | None) -> bool:
    """The settings ask for that op's kernels."""
    if op is None or op in options.disabled:
        return False
    return options.kernels == "auto" or op in options.kernels


def _offered(op: str) -> tuple[LayerKernel, ...]:
    names = [target.kernel_name for target in offers.layer_targets if target.target == f"match:{op}"]
    return tuple(kernel for name in names for kernel in offers.kernels_named(name))


def layer_kernels(module: nn.Module, cls: type, where: str) -> tuple[LayerKernel, ...]:
    """The embedded kernels for a layer, if its class is recognised and the instance keeps to it.

    Args:
        module: The layer.
        cls: Its class without Twinkle.
        where: The device the kernel is for.
    """
    found = recognise(cls)
    if found.op is None or found.op in fused.OPS:
        kernel = fused.layer_kernel(module, cls, where, [op for op in fused.OPS if wanted(op)])
        return () if kernel is None else (kernel,)
    kernels = _offered(found.op) if wanted(found.op) else ()
    room = covering(found.op, found.form, where) if kernels else None
    if room is None:
        return ()
    if found.facts.get("requires"):  # it is that op only for some calls; the kernel has no other way
        return ()
    facts = check_instance(found, module)
    if not isinstance(facts, dict):
        return ()
    if (why := declined(found.op, room, facts)) is not None:
        session.remark(f"the {found.op} of {class_path(cls)} is left alone: {why}")
        return ()

    def cut(source: Source) -> EmbeddedLayer:
        return EmbeddedLayer(str(found.op), found.form, facts, room, source)

    return fitting.fit(cls, kernels, facts, cut, device=where)


def defer_logits(model: nn.Module) -> None:
    """Let the head of a causal language model give deferred logits, where its loss is recognised."""
    from twinkle.swap.layers import original_class

    cls = original_class(model)
    if not wanted("causal_lm_loss"):
        return
    found = recognise(cls)
    if found.op != "causal_lm_loss":
        return
    from twinkle.ops.causal_lm_loss.layer import Installed, install

    installed = install(model, found)
    if isinstance(installed, Installed):
        for binding in installed.bindings:
            _merge(binding)
    else:
        session.remark(f"the logits of {class_path(cls)} are computed as ever: {installed}")


def _merge(binding: Binding) -> None:
    """One record for the heads of all models of a class."""
    for known in registry.bindings:
        if (known.target, known.kernel, known.source) == (binding.target, binding.kernel, binding.source):
            known.count(binding.instances)
            return
    registry.record(binding)


def register_functions(model: nn.Module, where: str) -> list[str]:
    """Register embedded kernels for the functions beside the classes of a model; returns their modules."""
    changed = []
    for name in dict.fromkeys(type(module).__module__ for module in model.modules()):
        namespace = sys.modules.get(name)
        if namespace is None or name in _looked_at or name.partition(".")[0] == "torch":
            continue
        _looked_at.add(name)
        kernels = [
            FunctionKernel(
                attribute, name, EmbeddedFunction(found.op, found.form, found.facts, value, room),
                device=where, origin=_ORIGIN,
            )
            for attribute, value, found in _functions_of(namespace, name)
            if (room := covering(found.op, found.form, where)) is not None
        ]  # fmt: skip
        taken = {kernel.name for kernel in registry.functions_of(name)}
        kernels = [kernel for kernel in kernels if kernel.name not in taken]
        if kernels:
            registry.add(function_kernels=tuple(kernels))
            changed.append(name)
    return changed


_looked_at: set[str] = set()


def forget() -> None:
    """Look at every module anew."""
    _looked_at.clear()
    fused.forget()


def _functions_of(namespace: Any, name: str) -> list[tuple[str, Any, Any]]:
    """The functions that a module defines and that are recognised, with their recognitions."""
    found = []
    for attribute, value in list(vars(namespace).items()):
        if isinstance(value, type) or not callable(value):
            continue
        recognition = recognise(value)
        here = recognition.target.startswith(f"{name}:")
        if here and recognition.op in _FUNCTIONS and wanted(recognition.op):
            # `kernels` puts a module in the place of the functions it decorates.
            found.append((attribute, function_of(value) or value, recognition))
    return found
