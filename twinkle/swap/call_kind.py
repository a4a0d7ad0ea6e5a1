"""What a call computes with: a kernel that was proven in one dtype is compared again in another."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeAlias

import torch

from twinkle.swap.tensors import constant

__all__ = ["ANY", "DtypeKey", "Proofs", "autocasting", "dtype_key", "dtype_key_of"]

DtypeKey: TypeAlias = "tuple[torch.dtype | None, torch.dtype | None]"
"""The dtype of the tensor that a call is told by, and that of autocast where it is on."""

ANY: DtypeKey = (None, None)
"""Of a call that no tensor tells of, or a stand-in for one (``torch.fx``)."""


def dtype_key_of(value: Any) -> DtypeKey:
    """The kind of a call, from its first tensor."""
    return dtype_key(value.dtype, value.device.type) if isinstance(value, torch.Tensor) else ANY


def dtype_key(dtype: torch.dtype | None, device: str | None) -> DtypeKey:
    """The kind of a call now whose first tensor has that dtype and device."""
    if dtype is None:
        return ANY
    on = device is not None and autocasting() and torch.is_autocast_enabled(device)
    return dtype, torch.get_autocast_dtype(device) if on else None


_any = torch._C._is_any_autocast_enabled


@constant
def autocasting() -> bool:
    """Whether autocast is on for any device; a compiler keeps the answer, which its guards cover."""
    return bool(_any())


class Proofs:
    """How often a kernel is still to be compared with the original, for each kind of call.

    Args:
        number: Of comparisons for each kind; with 0 it is taken as it is.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._passed: Counter[DtypeKey] = Counter()
        self._graded: set[DtypeKey] = set()

    def owed(self, kind: DtypeKey, *, grad: bool) -> bool:
        """Whether a call of that kind, with or without gradients, is to be compared first."""
        if kind == ANY:
            return self.trusted(grad=grad) == frozenset()
        return self._passed[kind] < self.number or (grad and self.number > 0 and kind not in self._graded)

    def passed(self, kind: DtypeKey, *, grad: bool) -> None:
        """It computed the same in a call of that kind."""
        self._passed[kind] += 1
        if grad:
            self._graded.add(kind)

    @property
    def any_passed(self) -> bool:
        """Whether it computed the same in some call."""
        return bool(self._passed)

    def trusted(self, *, grad: bool) -> frozenset[DtypeKey] | None:
        """The kinds of calls that need no comparison, or None where none ever does."""
        if not self.number:
            return None
        known = {kind for kind, count in self._passed.items() if count >= self.number}
        return frozenset(known & self._graded if grad else known)
