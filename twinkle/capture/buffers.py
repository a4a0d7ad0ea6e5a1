"""Where recordings read what they are given, and write what they give."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twinkle.capture.order import STILL, Order
from twinkle.capture.signature import Unservable, overlaps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twinkle.capture.pool import Pool

__all__ = ["Input", "Shared", "alias", "copies_of"]
_SCALED = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class Shared:
    """Memory of recordings that has the contents of a tensor of the program, for all that are given this one.

    It is an input that blocks are given one after the other, such as a mask, which is copied once for all of
    them; or a result of a recording, of which the program has a copy: the next one reads the original.

    Args:
        buffer: The memory.
        order: Of the graphs of which one has been given the memory.

    Attributes:
        buffer: Where recordings read it.
        last: Gives that tensor, as long as it is there.
    """

    __slots__ = ("__weakref__", "_order", "_passed", "_rewinds", "_version", "buffer", "last")

    def __init__(self, buffer: Tensor, order: Order = STILL) -> None:
        self.buffer = buffer
        self.last: Callable[[], Any] = _nothing
        self._order = order
        self._passed = -1
        self._rewinds = self._version = 0

    def note(self, tensor: Tensor, passed: int) -> None:
        """The buffer has the contents of a tensor."""
        self.last = weakref.ref(tensor)
        self._version = -1 if tensor.is_inference() else tensor._version
        self._passed = passed
        self._rewinds = self._order.rewinds

    def has(self, tensor: Any, passed: int) -> bool:
        """Whether the buffer has what a tensor holds now, noted in this pass over the blocks."""
        return bool(
            self._passed == passed
            and self._rewinds == self._order.rewinds
            and self.last() is tensor
            and (self._version < 0 or self._version == tensor._version)  # of inference, none is counted
        )


class Input:
    """Where a recording reads one input.

    Args:
        tensor: Of the call that is recorded.
        pool: Of the device.
        grad: Whether gradients of inputs are wanted.

    Attributes:
        buffer: The memory.
        leaf: What the block is given in the place of the tensor.
        shared: The memory, where others read it as well.

    Raises:
        Unservable: Its places in memory are not places of their own.
    """

    __slots__ = ("_at", "_raw", "buffer", "leaf", "shared")

    def __init__(self, tensor: Tensor, pool: Pool, *, grad: bool) -> None:
        if overlaps(tensor):
            raise Unservable("an argument overlaps itself in memory")
        repeated = [
            size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ]
        self._at = tuple(slice(0, 1) if one else slice(None) for one in repeated) if any(repeated) else None
        wants = grad and tensor.requires_grad
        found = self.shared = pool.shared_with(tensor)
        with torch.inference_mode(False), torch.no_grad():
            if found is not None:
                self.buffer = found.buffer
            else:
                self.buffer = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
                )
                if not wants:
                    self.shared = pool.share(tensor, self.buffer)
            # Written to with no new version: to autograd, what a forward kept is what a backward may read.
            self._raw = self.buffer.data
            if found is None:
                self.copy(tensor)
            self.leaf = self.buffer.detach().requires_grad_() if wants else self.buffer

    def copy(self, tensor: Tensor) -> None:
        """Copy the contents of a tensor in."""
        if self._at is None:
            self._raw.copy_(tensor)
        else:
            self._raw[self._at].copy_(tensor[self._at])


def alias(tensor: Tensor) -> Tensor:
    """The memory of a tensor, as another that counts what is written to it for itself, in any mode."""
    with torch.inference_mode(False), torch.no_grad():
        made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return made.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def copies_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors without gradients, those of one floating dtype in one launch."""
    made: dict[int, Tensor] = {}
    by_dtype: dict[torch.dtype, list[int]] = {}
    for at, one in enumerate(tensors):
        by_dtype.setdefault(one.dtype, []).append(at)
    for dtype, places in by_dtype.items():
        group = [tensors[at] for at in places]
        copies = torch._foreach_mul(group, 1.0) if dtype in _SCALED else [*map(Tensor.clone, group)]
        made.update(zip(places, copies, strict=True))
    return [*map(made.__getitem__, range(len(tensors)))]


def _nothing() -> None:
    return None
