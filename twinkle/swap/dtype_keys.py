"""The dtype key of a call, and the keys that a kernel is proven for.

A kernel that was compared with its original in one dtype is compared again in another, and again under
autocast.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeAlias

import torch

from twinkle.swap.tensors import constant

__all__ = ["ANY", "MOST_TRIES", "DtypeKey", "Proofs", "autocasting", "describe", "dtype_key", "dtype_key_of"]

DtypeKey: TypeAlias = "tuple[torch.dtype | None, torch.dtype | None]"
"""The dtype of a call's first tensor, and that of autocast where it is on."""

ANY: DtypeKey = (None, None)
"""The key of a call without a tensor, or with a stand-in for one (``torch.fx``)."""

MOST_TRIES = 3
"""Calls with one key whose comparison may fail to be made before no more are tried."""


def dtype_key_of(value: Any) -> DtypeKey:
    """The key of a call whose first tensor is ``value``; ``ANY`` where that is no tensor."""
    return dtype_key(value.dtype, value.device.type) if isinstance(value, torch.Tensor) else ANY


def dtype_key(dtype: torch.dtype | None, device: str | None) -> DtypeKey:
    """The key of a call made now, from the dtype and the device type of its first tensor."""
    if dtype is None:
        return ANY
    on = device is not None and autocasting() and torch.is_autocast_enabled(device)
    return dtype, torch.get_autocast_dtype(device) if on else None


def describe(key: DtypeKey) -> str:
    """The key in words, for the report."""
    dtype, autocast = (str(part).removeprefix("torch.") for part in key)
    return dtype if key[1] is None else f"{dtype} under autocast to {autocast}"


_any = torch._C._is_any_autocast_enabled


@constant
def autocasting() -> bool:
    """Whether autocast is on for any device; a compiler keeps the answer, which its guards cover."""
    return bool(_any())


class Proofs:
    """How many comparisons a kernel has passed for each dtype key, and whether more are pending.

    Args:
        number: Comparisons to pass for each key; with 0 the kernel is trusted without any.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._passed: Counter[DtypeKey] = Counter()
        self._with_gradients: set[DtypeKey] = set()
        self._failed: Counter[DtypeKey] = Counter()

    def pending(self, key: DtypeKey, *, grad: bool) -> bool:
        """Whether a call with that key, with or without gradients, has to be compared first."""
        if key == ANY:
            return self.proven_keys(grad=grad) == frozenset()
        return self._passed[key] < self.number or (
            grad and self.number > 0 and key not in self._with_gradients
        )

    def record_pass(self, key: DtypeKey, *, grad: bool) -> None:
        """Count a comparison that the kernel passed."""
        self._passed[key] += 1
        del self._failed[key]
        if grad:
            self._with_gradients.add(key)

    def record_failure(self, key: DtypeKey) -> int:
        """Count a comparison that could not be made; returns how many there are since one was passed."""
        self._failed[key] += 1
        return self._failed[key]

    def given_up(self, key: DtypeKey) -> bool:
        """Whether no more comparisons are tried for calls with that key."""
        return self._failed[key] >= MOST_TRIES

    def passed(self, key: DtypeKey, *, grad: bool) -> bool:
        """Whether the kernel passed a comparison for calls with that key, though more may be pending."""
        return key in (self._with_gradients if grad else self._passed)

    @property
    def any_passed(self) -> bool:
        """Whether the kernel passed a comparison for any key."""
        return bool(self._passed)

    def proven_keys(self, *, grad: bool) -> frozenset[DtypeKey] | None:
        """The keys that need no further comparison; None where no call ever needs one."""
        if not self.number:
            return None
        proven = {key for key, count in self._passed.items() if count >= self.number}
        return frozenset(proven & self._with_gradients if grad else proven)
