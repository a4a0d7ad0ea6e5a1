"""The forwards that defer: that of a head, and that of the model around it when it was given labels."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from twinkle.deferred.head import Head, LabelCount
from twinkle.deferred.logits import DeferredLogits
from twinkle.deferred.traced import TracedLogits
from twinkle.deferred.verification import is_trusted
from twinkle.ops.causal_lm_loss.chunks import uses_triton
from twinkle.ops.plain import pays
from twinkle.swap.tensors import constant

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor

__all__ = ["DeferringLinear", "at", "defer", "deferring_model", "leave_to_python", "reason_against"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LEAST, _LEAST_HALF = 1 << 20, 1 << 16
"""Logits from which on deferring them is not slower on a CPU: that many in float32 take 4 MiB, and a chunk
may have four times as many. In half precision what is computed with them costs more."""


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
        for head, counted in reversed(_calls.heads):
            if head is self:
                if torch.compiler.is_compiling():
                    return TracedLogits(input, self.weight, self.bias)
                return defer(self, input, counted=counted)
        return F.linear(input, self.weight, self.bias)


def deferring_model(
    forward: Callable[..., Any],
    path: str,
    labels: dict[str, int | None],
    *,
    recognised: bool,
    bends: bool,
    owner: Callable[[], nn.Module | None],
) -> type[nn.Module]:
    """The kernel of a model: ``forward`` with its head deferring where labels are given.

    Under a compiler it stays a frame of Python's own, and the graph starts in ``forward``: logits leave
    the graph as hidden states. Inside a larger graph they are operations of it, which are left out where
    nothing uses them.

    Args:
        forward: That of the model.
        path: Of its head.
        labels: The parameters that labels come in by, and where they stand among those after ``self``.
        recognised: Whether it is known what ``forward`` does between head and loss; without that nothing
            is deferred under a compiler.
        bends: Whether it bounds its logits, as far as is known.
        owner: Gives the model, while there is one: a larger graph is traced without it at hand.
    """

    def head_of(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _given(labels, args, kwargs)
        head = at(self, path) if given is not None else None
        return (head, given) if head is not None and reason_against(head) is None else (None, None)

    def proven(self: Any, head: Any, given: Any) -> bool:
        tokens = given.numel() if isinstance(given, torch.Tensor) else 0
        return is_trusted(self, head, tokens, bends=bends)

    @constant
    def proven_ahead() -> bool:
        from torch.utils._python_dispatch import _disable_current_modes

        model = owner()
        head = at(model, path) if model is not None else None
        if model is None or reason_against(head) is not None:
            return False
        with torch.inference_mode(False), _disable_current_modes():
            return proven(model, head, None)

    def begin(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        head, given = head_of(self, args, kwargs)
        if head is None or _are_few(head, given) or not proven(self, head, given):
            # One may be left over from a call that failed in a graph.
            _calls.heads.clear()
            return False
        ahead = recognised and isinstance(given, torch.Tensor) and given.is_cuda
        _calls.heads.append((head, LabelCount(given) if ahead else None))
        return True

    def inside_graph(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        head, _ = head_of(self, args, kwargs) if recognised else (None, None)
        if head is None or not proven_ahead():
            return _with_logits(forward(self, *args, **kwargs), TracedLogits.materialize)
        _calls.heads.append((head, None))
        # Not in a `try`: dynamo cannot go on after a graph break within one.
        output = forward(self, *args, **kwargs)
        _calls.heads.pop()
        return _with_logits(output, TracedLogits.materialize)

    def deferring(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return inside_graph(self, args, kwargs)
        if not begin(self, args, kwargs):
            return forward(self, *args, **kwargs)
        try:
            output = forward(self, *args, **kwargs)
        finally:
            _end()
        return _finish(output)

    deferring.__name__ = "forward"
    leave_to_python(deferring, within=(begin, _end, _finish))
    flags = {"can_torch_compile": True, "has_backward": True}
    return type("DeferringCausalLM", (nn.Module,), {"forward": deferring, **flags})


def _are_few(head: Any, labels: Any) -> bool:
    """Whether logits are few enough to be computed as ever: the steps of a deferred loss cost 1.4 ms."""
    if not (head.weight.is_cpu and isinstance(labels, torch.Tensor)) or uses_triton(head.weight):
        return False
    half = head.weight.element_size() == 2 or torch.is_autocast_enabled("cpu")
    least = _LEAST_HALF if half else _LEAST
    return not pays(labels, least // max(1, head.weight.shape[0]))


def _end() -> None:
    _calls.heads.pop()


def _finish(output: Any) -> Any:
    return _with_logits(output, _deferred)


def _deferred(logits: TracedLogits) -> Tensor:
    return DeferredLogits(Head(logits.weight, logits.bias, logits.hidden), logits.hidden, logits.steps)


def _with_logits(output: Any, made_of: Callable[[TracedLogits], Tensor]) -> Any:
    """The output of a model with logits in the place of those that were traced."""
    if isinstance(output, tuple):
        return tuple(made_of(part) if isinstance(part, TracedLogits) else part for part in output)
    if isinstance(output, dict):
        for name in list(output):
            if isinstance(output[name], TracedLogits):
                output[name] = made_of(output[name])
    return output


def leave_to_python(outer: Any, within: tuple[Any, ...] = ()) -> None:
    """Keep dynamo from starting a graph at ``outer``, and from looking at all into those ``within``.

    Frames that ``outer`` calls otherwise are still compiled, and in a graph that started before it
    ``outer`` is traced as ever: that is what ``torch.compiler.disable`` cannot say.
    """
    frames = torch._C._dynamo.eval_frame
    try:
        skip, default = frames._FrameAction.SKIP, frames._FrameAction.DEFAULT
        frames.set_code_exec_strategy(outer.__code__, frames._FrameExecStrategy(skip, default))
        for function in within:
            frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    except AttributeError:
        pass  # torch 2.6: the graph starts at the outer frame, and logits are computed in it


def _given(labels: dict[str, int | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for name, position in labels.items():
        value = kwargs.get(name)
        if value is None and position is not None and position < len(args):
            value = args[position]
        if value is not None:
            return value
    return None


def at(model: nn.Module, path: str) -> Any:
    """The module at a path, or None."""
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part, None)
    return found
