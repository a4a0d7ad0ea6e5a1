"""Which way the calls of one place go, by their size: the kernel where it is not slower, else the original.

The text of a dispatch function looks the way up (a dict, 0.1 us); a size that was not met yet is measured
(:mod:`twinkle.proof.speed`) at its first call.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from twinkle.ops import launch
from twinkle.ops.plain import Least, at_measured_size
from twinkle.proof.room import comparing
from twinkle.proof.speed import ORIGINAL, SMALL_TOO, Speed, speed_at_call
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from twinkle.proof.first_use import Subject
    from twinkle.swap.candidate import BaseCandidate

__all__ = ["Ways", "is_timed", "measures", "tell_speed"]

_FOR_MEMORY = frozenset({"causal_lm_loss"})
"""Ops whose kernels are there for the memory that they save."""
_MOST_TRIES = 16
"""Calls of one size that could not be measured before no more are tried."""


def is_timed(candidate: BaseCandidate) -> bool:
    """Whether a kernel runs only where it is not slower than the original.

    A user's own kernel runs because the user says so. One whose forward is the program's own in parts decides
    about each of these.
    """
    source = candidate.kernel.source
    op = getattr(source, "op", None)
    if candidate.kernel.chosen_by != "twinkle" or source.kind != "embedded" or op is None:
        return False
    if op in _FOR_MEMORY or getattr(source, "guarded", False) or getattr(source, "wraps", False):
        return False
    return candidate.proofs.number > 0 and measures(source)


def measures(source: Any) -> bool:
    """Whether the speed of an embedded kernel decides; in Triton's interpreter it says nothing."""
    interpreted = getattr(source, "backend", None) == "triton_backend" and "cpu" in launch.DEVICE_TYPES
    return runtime.options.sizes == "auto" and not interpreted


class Ways:
    """The ways of the calls of one kernel in one place.

    Attributes:
        known: By the key of a call (its dtype, its size and whether gradients are recorded, see
            :mod:`twinkle.swap.dispatch_code`) the function that takes it, or False for the original.
        small: The number of elements below which calls go to the original before anything else is asked,
            without gradients and with, and their dtype. A kernel that did not pay at a size is not measured
            at smaller ones.
    """

    def __init__(self) -> None:
        self.known: dict[Any, Callable[..., Any] | bool] = {}
        self.small: list[Any] = [0, 0, None]
        self._tries: Counter[Any] = Counter()

    def decide(
        self,
        candidate: BaseCandidate,
        subject: Subject,
        key: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Callable[..., Any] | bool:
        """Find the way for a key that has none yet, by the call at hand; see ``known``.

        A call that cannot be measured goes to the kernel from the size on that is in its code.
        """
        if comparing():
            # A layer within one that is compared or measured: its turn is when the program calls it.
            return subject.kernel
        speed = speed_at_call(subject, args, kwargs, grad=key[-1])
        if isinstance(speed, Speed):
            way = self._way(speed, subject.kernel)
            candidate.record_speed(speed)
        else:
            candidate.record_unmeasured()
            self._tries[key] += 1
            way = False if _is_too_small(subject.kernel, *key[1:]) else subject.kernel
            if not speed.for_good and self._tries[key] < _MOST_TRIES:
                return way
        # Of two threads that measured at once, both go the way of the first.
        way = self.known.setdefault(key, way)
        if way is False:
            self._note_small(*key)
        return way

    def _note_small(self, dtype: Any, size: int, grad: bool) -> None:
        """Leave smaller sizes to the original as well, unless the kernel was faster at one of them."""
        if self.small[2] is None and isinstance(dtype, torch.dtype):
            self.small[2] = dtype
        alike = (way for (_, smaller, same), way in self.known.items() if same is grad and smaller <= size)
        if self.small[2] is dtype and not any(alike):
            self.small[grad] = max(self.small[grad], 1 << size)

    @staticmethod
    def _way(speed: Speed, kernel: Callable[..., Any]) -> Callable[..., Any] | bool:
        if speed.way == ORIGINAL:
            return False
        return at_measured_size(kernel)[0] if speed.way == SMALL_TOO else kernel


def _is_too_small(kernel: Callable[..., Any], size: int, grad: bool) -> bool:
    """Whether a kernel would come to its definition for calls of a size (:func:`size_of`)."""
    least = getattr(kernel, "least", None)
    return isinstance(least, Least) and (1 << size) <= (
        least.elements if grad else max(least.elements, least.without_gradients)
    )


def tell_speed(
    candidate: BaseCandidate, subject: Subject, args: Sequence[Any], kwargs: Mapping[str, Any], *, grad: bool
) -> None:
    """Measure a user's own kernel once, for the report; it runs whatever comes out."""
    if not candidate.binding.speeds and runtime.options.sizes == "auto":
        speed = speed_at_call(subject, args, kwargs, grad=grad)
        if isinstance(speed, Speed):
            candidate.record_speed(speed)
