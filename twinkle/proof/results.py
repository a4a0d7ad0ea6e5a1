"""What a call gives, taken apart: every tensor and every plain value, and the containers that hold them.

Two results are alike where a program cannot tell them apart but by rounding: the containers have the same
types and keys, values that are no tensors are equal, and tensors have the same class, dtype, device and
shape. The memory format counts where a program would notice: ``view`` of a result that the original gives
in one dense piece.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from twinkle.proof.verdict import Rejected

__all__ = ["Parts", "check_alike", "check_memory", "detached", "equal", "owners", "strides_of", "taken_apart"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_TENSORS = (Tensor, nn.Parameter)
_DEEPEST = 8


class Parts(NamedTuple):
    """A result taken apart.

    Attributes:
        containers: The class of each container, with its keys where it has some, in the order they are met.
        leaves: Tensors, plain values, and objects of which only the class is known.
    """

    containers: list[tuple[type, tuple[Any, ...]]]
    leaves: list[Any]


def taken_apart(value: Any) -> Parts:
    """Take a result apart; containers are lists, tuples, dicts, dataclasses and objects with attributes."""
    parts = Parts([], [])
    _take(value, parts, set(), 0)
    return parts


def _take(value: Any, parts: Parts, met: set[int], depth: int) -> None:
    items: list[Any] | None = None
    keys: tuple[Any, ...] = ()
    if isinstance(value, (Tensor, nn.Module, type, *_PLAIN)) and not isinstance(value, torch.Size):
        pass
    elif isinstance(value, Mapping):
        keys = tuple(sorted(value, key=repr)) if type(value) is dict else tuple(value)
        items = [value[key] for key in keys]
    elif isinstance(value, (list, tuple)):
        items, keys = list(value), (len(value),)
    elif dataclasses.is_dataclass(value):
        keys = tuple(field.name for field in dataclasses.fields(value))
        items = [getattr(value, key, None) for key in keys]
    elif not callable(value) and getattr(value, "__dict__", None):
        keys = tuple(vars(value))
        items = [*vars(value).values()]
    if items is None or depth == _DEEPEST or id(value) in met:
        parts.leaves.append(value)
        return
    if items:
        met.add(id(value))
    parts.containers.append((type(value), keys))
    for item in items:
        _take(item, parts, met, depth + 1)


def detached(leaves: list[Any]) -> list[Any]:
    """The same leaves, tensors without autograd."""
    return [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def equal(some: list[Any], others: list[Any]) -> bool:
    """Whether tensors are equal bit for bit, with NaN equal to NaN."""
    pairs = zip(some, others, strict=False)
    return len(some) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in pairs
        if isinstance(a, Tensor) and isinstance(b, Tensor)
    )


def check_alike(what: str, ours: Parts, theirs: Parts, *, tied: bool = False) -> None:
    """Compare all but the numbers in floating tensors.

    Args:
        what: ``result`` or ``gradient``, for messages.
        ours: Of the kernel.
        theirs: Of the original.
        tied: Whole numbers may differ: of values that are extreme on purpose, many are the largest.

    Raises:
        Rejected: A program can tell them apart.
    """
    if len(ours.leaves) != len(theirs.leaves):
        raise Rejected(f"it gives {len(ours.leaves)} {what}s where the original gives {len(theirs.leaves)}")
    for mine, other in zip(ours.leaves, theirs.leaves, strict=True):
        if isinstance(other, Tensor):
            _check_tensor(what, mine, other, tied)
        elif type(mine) is not type(other):
            raise Rejected(f"a {what} is {type(mine).__name__}, the original's {type(other).__name__}")
        elif isinstance(other, _PLAIN) and not _same_value(mine, other):
            raise Rejected(f"a {what} is {mine!r:.40}, the original's {other!r:.40}")
    for (mine, keys), (other, their_keys) in zip(ours.containers, theirs.containers, strict=False):
        if mine is not other:
            raise Rejected(f"a {what} is {mine.__name__}, the original's {other.__name__}")
        if keys != their_keys:
            raise Rejected(f"a {what} has other keys than the original's: {keys!r:.60}")
    if len(ours.containers) != len(theirs.containers):
        raise Rejected(f"the {what}s are nested in another way than the original's")


def _check_tensor(what: str, mine: Any, other: Tensor, tied: bool) -> None:
    if not isinstance(mine, Tensor):
        raise Rejected(f"a {what} is {'missing' if mine is None else type(mine).__name__}")
    if type(mine) is not type(other) and not (type(mine) in _TENSORS and type(other) in _TENSORS):
        raise Rejected(f"a {what} is a {type(mine).__name__}, the original's a {type(other).__name__}")
    if mine.dtype != other.dtype or mine.shape != other.shape:
        raise Rejected(f"a {what} is {_dtype_and_shape(mine)}, the original's {_dtype_and_shape(other)}")
    if mine.device != other.device or mine.layout != other.layout:
        ours, theirs = (f"{tensor.layout} on {tensor.device}" for tensor in (mine, other))
        raise Rejected(f"a {what} is {ours}, the original's {theirs}")
    whole = not other.is_floating_point() and not other.is_complex()
    if whole and not tied and not torch.equal(mine, other):
        raise Rejected(f"a {what} of whole numbers differs")


def _same_value(mine: Any, other: Any) -> bool:
    if isinstance(other, (float, complex)):
        if mine != mine or other != other:
            return bool(mine != mine and other != other)
        return mine == other or bool(abs(mine - other) <= 5e-3 * max(abs(mine), abs(other)))
    return bool(mine == other)


def _dtype_and_shape(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def owners(leaves: list[Any], given: list[Tensor]) -> list[int | None]:
    """For each leaf, which of the given tensors it shares memory with; None for none or no tensor.

    A leaf that is the same memory as an earlier leaf counts as a share of that one, numbered from -1 down.
    """
    known = {_memory(tensor): number for number, tensor in reversed([*enumerate(given)])}
    known.pop(None, None)
    starts: dict[Any, int] = {}
    found: list[int | None] = []
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or (memory := _memory(leaf)) is None:
            found.append(None)
            continue
        first = starts.setdefault((leaf.data_ptr(), memory), number)
        found.append(known.get(memory, None if first == number else -1 - first))
    return found


def _memory(tensor: Tensor) -> int | None:
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return None
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


def check_memory(ours: Any, theirs: Any, *, dense: bool) -> None:
    """Compare where the results lie, and whether they are a part of a graph.

    Args:
        ours: The run of the kernel: ``outputs``, ``owners``, ``grads`` (whether each requires gradients) and
            ``strides``.
        theirs: That of the original.
        dense: All inputs are contiguous, so that results in another order are the kernel's doing.

    Raises:
        Rejected: A program can tell them apart.
    """
    for mine, other in zip(ours.owners, theirs.owners, strict=True):
        if mine is not None and mine != other:
            shared = "an input or a weight" if mine >= 0 else "another result"
            raise Rejected(f"a result shares the memory of {shared}, the original's does not")
    for mine, other in zip(ours.grads, theirs.grads, strict=True):
        if mine != other:
            does = "does not require" if other else "requires"
            raise Rejected(f"a result {does} gradients, unlike the original's")
    for ours_at, theirs_at, other in zip(ours.strides, theirs.strides, theirs.outputs, strict=True):
        if ours_at is None or theirs_at is None:
            continue
        differs = ours_at != theirs_at
        if differs and (other.is_contiguous() or (dense and _is_dense(theirs_at, other))):
            raise Rejected(f"a result has strides {ours_at}, the original's {theirs_at}")


def strides_of(leaf: Any) -> tuple[int, ...] | None:
    """The strides of a tensor, but for axes of length 1, whose strides say nothing."""
    if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided or leaf.numel() == 0:
        return None
    return tuple(stride for stride, size in zip(leaf.stride(), leaf.shape, strict=True) if size > 1)


def _is_dense(strides: tuple[int, ...], tensor: Tensor) -> bool:
    """Whether the elements lie in one piece without gaps, in some order of the axes."""
    sizes = [size for size in tensor.shape if size > 1]
    reach = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if stride != reach:
            return False
        reach *= size
    return True
