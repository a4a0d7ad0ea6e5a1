"""The torch functions that deferred logits answer without being computed.

A handler gets the arguments of the function it stands for, and gives ``NotImplemented`` where the
logits have to be computed after all.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from twinkle.deferred.head import apply_pointwise
from twinkle.deferred.logits import DeferredLogits
from twinkle.deferred.verification import softcap_verified
from twinkle.errors import TwinkleWarning
from twinkle.ops.causal_lm_loss.chunks import chunk_rows
from twinkle.ops.causal_lm_loss.linear_cross_entropy import of_rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor

__all__ = ["HANDLERS", "METADATA", "changes_in_place", "cross_entropy", "of_whole_rows"]

_T = torch.Tensor
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _getter(name: str) -> Any:
    return getattr(_T, name).__get__


# What torch answers rightly for a tensor without memory.
METADATA = frozenset(
    [
        *(_getter(n) for n in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu", "is_meta")),
        *(_getter(n) for n in ("is_sparse", "is_quantized", "is_nested", "is_mps", "is_xpu")),
        *(_getter(n) for n in ("itemsize", "nbytes")),
        *(_T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.element_size, _T.get_device, _T.__len__),
        *(_T.is_floating_point, _T.is_complex, _T.is_signed, torch.is_floating_point, torch.is_complex),
        *(_T.is_contiguous, _T.stride, torch.numel, _T.__hash__),
    ]
)

_ARITHMETIC = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"}
_ASSIGNMENTS = _ARITHMETIC | {"__iand__", "__ior__", "__ixor__", "__setitem__", "__delitem__"}


def changes_in_place(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function writes to its first argument (or to ``out``)."""
    name = getattr(func, "__name__", "")
    if kwargs.get("out") is not None or kwargs.get("inplace") is True:
        return True
    return name in _ASSIGNMENTS or (name.endswith("_") and not name.endswith("__"))


HANDLERS: dict[Any, Callable[..., Any]] = {}


def _handles(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            HANDLERS[function] = handler
        return handler

    return register


# -- casts ----------------------------------------------------------------------------------------


def _cast(logits: DeferredLogits, dtype: torch.dtype, *, copy: bool = False) -> Any:
    if dtype not in _FLOATS:
        return NotImplemented
    if dtype == logits.dtype:
        return logits.derive(logits._hidden, logits._pointwise) if copy else logits
    return logits.derive(logits._hidden, (*logits._pointwise, ("to", dtype)))


@_handles(_T.float)
def _float(logits: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _cast(logits, torch.float32)


@_handles(_T.half)
def _half(logits: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _cast(logits, torch.float16)


@_handles(_T.bfloat16)
def _bfloat16(logits: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _cast(logits, torch.bfloat16)


@_handles(_T.double)
def _double(logits: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _cast(logits, torch.float64)


@_handles(_T.to)
def _to(logits: Any, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("non_blocking", None)
    copy = kwargs.pop("copy", False)
    wanted = [*args, *(kwargs.pop(n, None) for n in ("device", "dtype", "other"))]
    if kwargs:
        return NotImplemented
    device, dtype = logits.device, logits.dtype
    for value in wanted:
        if isinstance(value, torch.Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif value is None or isinstance(value, bool):
            continue
        elif isinstance(value, str | torch.device | int):
            device = torch.device(value)
        else:
            return NotImplemented
    if device.type != logits.device.type or device.index not in (None, logits.device.index):
        return NotImplemented
    if device.index is None and device.type == "cuda" and torch.cuda.current_device() != logits.device.index:
        return NotImplemented
    return _cast(logits, dtype, copy=copy or args[2:] == (True,))


# -- shapes ---------------------------------------------------------------------------------------


@_handles(_T.contiguous)
def _contiguous(logits: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else logits


@_handles(_T.view, _T.reshape, torch.reshape)
def _view(logits: Any, *shape: Any, **kwargs: Any) -> Any:
    if kwargs or not shape or any(isinstance(size, torch.dtype) for size in shape):
        return NotImplemented
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = tuple(shape[0])
    sizes = [int(size) for size in shape]
    if not sizes:
        return NotImplemented
    vocab, known = logits.shape[-1], 1
    for size in sizes:
        known *= size if size != -1 else 1
    if sizes.count(-1) == 1 and known > 0 and logits.numel() % known == 0:
        sizes[sizes.index(-1)] = logits.numel() // known
        known = logits.numel()
    # Wrong shapes are left to torch to complain about.
    if sizes[-1] != vocab or known != logits.numel() or min(sizes) < 0:
        return NotImplemented
    rows = sizes[:-1]
    hidden = logits._hidden.reshape(*rows, logits._hidden.shape[-1])
    return logits.derive(hidden, logits._pointwise, lambda real: real.reshape(*rows, vocab))


@_handles(_T.__getitem__)
def _rows(logits: Any, index: Any) -> Any:
    if not of_whole_rows(logits.dim(), index):
        return NotImplemented
    hidden = logits._hidden[index]
    plain = not any(isinstance(part, torch.Tensor) for part in _parts(index))
    return logits.derive(hidden, logits._pointwise, (lambda real: real[index]) if plain else None)


def of_whole_rows(dim: int, index: Any) -> bool:
    """Whether an index into a tensor of ``dim`` dimensions leaves the last of them as it is."""
    parts = _parts(index)
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


def _parts(index: Any) -> list[Any]:
    return list(index) if isinstance(index, tuple) else [index]


def _is_whole(part: Any) -> bool:
    return isinstance(part, slice) and (part.start, part.stop, part.step) == (None, None, None)


@_handles(_T.detach, torch.detach)
def _detach(logits: Any) -> Any:
    if not logits.records_grad:
        return logits.derive(logits._hidden, logits._pointwise, lambda real: real.detach())
    hidden = logits._hidden.detach()
    with torch.no_grad():
        made = DeferredLogits(logits._head.detached(), hidden, logits._pointwise)
    return logits.adopt(made, lambda real: real.detach())


# -- numbers --------------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@_handles(_T.mul, _T.__mul__, _T.__rmul__, torch.mul, torch.multiply, _T.multiply)
def _mul(logits: Any, other: Any, **kwargs: Any) -> Any:
    number = _number(other)
    if number is None or kwargs:
        return NotImplemented
    return logits.derive(logits._hidden, (*logits._pointwise, ("mul", number)))


@_handles(_T.div, _T.__truediv__, torch.div, torch.true_divide, torch.divide, _T.divide, _T.true_divide)
def _div(logits: Any, other: Any, **kwargs: Any) -> Any:
    number = _number(other)
    if not number or kwargs:
        return NotImplemented
    return logits.derive(logits._hidden, (*logits._pointwise, ("div", number)))


@_handles(_T.tanh, torch.tanh)
def _tanh(logits: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else logits.derive(logits._hidden, (*logits._pointwise, ("tanh", None)))


def _in_place(name: str) -> Callable[..., Any]:
    def change(logits: Any, other: Any = None, **kwargs: Any) -> Any:
        number = None if name == "tanh" else _number(other)
        if kwargs or (name != "tanh" and not number) or len(logits.relatives()) > 1:
            return NotImplemented
        logits._pointwise = (*logits._pointwise, (name, number))
        return logits

    return change


HANDLERS.update(dict.fromkeys((_T.mul_, _T.__imul__), _in_place("mul")))
HANDLERS.update(dict.fromkeys((_T.div_, _T.__itruediv__), _in_place("div")))
HANDLERS[_T.tanh_] = _in_place("tanh")


# -- gradients ------------------------------------------------------------------------------------


@_handles(_getter("requires_grad"))
def _requires_grad(logits: Any) -> bool:
    return bool(logits.records_grad)


@_handles(_getter("is_leaf"))
def _is_leaf(logits: Any) -> bool:
    return not logits.records_grad


@_handles(_getter("grad"), _getter("grad_fn"))
def _grad(logits: Any) -> None:
    # DDP asks every output for its node, to put another one in front of it; there is none to answer for.
    return None


class _Hook:
    """A hook that waits for the logits to be computed."""

    def __init__(self, hook: Any) -> None:
        self._hook = hook
        self._handle: Any = None
        self._gone = False

    def attach(self, real: Tensor) -> None:
        if not self._gone and real.requires_grad:
            self._handle = real.register_hook(self._hook)

    def remove(self) -> None:
        self._gone = True
        if self._handle is not None:
            self._handle.remove()


@_handles(_T.register_hook)
def _register_hook(logits: Any, hook: Any) -> Any:
    if not logits.records_grad:
        return NotImplemented
    module = getattr(hook, "__module__", None) or ""
    if not module.startswith("torch."):
        _warn("a hook on deferred logits runs for what is computed from them, not for the fused loss")
    waiting = _Hook(hook)
    logits._hooks.append(waiting)
    return waiting


@_handles(_T.retain_grad)
def _retain_grad(logits: Any) -> Any:
    _warn("logits keep no gradient of a loss that was computed without them")
    return NotImplemented


def _warn(text: str) -> None:
    warnings.warn(f"{text}; TWINKLE_DISABLE=causal_lm_loss computes them", TwinkleWarning, stacklevel=5)


# -- the loss, and what metrics ask for -----------------------------------------------------------


@_handles(F.cross_entropy)
def _cross_entropy(input: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    counted = input._head.counted
    if isinstance(target, DeferredLogits):
        return NotImplemented

    def most_rows(ignore_index: int) -> int | None:
        return None if counted is None else counted.bound(target, ignore_index)

    wide = torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64
    dtype = torch.float32 if wide else input.dtype
    with torch.autocast(input.device.type, enabled=False):
        operands = input._head.operands(input._hidden)
        return cross_entropy(operands, input._pointwise, dtype, most_rows, target, *args, **kwargs)


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
    if any(given is not None for given in (weight, size_average, reduce)):
        return NotImplemented
    if hidden.dim() != 2 or target.dim() != 1 or target.shape[0] != hidden.shape[0]:
        return NotImplemented
    if target.dtype not in (torch.int64, torch.uint8) or target.device != hidden.device:
        return NotImplemented
    if hidden.dtype != head_weight.dtype or (bias is not None and bias.dtype != hidden.dtype):
        return NotImplemented
    folded = fold(pointwise)
    if folded is None or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    if folded[2] and not softcap_verified(head_weight, bias, hidden.shape[0]):
        return NotImplemented
    loss = of_rows(
        hidden,
        head_weight,
        bias,
        target.long(),
        pre=folded[0],
        post=folded[1],
        tanh=folded[2],
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        most_rows=most_rows(ignore_index),
    )
    return loss.to(dtype)


def fold(pointwise: Any) -> tuple[float, float, bool] | None:
    """The factors ``(pre, post, True)`` of ``post * tanh(pre * x)`` or ``(pre, 1, False)`` of ``pre * x``.

    None where pointwise operations are something else; casts are passed over.
    """
    pre, post, tanh = 1.0, 1.0, False
    for name, value in pointwise:
        if name == "tanh":
            if tanh:
                return None
            tanh = True
        elif name in ("mul", "div"):
            factor = value if name == "mul" else 1.0 / value
            pre, post = (pre, post * factor) if tanh else (pre * factor, post)
    return pre, post, tanh


@_handles(_T.argmax, torch.argmax)
def _argmax(logits: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    if kwargs or dim is None or dim not in (-1, logits.dim() - 1) or logits.dim() < 2:
        return NotImplemented
    rows = logits._hidden.detach().reshape(-1, logits._hidden.shape[-1])
    number, width = rows.shape
    size = chunk_rows(number, logits.shape[-1], width, logits.element_size(), gpu=rows.is_cuda)
    best = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    with torch.no_grad():
        for start in range(0, rows.shape[0], size):
            part = apply_pointwise(
                logits._head.logits(rows[start : start + size]).detach(), logits._pointwise
            )
            best[start : start + size] = part.argmax(-1)
    best = best.view(logits.shape[:-1])
    return best.unsqueeze(-1) if keepdim else best
