"""The operations below autograd that deferred logits, or their gradient, answer without being computed.

All others run on the values.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map

from twinkle.deferred.logits import DeferredLogits
from twinkle.deferred.steps import Added, Index, Node, Number, Reshape, Select, Slice
from twinkle.ops.causal_lm_loss.chunks import chunk_rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor

    from twinkle.deferred.steps import Step

__all__ = ["answer"]

_aten = torch.ops.aten
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ALIASES = (_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default)
_OF_THE_STORAGE = ("aten::set_", "aten::resize_", "aten::resize_as_")


def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation gives: recorded where that is possible, else computed.

    Args:
        func: An overload of an operator, below autograd.
        args: Its arguments.
        kwargs: And the named ones.
    """
    first = args[0] if args else None
    if func in _BACKWARD_OF_ROWS:
        made = _BACKWARD_OF_ROWS[func](func, *args, **kwargs)
    elif not isinstance(first, DeferredLogits) or not first.is_deferred:
        made = None
    elif func in _ALIASES or (func is _aten.view.default and list(args[1]) == list(first.shape)):
        made = _alias(first, func, args[1:])
    elif func is _aten.clone.default:
        made = _like(first, func(first.like(), **kwargs))
    elif first.gradient is not None:
        made = _undone(first, func, args, kwargs)
    else:
        recorder = _RECORDED.get(func)
        made = None if recorder is None else recorder(func, *args, **kwargs)
    return _computed(func, args, kwargs) if made is None else made


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on the values."""
    schema = func._schema
    written: dict[int, DeferredLogits] = {}
    views = func.is_view or schema.name.endswith("unsafe_view")
    if schema.is_mutable:
        if schema.name in _OF_THE_STORAGE:
            raise RuntimeError(
                f"{schema.name} of deferred logits: they have no storage of their own; take "
                "outputs.logits.clone() + 0, or set TWINKLE_DISABLE=causal_lm_loss"
            )
        for place, argument in enumerate(schema.arguments):
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                for target in given if isinstance(given, (list, tuple)) else [given]:
                    if isinstance(target, DeferredLogits):
                        written[id(target.shared())] = target

    def real_of(value: Any) -> Any:
        if not isinstance(value, DeferredLogits):
            return value
        return value.shared() if views or id(value._real) in written else value.values()

    given, named = tree_map(real_of, args), tree_map(real_of, kwargs)
    result = func(*given, **named)
    if torch.Tag.inplace_view in func.tags:
        # The tensor without memory gets its new shape as well.
        with no_dispatch():
            func(*args, **kwargs)
    reals = {id(value) for value in (*given, *named.values()) if isinstance(value, torch.Tensor)}

    def ours(value: Any) -> Any:
        if id(value) in written:
            return written[id(value)]
        # Autograd makes what an operation returns its own: never the tensor that we keep.
        return _aten.alias(value) if isinstance(value, torch.Tensor) and id(value) in reals else value

    return tree_map(ours, result)


# -- logits ---------------------------------------------------------------------------------------


def _alias(logits: DeferredLogits, func: Any, rest: tuple[Any, ...] = ()) -> DeferredLogits:
    view = functools.partial(_call, func, rest, {})
    return DeferredLogits.make(logits.node, logits.like(), gradient=logits.gradient, view_of=(logits, view))


def _call(func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> Any:
    return func(value, *rest, **kwargs)


def _like(logits: DeferredLogits, like: Tensor) -> DeferredLogits:
    """The same values in a memory of their own."""
    gradient = logits.gradient
    if gradient is None:
        return DeferredLogits.make(logits.node, like)
    compute = functools.partial(gradient.compute, logits.node)
    return DeferredLogits.make(logits.node, like, gradient=gradient, compute=compute)


def _then(logits: DeferredLogits, like: Tensor, step: Step, view: Any = None) -> DeferredLogits:
    node = Node(logits.node.head, tuple(like.shape[:-1]), like.dtype, logits.node, step)
    return DeferredLogits.make(node, like, view_of=None if view is None else (logits, view))


def _reshape(func: Any, logits: Any, *rest: Any) -> Any:
    like = func(logits.like(), *rest)
    if like.dim() < 2 or like.shape[-1] != logits.shape[-1] or not _rows_stay(logits, like):
        return None
    return _then(logits, like, Reshape(tuple(like.shape[:-1])), functools.partial(_call, func, rest, {}))


def _rows_stay(logits: Tensor, like: Tensor) -> bool:
    # Without a row, or of a vocabulary of one, a shape says nothing about rows.
    return bool(logits.numel() > 0 and logits.shape[-1] > 1 and like.stride(-1) == logits.stride(-1))


def _slice(func: Any, logits: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    like = func(logits.like(), dim, start, end, step)
    dim %= logits.dim()
    if dim == logits.dim() - 1:
        return _alias(logits, func, (dim, start, end, step)) if like.shape == logits.shape else None
    view = functools.partial(_call, func, (dim, start, end, step), {})
    return _then(logits, like, Slice(dim, start, end, step), view)


def _select(func: Any, logits: Any, dim: int, index: int) -> Any:
    like = func(logits.like(), dim, index)
    dim %= logits.dim()
    if dim == logits.dim() - 1:
        return None
    return _then(logits, like, Select(dim, index), functools.partial(_call, func, (dim, index), {}))


def _split(func: Any, logits: Any, size: Any, dim: int = 0) -> Any:
    likes = func(logits.like(), size, dim)
    dim %= logits.dim()
    if dim == logits.dim() - 1:
        return None
    pieces, start = [], 0
    for like in likes:
        stop = start + like.shape[dim]
        view = functools.partial(_call, _aten.slice.Tensor, (dim, start, stop, 1), {})
        pieces.append(_then(logits, like, Slice(dim, start, stop, 1), view))
        start = stop
    return pieces


def _index(func: Any, logits: Any, indices: Any) -> Any:
    indices = list(indices)
    taken = sum(1 if i is None or i.dtype not in (torch.bool, torch.uint8) else i.dim() for i in indices)
    if taken >= logits.dim() or any(isinstance(index, DeferredLogits) for index in indices):
        return None
    before = logits.node
    rows = func(before.rows, indices)
    like = torch.empty((*rows.shape[:-1], logits.shape[-1]), dtype=logits.dtype, device="meta")
    node = Node(before.head, tuple(rows.shape[:-1]), like.dtype, before, Index(indices), rows)
    return DeferredLogits.make(node, like)


def _cast(func: Any, logits: Any, **kwargs: Any) -> Any:
    dtype = kwargs.get("dtype") or logits.dtype
    device = kwargs.get("device")
    plain = kwargs.get("layout") in (None, torch.strided) and not kwargs.get("pin_memory")
    if dtype not in _FLOATS or not plain:
        return None
    if device is not None and torch.device(device) != logits.device:
        return None
    named = {name: value for name, value in kwargs.items() if name in ("dtype", "memory_format")}
    return _then(logits, func(logits.like(), **named), Number("to", dtype))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _scale(func: Any, logits: Any, other: Any) -> Any:
    if not _number(other):
        return None
    name = "mul" if func is _aten.mul.Tensor else "div"
    return _then(logits, func(logits.like(), other), Number(name, other))


def _add(func: Any, logits: Any, other: Any, *, alpha: Any = 1) -> Any:
    """A bias of the vocabulary's width, whose numbers are kept: it is added to the rows of later chunks."""
    vocab = logits.shape[-1]
    if type(other) is not torch.Tensor or other.requires_grad or alpha != 1 or other.dtype not in _FLOATS:
        return None
    if other.numel() != vocab or other.dim() == 0 or other.shape[-1] != vocab or other.dim() > logits.dim():
        return None
    if other.device != logits.device:
        return None
    like = func(logits.like(), torch.empty_like(other, device="meta"))
    if like.dtype != logits.dtype:
        wide = logits.like().to(like.dtype)
        logits = _then(logits, wide, Number("to", like.dtype))
    return _then(logits, like, Added(other.detach().reshape(vocab).to(like.dtype, copy=True)))


def _tanh(func: Any, logits: Any) -> Any:
    return _then(logits, func(logits.like()), Number("tanh", None))


def _in_place(name: str) -> Callable[..., Any]:
    def change(func: Any, logits: Any, other: Any = None) -> Any:
        if len(logits.memory.members) > 1 or not (name == "tanh" or _number(other)):
            return None
        node = logits.node
        logits.become(Node(node.head, tuple(node.shape[:-1]), node.dtype, node, Number(name, other)))
        return logits

    return change


def _row_softmax(func: Any, logits: Any, dim: int, half_to_float: bool) -> Any:
    if half_to_float or dim % logits.dim() != logits.dim() - 1:
        return None
    name = "softmax" if func is _aten._softmax.default else "log_softmax"
    return _then(logits, func(logits.like(), dim, half_to_float), Number(name, None))


def _chunks(logits: DeferredLogits, function: Callable[[Tensor, int, int], Tensor]) -> Tensor | None:
    """What a function makes of the logits of some rows at a time, put together: ``[rows, ...]``.

    Where a gradient is recorded that will need all logits, they are computed at once.
    """
    rows = logits.node.rows.reshape(-1, logits.node.rows.shape[-1])
    number, width = rows.shape
    if number == 0:
        return None
    logits.node.head.check()
    size = chunk_rows(number, logits.shape[-1], width, logits.element_size(), gpu=rows.is_cuda)
    parts = [
        function(logits.node.compute(rows[start : start + size]), start, start + size)
        for start in range(0, number, size)
    ]
    return torch.cat(parts)


def _will_be_needed(logits: DeferredLogits) -> bool:
    return bool(logits.requires_grad and torch.is_grad_enabled())


def _argmax(func: Any, logits: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if dim is None or dim % logits.dim() != logits.dim() - 1:
        return None
    return _reduced(logits, lambda part: part.argmax(-1), keepdim)


def _logsumexp(func: Any, logits: Any, dim: Any, keepdim: bool = False) -> Any:
    if len(dim) != 1 or dim[0] % logits.dim() != logits.dim() - 1 or _will_be_needed(logits):
        return None
    return _reduced(logits, lambda part: part.logsumexp(-1), keepdim)


def _reduced(logits: DeferredLogits, function: Callable[[Tensor], Tensor], keepdim: bool) -> Any:
    found = _chunks(logits, lambda part, start, stop: function(part))
    if found is None:
        return None
    found = found.view(logits.shape[:-1])
    return found.unsqueeze(-1) if keepdim else found


def _gather(func: Any, logits: Any, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    last = dim % logits.dim() == logits.dim() - 1
    whole = index.shape[:-1] == logits.shape[:-1] and type(index) is torch.Tensor
    if not last or not whole or index.numel() == 0 or _will_be_needed(logits):
        return None
    flat = index.reshape(-1, index.shape[-1])
    found = _chunks(logits, lambda part, start, stop: part.gather(1, flat[start:stop]))
    return None if found is None else found.view(index.shape)


_RECORDED: dict[Any, Callable[..., Any]] = {
    _aten.view.default: _reshape,
    _aten._unsafe_view.default: _reshape,
    _aten.unsqueeze.default: _reshape,
    _aten.squeeze.dim: _reshape,
    _aten.squeeze.dims: _reshape,
    _aten.slice.Tensor: _slice,
    _aten.select.int: _select,
    _aten.split.Tensor: _split,
    _aten.index.Tensor: _index,
    _aten._to_copy.default: _cast,
    _aten.mul.Tensor: _scale,
    _aten.div.Tensor: _scale,
    _aten.tanh.default: _tanh,
    _aten.add.Tensor: _add,
    _aten.mul_.Tensor: _in_place("mul"),
    _aten.div_.Tensor: _in_place("div"),
    _aten.tanh_.default: _in_place("tanh"),
    _aten._softmax.default: _row_softmax,
    _aten._log_softmax.default: _row_softmax,
    _aten.argmax.default: _argmax,
    _aten.logsumexp.default: _logsumexp,
    _aten.gather.default: _gather,
}


# -- gradients ------------------------------------------------------------------------------------


def _undone(grad: DeferredLogits, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The gradient before the last step, where the operation is the backward of that step."""
    node = grad.node
    if node.step is None or not node.step.undone_by(node, func, args, kwargs):
        return None
    assert node.previous is not None
    return grad.gradient.at(node.previous) if grad.gradient is not None else None


def _zeros(func: Any, grad: Any, size: Any, **kwargs: Any) -> Any:
    """The zeros that the backward of an index puts a gradient into."""
    if not isinstance(grad, DeferredLogits) or grad.gradient is None or not grad.is_deferred:
        return None
    previous = grad.node.previous if isinstance(grad.node.step, Index) else None
    if previous is None or tuple(size) != previous.shape or kwargs.get("dtype") not in (None, grad.dtype):
        return None
    return grad.gradient.nothing().at(previous)


def _put(func: Any, zeros: Any, indices: Any, grad: Any, accumulate: bool = False) -> Any:
    both = isinstance(zeros, DeferredLogits) and isinstance(grad, DeferredLogits)
    if not both or zeros.gradient is None or grad.gradient is None or not grad.is_deferred:
        return None
    node = grad.node
    empty = zeros.gradient.is_nothing and zeros.is_deferred and not grad.gradient.is_nothing
    if not empty or not accumulate or not isinstance(node.step, Index) or node.previous is not zeros.node:
        return None
    return grad.gradient.at(node.previous) if node.step.names(list(indices)) else None


_BACKWARD_OF_ROWS: dict[Any, Callable[..., Any]] = {
    _aten.new_zeros.default: _zeros,
    _aten.index_put.default: _put,
}
