"""The forward of a head that defers its logits, and that of the model around it, which says when."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from twinkle.deferred.frames import leave_to_python
from twinkle.deferred.head import Head, LabelCount, LabelCounts
from twinkle.deferred.logits import DeferredLogits
from twinkle.deferred.nodes import DeferredHead
from twinkle.deferred.steps import Number, apply_pointwise
from twinkle.deferred.switch import ModelInGraph, switch_off, switch_on
from twinkle.deferred.traced import TracedLogits
from twinkle.deferred.verification import loss_verified
from twinkle.ops.causal_lm_loss.chunks import uses_triton
from twinkle.ops.causal_lm_loss.linear_cross_entropy import as_autocast
from twinkle.ops.cuda_graphs import is_capturing, stood_for
from twinkle.ops.plain import pays
from twinkle.swap.front import MARK, USERS
from twinkle.swap.tensors import constant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from twinkle.deferred.steps import PointwiseOp

__all__ = [
    "LEAST_COUNTED",
    "DeferringForward",
    "defer",
    "deferring_heads",
    "made_of",
    "module_at",
    "reason_against",
    "taken_apart",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LEAST, _LEAST_HALF = 1 << 22, 1 << 16
"""The fewest logits that are deferred on a CPU: with fewer it is slower. 2^22 in float32 take 16 MiB. From
2^21 on head and loss alone take a tenth less time, but the C library gives the top of a heap without such
blocks back at each step, and the optimizer's pages are fetched anew: a Llama was 0.94 to 0.97 times as fast
with 2^21 logits, 1.03 to 1.06 with 2^22. In half precision what is computed with them costs more. In
float32 the copy of the weight costs more than the logits of fewer rows than the hidden states are wide: on
two cores, a vocabulary of 32000 and 512 channels, steps with 128, 256 and 1024 rows took 208, 265 and 535
ms for 106, 172 and 645 ms."""
_LEAST_ON_GPU = 1 << 27
"""The same on a GPU, for losses that a forward computes itself. On an H200 the host takes 2 ms for the steps
of a deferred loss: with 2^27.6 logits in bfloat16 head and loss alone take 2.63 for 2.19 ms, a step of which
they are a part a few percent of that, and 700 MiB less; with 2^29.6 they take 7.53 for 8.37 ms."""

LEAST_COUNTED = 1 << 27
"""The fewest logits of which those that count are counted ahead, and of labels that do not count for
which that is worth the wait (:class:`~twinkle.deferred.head.LabelCounts`). On an H200 a T5 with 2^28
logits that all count took 89 ms a step for 65 ms of work of the device."""


class _Calls(threading.local):
    """The heads that are to defer, of the forwards that this thread is in, and the calls they deferred."""

    def __init__(self) -> None:
        self.heads: list[tuple[nn.Module, LabelCount | None, bool]] = []
        self.made: list[Head] = []
        self.taken_apart = False


_calls = _Calls()


def deferring_heads() -> list[tuple[nn.Module, LabelCount | None, bool]]:
    """The heads that are to defer in this thread, innermost last.

    With each come the count of its labels, and whether it defers while a graph is traced.
    """
    return _calls.heads


def reason_against(head: Any, *, loaded: bool = True) -> str | None:
    """Why the output of a head cannot be deferred, or None if it can.

    Its weight has to be there still, whole and unchanged, when the loss is computed after the head, and
    nothing else may be computed by the head or hang on it.

    Args:
        head: What stands where the model has its head.
        loaded: False while ``from_pretrained`` builds the model: the weight may be on ``meta`` then.
    """
    if not isinstance(head, nn.Module):
        return "the model has no output head"
    name = f"{type(head).__module__}.{type(head).__qualname__}"
    if not isinstance(head, nn.Linear) or type(head).forward not in (nn.Linear.forward, _head_forward):
        return f"its head is a {name} with a forward of its own (an adapter on the head, a quantised head)"
    linear = stood_for(F.linear)
    if nn.Linear.forward.__module__ != nn.Linear.__module__ or linear is not torch._C._nn.linear:
        return "the forward of torch.nn.Linear, or torch.nn.functional.linear, was replaced"
    if vars(head).get(MARK, "").endswith(USERS):
        return "its head has a kernel of the user's"
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


def defer(head: Any, hidden: Tensor, *, counted: LabelCount | None = None) -> Tensor:
    """The output of ``head(hidden)``, to be computed when it is read.

    Args:
        head: An ``nn.Linear``; see :func:`reason_against`.
        hidden: ``[..., hidden]``.
        counted: How many labels of the call count, on its way from the device.

    Returns:
        Deferred logits; plain logits where device or dtype of the two differ.
    """
    logits = _deferred(hidden, head.weight, head.bias, counted)
    if _calls.taken_apart and isinstance(logits, DeferredLogits):
        logits.node.head.call = head, hidden
    return logits


def _deferred(hidden: Tensor, weight: Tensor, bias: Tensor | None, counted: LabelCount | None) -> Tensor:
    if type(hidden) is not torch.Tensor or hidden.device != weight.device or hidden.dim() < 2:
        return F.linear(hidden, weight, bias)
    # As autocast does: a copy of the weight, through which its gradient goes.
    rows, used, added = as_autocast(hidden, weight, bias)
    if rows.dtype != used.dtype or (added is not None and added.dtype != used.dtype):
        return F.linear(hidden, weight, bias)
    private = (rows is not hidden, used is not weight, added is not bias or bias is None)
    head = Head(rows, used, added, private=private, counted=counted, fresh=bool(_calls.heads))
    # As `F.linear` saves a view of its weight, of which `weight.data = other` is no part.
    logits: Tensor = DeferredHead.apply(rows, torch.ops.aten.alias(used), added, head)
    if head.fresh:
        _calls.made.append(head)
    elif not _calls.taken_apart:
        head.keep()
    return logits


@contextlib.contextmanager
def taken_apart() -> Iterator[None]:
    """Have logits that this thread defers keep head and hidden states, so that replays make their own."""
    before, _calls.taken_apart = _calls.taken_apart, True
    try:
        yield
    finally:
        _calls.taken_apart = before


class Made(NamedTuple):
    """What deferred logits are made of.

    Attributes:
        head: The module.
        hidden: What it was given, ``[..., hidden]``.
        pointwise: What was done to its logits, each number by itself.
    """

    head: Any
    hidden: Tensor
    pointwise: tuple[PointwiseOp, ...]

    def again(self, hidden: Tensor) -> Tensor:
        """The same of other hidden states, deferred."""
        return apply_pointwise(defer(self.head, hidden), self.pointwise)


def made_of(logits: DeferredLogits) -> Made | None:
    """What logits are made of that were deferred to be taken apart; None for others.

    None as well where only some of their rows are left, or a tensor was added to them.
    """
    node = logits.node
    if not logits.is_deferred or logits.gradient is not None or node.head.call is None:
        return None
    found = Made(*node.head.call, node.pointwise)
    while node.previous is not None:
        if not isinstance(node.step, Number):
            return None
        node = node.previous
    return found


def _head_forward(self: Any, input: Tensor) -> Tensor:
    """``input @ weight.T + bias``, ``[..., vocab]``; deferred in the threads whose forward asked for it."""
    for head, counted, traced in reversed(_calls.heads):
        if head is self:
            if torch.compiler.is_compiling():
                if not traced:
                    break
                return TracedLogits(input, self.weight, self.bias)
            return defer(self, input, counted=counted)
    return F.linear(input, self.weight, self.bias)


class DeferringForward:
    """The forward of a causal language model, with its head deferring where labels are given.

    Under a compiler it stays a frame of Python's own, and the graph starts in the original forward: logits
    leave the graph as hidden states. Inside a larger graph they are operations of it, which are left out
    where nothing uses them.

    Args:
        original: The forward of the model's class.
        path: Of the head.
        labels: The parameters that labels come in by, and where they stand among those after ``self``.
        recognised: Whether it is known what ``original`` does between head and loss; without that nothing
            is deferred under a compiler.
        softcapped: Whether it soft-caps its logits, as far as is known.
        ignore_index: Labels of this value do not count in its loss; None where that is not known.
        traceable: Whether a compiler can follow what stands for the logits to the loss.
        of_language: Whether its head is known to be that of a language model.
        on_run: Called when the head defers.
        owner: Gives the model, while there is one: a larger graph is traced without it at hand.
    """

    def __init__(
        self,
        original: Callable[..., Any],
        path: str,
        labels: dict[str, int | None],
        *,
        recognised: bool,
        softcapped: bool,
        ignore_index: int | None = None,
        traceable: bool = True,
        of_language: bool = True,
        on_run: Callable[[], object] = lambda: None,
        owner: Callable[[], nn.Module | None],
    ) -> None:
        self.original = original
        self.path = path
        self._steps = path.split(".")
        self.labels = labels
        self.recognised = recognised
        self.softcapped = softcapped
        self.ignore_index = ignore_index
        self.traceable = traceable
        self.of_language = of_language
        self.on_run = on_run
        self.owner = owner
        self.counts = LabelCounts(LEAST_COUNTED)

    def layer_class(self) -> type[nn.Module]:
        """A layer kernel with this forward, for the class of the model."""
        original, begin, inside_graph = self.original, self.begin, self.inside_graph
        names = tuple(self.labels)
        positions = [position for position in self.labels.values() if position is not None]
        first = min(positions, default=1 << 30)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Most calls of a model are without labels: each token of `generate()` is one.
            if len(args) <= first:
                for name in names:
                    if kwargs.get(name) is not None:
                        break
                else:
                    return original(self, *args, **kwargs)
            if torch.compiler.is_compiling():
                return inside_graph(self, args, kwargs)
            if not begin(self, args, kwargs):
                return original(self, *args, **kwargs)
            try:
                output = original(self, *args, **kwargs)
            finally:
                _end()
            return _finish(output)

        leave_to_python(forward, within=(begin, _end, _finish))
        flags = {"can_torch_compile": True, "has_backward": True}
        return type("DeferringCausalLM", (nn.Module,), {"forward": forward, **flags})

    def begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Let the head defer from here to :func:`_end`; False where the logits are to be computed."""
        labels = _given(self.labels, args, kwargs)
        least = 0 if self.of_language else _LEAST_ON_GPU
        # The quickest answer comes first: it is all that a small model's call is asked.
        weight = _weight_at(model, self._steps)
        if weight is not None and _are_few(weight, labels, least):
            return False
        head, labels = (None, None) if _is_transformed() else self.head_and_labels(model, args, kwargs)
        if head is None or (weight is not head.weight and _are_few(head.weight, labels, least)):
            return False
        if not self.verified(model, head, labels):
            return False
        counted = None
        if self.ignore_index is not None and _are_many(labels, head.weight):
            if not is_capturing():
                vocab = head.weight.shape[0]
                counted = self.counts.of(labels, vocab, self.ignore_index, copies=self.of_language)
            elif self.counts.will_wait():
                raise RuntimeError("its labels are counted while the device computes")
        _calls.heads.append((head, counted, self.traceable))
        switch_on(head, _head_forward)
        self.on_run()
        return True

    def inside_graph(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's call while a larger graph is traced; its logits are operations of that graph."""
        head, _ = self.head_and_labels(model, args, kwargs) if self.recognised else (None, None)
        if head is None or "." in self.path or not self.verified_ahead():
            return self.original(model, *args, **kwargs)
        output = self.original(ModelInGraph(model, self.path), *args, **kwargs)
        return _with_logits(output, TracedLogits.materialize)

    def head_and_labels(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The head and the labels of a call; None and None without labels, or where the head cannot defer."""
        labels = _given(self.labels, args, kwargs)
        head = module_at(model, self.path) if labels is not None else None
        return (head, labels) if head is not None and reason_against(head) is None else (None, None)

    def verified(self, model: Any, head: Any, labels: Any) -> bool:
        """Whether the loss from hidden states was found right for the head."""
        tokens = labels.numel() if isinstance(labels, torch.Tensor) else 0
        return loss_verified(model, head, tokens, softcapped=self.softcapped)

    @constant
    def verified_ahead(self) -> bool:
        """Whether the loss was found right for the model's head, asked while a graph is traced.

        The graph keeps the answer as a constant.
        """
        model = self.owner()
        head = module_at(model, self.path) if model is not None else None
        if model is None or reason_against(head) is not None:
            return False
        with torch.inference_mode(False), _disable_current_modes():
            verified = self.verified(model, head, None)
        if verified:
            self.on_run()
        return verified


def _is_transformed() -> bool:
    """Whether something follows the call that could not follow logits which are not computed.

    A transform of ``torch.func``, forward-mode differentiation, a tracer, or a mode that sees all operations.
    """
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _are_few(weight: Tensor, labels: Any, least_on_gpu: int) -> bool:
    """Whether logits are so few that deferring them is slower: the steps of a deferred loss cost 1.4 ms."""
    if not isinstance(labels, torch.Tensor) or weight.dim() != 2:
        return False
    vocab, width = weight.shape
    if weight.is_cuda:
        return not pays(labels, least_on_gpu // max(1, vocab))
    if not weight.is_cpu:
        return False
    half = weight.element_size() == 2 or torch.is_autocast_enabled("cpu")
    least = _LEAST_HALF // max(1, vocab) if half else max(_LEAST // max(1, vocab), width)
    return not pays(labels, least) and not uses_triton(weight)


def _are_many(labels: Any, weight: Tensor) -> bool:
    """Whether labels are counted on the GPU, so that rows that do not count are left out of the products."""
    if not isinstance(labels, torch.Tensor) or not labels.is_cuda:
        return False
    return bool(labels.numel() * weight.shape[0] >= LEAST_COUNTED)


def _weight_at(model: Any, steps: list[str]) -> Any:
    """The weight of the head that a path of names leads to; None where it leads through no plain layers.

    Read from where layers keep theirs: by name each step would be a call.
    """
    try:
        for step in steps:
            model = model._modules[step]
        return model._parameters["weight"]
    except (AttributeError, KeyError, TypeError):
        return None


def _end() -> None:
    head, _, _ = _calls.heads.pop()
    switch_off(head)
    made, _calls.made = _calls.made, []
    for one in made:
        if one.call is None:
            one.keep()
            one.fresh = False


def _finish(output: Any) -> Any:
    return _with_logits(output, _of_a_graph)


def _of_a_graph(traced: TracedLogits) -> Tensor:
    logits = _deferred(traced.hidden, traced.weight, traced.bias, None)
    return apply_pointwise(logits, traced.pointwise)


def _with_logits(output: Any, made_of: Callable[[TracedLogits], Tensor]) -> Any:
    """The output of a model with its traced logits replaced by what ``made_of`` makes of them."""
    if isinstance(output, tuple):
        return tuple(made_of(part) if isinstance(part, TracedLogits) else part for part in output)
    if isinstance(output, dict):
        for name in list(output):
            if isinstance(output[name], TracedLogits):
                output[name] = made_of(output[name])
    return output


def _given(labels: dict[str, int | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for name, position in labels.items():
        value = kwargs.get(name)
        if value is None and position is not None and position < len(args):
            value = args[position]
        if value is not None:
            return value
    return None


def module_at(model: nn.Module, path: str) -> Any:
    """The module at a path, or None."""
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part, None)
    return found
