"""Deferred logits in the place of a head's output, inside a forward that was given labels."""

from __future__ import annotations

import inspect
import threading

import torch
import torch.nn.functional as F
from torch import nn

from twinkle.ops.causal_lm_loss.deferred import DeferredLogits
from twinkle.ops.causal_lm_loss.head import Head, LabelCount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor

    from twinkle.records import Binding
    from twinkle.swap.candidate import Candidate

__all__ = ["Installed", "defer", "install", "reason_against", "uninstall"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Calls(threading.local):
    """The heads whose output is wanted deferred, of the forwards this thread is in."""

    def __init__(self) -> None:
        self.heads: list[tuple[nn.Module, LabelCount | None]] = []


_calls = _Calls()


def reason_against(head: Any, *, loaded: bool = True) -> str | None:
    """Why the output of a head cannot be deferred, or None if it can.

    With ``loaded=False`` its weight may still be on ``meta``, as while ``from_pretrained`` builds a model.

    Its weight has to be there still, whole and unchanged, when the loss is computed after the head, and
    nothing else may be computed by the head or hang on it.
    """
    if not isinstance(head, nn.Module):
        return "the model has no output head"
    name = f"{type(head).__module__}.{type(head).__qualname__}"
    if not isinstance(head, nn.Linear) or not _is_linear(type(head)):
        return f"its head is a {name} with a forward of its own (an adapter on the head, a quantised head)"
    if "forward" in vars(head):
        return "the forward of its head is wrapped (accelerate's offloading does that)"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(head, hook, None) for hook in hooks):
        return "its head has hooks, which may gather and free a sharded weight (FSDP, ZeRO-3)"
    weight = head.weight
    if hasattr(weight, "ds_id"):
        return "the weight of its head is sharded by DeepSpeed ZeRO-3"
    if type(weight) not in (nn.Parameter, torch.Tensor):
        return f"the weight of its head is a {type(weight).__name__}, sharded or quantised"
    if (loaded and weight.device.type == "meta") or weight.dtype not in _FLOATS:
        return f"the weight of its head is {weight.dtype} on {weight.device}"
    return None


def _is_linear(cls: Any) -> bool:
    dispatch = getattr(cls, "__twinkle__", None)
    target = cls if dispatch is None else dispatch.target
    return bool(target.forward is nn.Linear.forward)


def defer(head: Any, hidden: Tensor, *, counted: LabelCount | None = None) -> Tensor:
    """The output of ``head(hidden)``, to be computed when someone looks.

    Args:
        head: An ``nn.Linear``; see :func:`reason_against`.
        hidden: ``[..., hidden]``.
        counted: How many labels of the call count, on its way from the device.

    Returns:
        Deferred logits, or logits where the two do not go together.
    """
    autocast = torch.is_autocast_enabled(hidden.device.type)
    same = hidden.device == head.weight.device and (hidden.dtype == head.weight.dtype or autocast)
    if not same or hidden.dim() < 2 or type(hidden) is not torch.Tensor:
        return F.linear(hidden, head.weight, head.bias)
    made = Head(head.weight, head.bias, hidden)
    made.counted = counted
    return DeferredLogits(made, hidden)


class DeferringLinear(nn.Module):
    """The kernel of a head: what ``nn.Linear`` gives, deferred inside a forward that was given labels."""

    can_torch_compile = True
    has_backward = True

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        if not torch.compiler.is_compiling():
            for head, counted in reversed(_calls.heads):
                if head is self:
                    return defer(self, input, counted=counted)
        return F.linear(input, self.weight, self.bias)


class Installed:
    """What :func:`install` did.

    Attributes:
        model: The model.
        head: The path of its head.
        bindings: The records of the two swaps, that of the model first.
    """

    def __init__(self, model: nn.Module, head: str, bindings: tuple[Binding, Binding]) -> None:
        self.model = model
        self.head = head
        self.bindings = bindings


def install(model: nn.Module, recognition: Any = None) -> Installed | str:
    """Let the head of a causal language model give deferred logits where labels are given.

    The class of model and head is changed as for any kernel (``twinkle.swap``): names, parameters, hooks,
    copies and pickles stay what they are. Under a compiler the original forward is traced.

    Args:
        model: A model whose ``forward`` takes labels.
        recognition: What ``twinkle.match`` says of its class (op ``causal_lm_loss``): the path of the head
            and the names of the labels are taken from its facts. Without one the head is what
            ``get_output_embeddings()`` gives.

    Returns:
        What was done, or why the model is left alone.
    """
    from twinkle.swap.layers import original_class, plan

    facts = dict(getattr(recognition, "facts", None) or {})
    path = facts.get("head") or _path_of_output(model)
    head = _at(model, path) if path else None
    reason = reason_against(head, loaded=False)  # it is asked again at each call
    if reason is not None or head is None:
        return reason or "the model has no output head"
    target: Any = original_class(model)
    labels = _labels(target.forward, facts)
    if not labels:
        return f"{target.__name__}.forward takes no labels"
    kernel = _kernel_for(target.forward, path, labels, counts=bool(facts))
    ours = _candidate(kernel, target), _candidate(DeferringLinear, nn.Linear)
    plans = []
    for module, candidate in zip((model, head), ours, strict=True):
        made = plan(module, [candidate])
        if isinstance(made, str):
            return made
        plans.append(made)
    for made in plans:
        why = made.resolve()
        if why is not None:
            return why
    for made in plans:
        made.commit()
    return Installed(model, path, (ours[0].binding, ours[1].binding))


def uninstall(installed: Installed) -> None:
    """Undo :func:`install`."""
    from twinkle.swap.layers import swap_out

    swap_out(installed.model)
    head = _at(installed.model, installed.head)
    if head is not None:
        swap_out(head)


def _kernel_for(
    forward: Callable[..., Any], path: str, labels: dict[str, int | None], *, counts: bool
) -> type[nn.Module]:
    """A kernel whose forward is ``forward`` with its head deferring."""

    def deferring(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        given = _given(labels, args, kwargs)
        head = _at(self, path) if given is not None else None
        if head is None or reason_against(head) is not None:
            return forward(self, *args, **kwargs)
        counted = LabelCount(given) if counts and isinstance(given, torch.Tensor) and given.is_cuda else None
        _calls.heads.append((head, counted))
        try:
            return forward(self, *args, **kwargs)
        finally:
            _calls.heads.pop()

    deferring.__name__ = "forward"
    flags = {"can_torch_compile": True, "has_backward": True}
    return type("DeferringCausalLM", (nn.Module,), {"forward": deferring, **flags})


def _given(labels: dict[str, int | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for name, position in labels.items():
        value = kwargs.get(name)
        if value is None and position is not None and position < len(args):
            value = args[position]
        if value is not None:
            return value
    return None


def _labels(forward: Callable[..., Any], facts: dict[str, Any]) -> dict[str, int | None]:
    """The parameters that labels come in by, and where they stand among those after ``self``."""
    parameters = inspect.signature(forward).parameters.values()
    wanted = [facts.get("labels"), facts.get("shift_labels"), "labels", "shift_labels"]
    found: dict[str, int | None] = {}
    for index, parameter in enumerate(parameters):
        if parameter.name in wanted:
            found[parameter.name] = index - 1 if parameter.kind is not parameter.KEYWORD_ONLY else None
    if found and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        found.setdefault("shift_labels", None)
    return found


def _path_of_output(model: nn.Module) -> str:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    paths = (name for name, module in model.named_modules() if module is head)
    return next(paths, "") if head is not None else ""


def _at(model: nn.Module, path: str) -> Any:
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


class _Source:
    """A kernel that was made on the spot."""

    kind = "embedded"

    def __init__(self, kernel: type[nn.Module]) -> None:
        self._kernel = kernel

    def describe(self) -> str:
        return f"embedded {__name__}:{self._kernel.__name__}"

    def load(self) -> type[nn.Module]:
        return self._kernel


def _candidate(kernel: type[nn.Module], target: type) -> Candidate:
    from twinkle.records import Binding, LayerKernel
    from twinkle.swap.candidate import Candidate

    source = _Source(kernel)
    record = LayerKernel("causal_lm_loss", source, origin="embedded")
    where = f"{target.__module__}:{target.__qualname__}"
    return Candidate(record, Binding("layer", where, "causal_lm_loss", source, origin="embedded"))
