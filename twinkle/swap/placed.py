"""The kernels that stand in the place of functions now, and putting the originals back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from twinkle import forks
from twinkle.runtime import runtime
from twinkle.swap import aliases
from twinkle.swap.functions import Placement, take_out
from twinkle.swap.scope import dispatch_behind

if TYPE_CHECKING:
    from twinkle.swap.candidate import FunctionCandidate
    from twinkle.swap.holders import Held

__all__ = ["Placed", "PlacedAs", "Placements", "placed_as"]


class Placed:
    """A kernel in the place of a function, with the names of other modules that were rebound.

    ``implementation`` is what was chosen, below the decorators that the function has.
    """

    def __init__(
        self,
        placement: Placement,
        rebound: list[aliases.Alias | Held],
        chosen: list[FunctionCandidate],
        implementation: object,
    ) -> None:
        self.placement = placement
        self.rebound = rebound
        self.chosen = chosen
        self.implementation = implementation

    def same(self, implementation: object, chosen: list[FunctionCandidate]) -> bool:
        """Whether an implementation, or a dispatcher for these candidates, is in place already."""
        if self.placement.displaced:
            return False
        return self.implementation is implementation or (
            dispatch_behind(self.implementation) is not None and self.chosen == chosen
        )


class Placements:
    """The kernels in the place of functions in this process.

    Attributes:
        lock: Held from the look at what stands in a place until something else stands there. Never while a
            kernel is loaded: its import may wait for a thread whose import waits for this lock.
        by_target: By ``module:function``.
    """

    def __init__(self) -> None:
        self.lock = forks.lock()
        self.by_target: dict[str, Placed] = {}

    def close(self) -> None:
        """Restore every function."""
        for target in list(self.by_target):
            self.restore(target, "unapplied")

    def let_go(self, target: str) -> Any:
        """Give up a placement that someone else has replaced; returns the original it had."""
        with self.lock:
            placed = self.by_target.pop(target)
            aliases.restore(placed.rebound)
        for candidate in placed.chosen:
            candidate.binding.count(-1 - len(placed.rebound))
        return placed.placement.original

    def restore(self, target: str, reason: str) -> None:
        """Put the original back, unless someone else has replaced the function after Twinkle.

        Args:
            target: ``module:function``.
            reason: Why, in words, for the report.
        """
        with self.lock:
            placed = self.by_target.pop(target, None)
            if placed is None:
                return
            aliases.restore(placed.rebound)
            ours = take_out(placed.placement)
        for candidate in placed.chosen:
            candidate.binding.count(-1 - len(placed.rebound))
            if not ours:
                candidate.binding.set(
                    "displaced", "someone else replaced the function after Twinkle; theirs stays"
                )
            elif candidate.rejected is None:
                candidate.binding.set("reverted", reason)


class PlacedAs(NamedTuple):
    """The original and the kernels behind a function that Twinkle put in place.

    Attributes:
        original: The function that stood there.
        chosen_by_twinkle: Whether all of its kernels are Twinkle's own choice.
    """

    original: Any
    chosen_by_twinkle: bool


def placed_as(function: Any) -> PlacedAs | None:
    """The original and the kernels behind a function that Twinkle put in place; None for any other."""
    for placed in runtime.of(Placements).by_target.values():
        if placed.placement.implementation is function or placed.placement.placed is function:
            ours = all(candidate.kernel.chosen_by == "twinkle" for candidate in placed.chosen)
            return PlacedAs(placed.placement.original, ours)
    return None
