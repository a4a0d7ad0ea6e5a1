"""The inputs of a comparison: copies of those of a call, whole or of fewer tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Axes", "axes_of", "duplicate", "fewer", "fewer_of", "fewer_sequences", "tensors_of"]

# Two, so that a kernel which takes all sequences for the first one is seen.
_SEQUENCES = 2


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]


def duplicate(value: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Copy a tensor with its strides, so that a kernel which reads them wrongly fails on the copy as well.

    Args:
        value: Any tensor.
        dtype: Of the copy; by default the same.

    Returns:
        The leaf that owns the copy, and the copy: the same tensor but where the original is expanded.
    """
    whole = value.detach()
    if value.layout is not torch.strided:
        leaf = whole.clone() if dtype is None else whole.to(dtype, copy=True)
        return leaf, leaf
    spread = [stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)]
    if any(spread):
        whole = whole[tuple(slice(0, 1) if is_spread else slice(None) for is_spread in spread)]
    dtype = dtype or value.dtype
    try:
        leaf = _empty(whole.shape, whole.stride(), dtype, value.device)
        leaf.copy_(whole)
    except RuntimeError:  # its elements overlap in memory
        leaf = whole.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return leaf, leaf.expand(value.shape) if any(spread) else leaf


def _empty(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a tensor; what lies between its elements is zero.

    Products in bfloat16 on a CPU read past the ends of rows, and zero times a NaN that is left there is NaN.
    """
    made = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    if made.untyped_storage().nbytes() > made.nbytes:
        torch.empty(0, dtype=dtype, device=device).set_(made.untyped_storage()).zero_()
    return made


def fewer_of(length: int, tokens: int) -> int:
    """How many of ``length`` tokens are compared: at most ``tokens``, and equal to ``length`` modulo 16."""
    return min(length, tokens - ((tokens - length) % 16 if tokens > 16 else 0))


def fewer(inputs: Any, tokens: int) -> Any:
    """Cut inputs to at most ``tokens`` of the tokens they share, and to at most two sequences.

    Tokens are the longest dimension, but the last one, that all tensors have; of a lone tensor the last but
    one. What cannot be told apart is left whole.

    The strides shrink with the sizes, so that copies are as small as what is left: those of a cut view
    would span the memory of the whole. Lengths that 16 divides stay so, and others do not become so,
    because triton compiles a kernel anew for them.
    """
    found = axes_of(inputs, tokens)
    if found is None:
        return inputs
    cuts: dict[int, dict[int, int]] = {
        key: {axis: fewer_of(found.length, tokens)}
        for key, axis in found.tokens.items()
        if found.length > tokens
    }
    _cut_sequences(cuts, found)
    wide = [tensor for tensor in tensors_of(inputs) if tensor.ndim > 1]
    if len(wide) == 1:  # rows of heads, say, of tokens: each axis between counts rows
        between = range(1, wide[0].ndim - 2)
        more = {
            axis: fewer_of(wide[0].shape[axis], tokens) for axis in between if wide[0].shape[axis] > tokens
        }
        cuts.setdefault(id(wide[0]), {}).update(more)
    return _with_cuts(inputs, cuts)


def fewer_sequences(inputs: Any) -> Any:
    """Cut inputs to at most two sequences, and leave all else whole.

    Not every axis holds tokens: that of an image's channels has the length of a layer's weight.
    """
    found = axes_of(inputs)
    cuts: dict[int, dict[int, int]] = {}
    if found is not None:
        _cut_sequences(cuts, found)
    return _with_cuts(inputs, cuts)


def _cut_sequences(cuts: dict[int, dict[int, int]], found: Axes) -> None:
    if found.batch > _SEQUENCES:
        for key in found.sequences:
            cuts.setdefault(key, {})[0] = _SEQUENCES


def _with_cuts(inputs: Any, cuts: dict[int, dict[int, int]]) -> Any:
    def cut(value: Any) -> Any:
        found = cuts.get(id(value)) if isinstance(value, Tensor) else None
        return _cut(value, found) if found else value

    return tree_map(cut, inputs)


class Axes(NamedTuple):
    """Where the tokens and sequences of a call are.

    Attributes:
        tokens: The axis of the tokens, by the id of each tensor that has some.
        length: How many there are.
        sequences: The ids of the tensors whose first axis is that of sequences.
        batch: How many there are; 0 where that cannot be told.
    """

    tokens: dict[int, int]
    length: int
    sequences: set[int]
    batch: int


def axes_of(inputs: Any, over: int = 0) -> Axes | None:
    """Where tokens and sequences are in the inputs of a call; None where there is nothing to tell it by.

    Args:
        inputs: The arguments of the call.
        over: Fewer tokens than this plus one are not looked for.
    """
    given = tensors_of(inputs)
    wide = [tensor for tensor in given if tensor.ndim > 1]
    if not wide or any(tensor.layout is not torch.strided for tensor in given):
        return None
    axes: list[int] | None = [wide[0].ndim - 2] if len(wide) == 1 else _shared(wide, over)
    tokens = {} if axes is None else {id(t): axis for t, axis in zip(wide, axes, strict=True)}
    length = 0 if axes is None else wide[0].shape[axes[0]]
    cut = length > over
    batch = wide[0].shape[0]
    leads = [tensor for tensor in wide if not (cut and tokens.get(id(tensor)) == 0) and tensor.ndim > 2]
    # Three may as well be the sections of a multimodal table: time, height and width.
    several = batch > 1 and batch != 3 and len(leads) == len(wide)
    if not several or not all(tensor.shape[0] in (1, batch) for tensor in leads):
        return Axes(tokens, length, set(), 0)
    return Axes(tokens, length, {id(tensor) for tensor in leads if tensor.shape[0] == batch}, batch)


def _shared(tensors: list[Tensor], over: int) -> list[int] | None:
    """The axis of each tensor that has the longest length they all share; None if there are several."""
    lengths = [list(t.shape[:-1] if t.is_floating_point() else t.shape) for t in tensors]
    common = {n for n in lengths[0] if n > over and all(n in other for other in lengths)}
    if not common:
        return None
    longest = max(common)
    if any(shape.count(longest) > 1 for shape in lengths):
        return None
    return [shape.index(longest) for shape in lengths]


def _cut(value: Tensor, cuts: dict[int, int]) -> Tensor:
    view = value.detach()
    strides = list(value.stride())
    for axis, size in cuts.items():
        step = value.stride(axis)
        for other in range(value.ndim):
            if value.stride(other) > step > 0:
                whole = strides[other] * size
                if whole % value.shape[axis]:
                    return view[tuple(slice(cuts.get(at)) for at in range(value.ndim))]
                strides[other] = whole // value.shape[axis]
        view = view.narrow(axis, 0, size)
    with torch.inference_mode(False):
        try:
            return _empty(view.shape, strides, value.dtype, value.device).copy_(view)
        except RuntimeError:  # expanded
            return view
