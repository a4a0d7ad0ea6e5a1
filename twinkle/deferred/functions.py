"""What deferred logits answer above autograd: the loss, and what reaches for memory past the dispatcher."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from twinkle.deferred.logits import DeferredLogits
from twinkle.deferred.nodes import FusedLoss, LossOptions
from twinkle.deferred.verification import HeadType, biased_verified, loss_failed, softcap_verified
from twinkle.ops.causal_lm_loss.linear_cross_entropy import of_rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

    from torch import Tensor

__all__ = ["answer", "cross_entropy", "of_whole_rows", "with_memory"]

_T = torch.Tensor
_plain = torch._C.DisableTorchFunctionSubclass
_set_data = _T.data.__set__
_relay = torch.overrides.handle_torch_function.__code__

# They take the memory of a tensor, or its Python object, without the dispatcher.
_OF_MEMORY = frozenset(
    [
        *(_T.numpy, _T.__array__, _T.tolist, _T.data_ptr, _T.storage, _T.untyped_storage, _T._typed_storage),
        *(_T.__dlpack__, _T.__deepcopy__, _T.__reduce_ex__, _T.__repr__, _T.__format__),
        *(_T.share_memory_, _T.is_shared, _T.is_set_to, _T.__cuda_array_interface__.__get__),
        *(getattr(_T, name) for name in ("const_data_ptr", "mutable_data_ptr") if hasattr(_T, name)),
        *(getattr(torch, name) for name in dir(torch) if name.startswith("fbgemm_")),
    ]
)


def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function of torch gives for deferred logits, as ``__torch_function__``.

    Args:
        func: What torch says it was.
        args: Its arguments.
        kwargs: And the named ones.
    """
    caller = _caller()
    if caller is not None:
        code, names = caller.f_code, caller.f_globals
        if names is vars(F) and code.co_name == "cross_entropy":
            loss = _cross_entropy(*args, **kwargs)
            if loss is not NotImplemented:
                return loss
        # A function of torch hands over its own global name. Where somebody has wrapped it, that is the
        # wrapper, which has run already: what runs now is the code that asks.
        if names.get(code.co_name) is func and getattr(func, "__code__", None) is not code:
            func = types.FunctionType(code, names, code.co_name)
    if func == _set_data and isinstance(args[0], DeferredLogits):
        return args[0].hold(with_memory(args[1]))
    if func in _OF_MEMORY:
        args = tuple(with_memory(value) for value in args)
    with _plain():
        return func(*args, **kwargs)


def _caller() -> FrameType | None:
    """The frame of the function of torch that asks, where one in Python does."""
    frame = sys._getframe(2).f_back
    return frame.f_back if frame is not None and frame.f_code is _relay else None


class _Computed(torch.autograd.Function):
    """The values of deferred logits as a plain tensor, in the same memory."""

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits) -> Tensor:
        return torch.ops.aten.alias(logits.shared())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def with_memory(value: Any) -> Any:
    """A plain tensor in the place of deferred logits, with their memory and their way back to their head."""
    if not isinstance(value, DeferredLogits):
        return value
    if value.requires_grad and value.is_leaf:
        return value.shared().detach().requires_grad_()
    if not value.requires_grad:
        return value.shared().detach()
    with torch.enable_grad():
        return _Computed.apply(value)


# -- the loss -------------------------------------------------------------------------------------


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if not isinstance(input, DeferredLogits) or not input.is_deferred or input.gradient is not None:
        return NotImplemented
    if torch.is_autocast_enabled(input.device.type) and input.dtype in (torch.float16, torch.bfloat16):
        input = input.float()
    head, options = input.node.head, LossOptions(ignore_index, reduction, label_smoothing)
    if torch.is_grad_enabled() and input.requires_grad and not (head.fresh or head.has_current_weight()):
        # The gradient of hidden states is that of the weight as it is in the backward.
        return NotImplemented
    needing_logits = weight, size_average, reduce
    rows, operands = tuple(input.shape[:-1]), (head.weight, head.bias)
    folded = _factors(input.node.pointwise, rows, operands, target, options, needing_logits)
    if folded is None:
        return NotImplemented
    factors, bias = folded
    target = target.long()
    _check_labels(target, input.shape[-1], ignore_index)
    # After the forward the labels may be any.
    counted = head.counted if head.fresh else None
    most_rows = None if counted is None else counted.bound(target, ignore_index)
    try:
        with torch.autocast(input.device.type, enabled=False):
            grad = torch.is_grad_enabled()
            return FusedLoss.apply(input, target, options, factors, bias, most_rows, grad)
    except Exception as error:
        loss_failed(HeadType.of(*operands), error)
    return NotImplemented  # of the logits, which are computed now


def _check_labels(target: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise what torch raises for a label out of range; on a GPU its assertion fails there as well."""
    right = ((target >= 0) & (target < vocab)) | (target == ignore_index)
    if target.is_cuda:
        torch._assert_async(right.all())
    elif not right.all():
        raise IndexError(f"Target {int(target[~right][0])} is out of bounds.")


def _factors(
    pointwise: Any,
    rows: tuple[int, ...],
    head: tuple[Tensor, Tensor | None],
    target: Any,
    options: LossOptions,
    needing_logits: tuple[Any, ...],
) -> tuple[tuple[float, float, bool], Tensor | None] | None:
    """What :func:`fold` finds, where the loss can be computed without logits; else None.

    Args:
        pointwise: What was done to the logits after the head.
        rows: The shape of the logits without the last dimension.
        head: Its weight and bias.
        target: The labels.
        options: Of the loss.
        needing_logits: Arguments of ``F.cross_entropy`` that may not be given.
    """
    if any(given is not None for given in needing_logits) or len(rows) != 1:
        return None
    if type(target) is not torch.Tensor or target.dim() != 1 or target.shape[0] != rows[0]:
        return None
    if target.dtype not in (torch.int64, torch.uint8) or target.device != head[0].device:
        return None
    folded = fold(pointwise, head[1])
    if folded is None or options.reduction not in ("mean", "sum", "none"):
        return None
    if not 0 <= options.label_smoothing <= 1:
        return None
    (_, _, softcapped), bias = folded
    if bias is not head[1] and not biased_verified(*head, target.shape[0]):
        return None
    if softcapped and not softcap_verified(*head, target.shape[0]):
        return None
    return folded


def cross_entropy(
    operands: tuple[Tensor, Tensor, Tensor | None],
    pointwise: Any,
    dtype: torch.dtype,
    most_rows: Callable[[int], int | None],
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """``F.cross_entropy`` of logits that are not computed, or ``NotImplemented`` where it needs them.

    Args:
        operands: Hidden states ``[tokens, hidden]``, weight ``[vocab, hidden]`` and bias of the head.
        pointwise: What was done to the logits after the head.
        dtype: Of the loss.
        most_rows: Given ``ignore_index``, how many labels count at most; None if that is not known.
        target: Class numbers, ``[tokens]``; all from here on as for ``F.cross_entropy``.
        weight: Of the classes; with one the logits are needed.
        size_average: Deprecated; with it the logits are needed.
        ignore_index: Labels of this value do not count.
        reduce: Deprecated; with it the logits are needed.
        reduction: ``mean``, ``sum`` or ``none``.
        label_smoothing: From 0 to 1.
    """
    hidden, head_weight, bias = operands
    if hidden.dtype != head_weight.dtype or (bias is not None and bias.dtype != hidden.dtype):
        return NotImplemented
    options = LossOptions(ignore_index, reduction, label_smoothing)
    needing_logits = weight, size_average, reduce
    rows = tuple(hidden.shape[:-1])
    folded = _factors(pointwise, rows, (head_weight, bias), target, options, needing_logits)
    if folded is None:
        return NotImplemented
    (pre, post, tanh), bias = folded
    loss = of_rows(
        hidden,
        head_weight,
        bias,
        target.long(),
        pre=pre,
        post=post,
        tanh=tanh,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        most_rows=most_rows(ignore_index),
    )
    return loss.to(dtype)


def fold(pointwise: Any, bias: Tensor | None) -> tuple[tuple[float, float, bool], Tensor | None] | None:
    """The factors ``(pre, post, True)`` of ``post * tanh(pre * x)`` or ``(pre, 1, False)`` of ``pre * x``.

    With them comes the bias of ``x``: that of the head, and what was added to its logits after it. None where
    pointwise operations are something else; casts are passed over.

    Args:
        pointwise: What was done to the logits.
        bias: Of the head, ``[vocab]`` or None.
    """
    pre, post, tanh = 1.0, 1.0, False
    for name, value in pointwise:
        if name == "tanh":
            if tanh:
                return None
            tanh = True
        elif name == "add":
            if tanh or pre != 1:
                return None
            wide = torch.promote_types(value.dtype, torch.float32)
            bias = value if bias is None else bias.to(wide) + value
        elif name in ("mul", "div"):
            if name == "div" and value == 0:
                return None
            factor = value if name == "mul" else 1.0 / value
            pre, post = (pre, post * factor) if tanh else (pre * factor, post)
        elif name != "to":
            return None
    return (pre, post, tanh), bias


def of_whole_rows(dim: int, index: Any) -> bool:
    """Whether an index into a tensor of ``dim`` dimensions leaves the last of them as it is."""
    parts = list(index) if isinstance(index, tuple) else [index]
    taken = 0
    for part in parts:
        if isinstance(part, (DeferredLogits, bool)):
            return False
        if isinstance(part, torch.Tensor):
            taken += part.dim() if part.dtype in (torch.bool, torch.uint8) else 1
        elif isinstance(part, int | slice):
            taken += 1
        elif part is not None and part is not Ellipsis:
            return False
    dots = sum(part is Ellipsis for part in parts)
    reaches_end = (dots == 1 and parts[-1] is not Ellipsis) or (not dots and taken >= dim)
    return dots <= 1 and taken <= dim and (not reaches_end or _is_whole(parts[-1]))


def _is_whole(part: Any) -> bool:
    return isinstance(part, slice) and (part.start, part.stop, part.step) == (None, None, None)
