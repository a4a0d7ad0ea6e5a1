"""One candidate in one place, and the moments it is chosen for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from twinkle.devices import torch_type
from twinkle.modes import rank

if TYPE_CHECKING:
    from twinkle.swap.candidate import _Candidate

__all__ = ["Entry", "Leaf", "Moment", "Split", "grow"]


class Moment:
    """When a call happens: on which device, in training, under a compiler, with gradients recorded."""

    __slots__ = ("compiling", "device", "grad", "training")

    def __init__(self, device: str | None, *, training: bool, compiling: bool, grad: bool) -> None:
        self.device = device
        self.training = training
        self.compiling = compiling
        self.grad = grad


class Entry:
    """One candidate in one place.

    Attributes:
        state: ``new`` (not loaded), ``ready`` (loaded and checked, never run), ``live`` (ran once).
        function: What to call, once loaded.
    """

    __slots__ = (
        "can_torch_compile",
        "candidate",
        "device",
        "function",
        "has_backward",
        "index",
        "mode",
        "same_signature",
        "state",
    )

    def __init__(self, candidate: _Candidate, index: int) -> None:
        self.candidate = candidate
        self.index = index
        self.mode = candidate.mode
        self.device = torch_type(candidate.device) if candidate.device else None
        self.state = "new"
        self.function: Callable[..., Any] | None = None
        self.can_torch_compile: bool | None = None
        self.has_backward: bool | None = None
        self.same_signature = False

    def suits(self, moment: Moment) -> tuple[int, int, int] | None:
        """How well it suits the moment: smaller first, ``None`` never."""
        if self.candidate.dead is not None or self.device not in (None, moment.device):
            return None
        if self.has_backward is False and moment.grad:
            return None
        place = rank(
            self.mode,
            training=moment.training,
            compiling=moment.compiling,
            can_torch_compile=self.can_torch_compile,
        )
        return None if place is None else (self.device is None, place, self.index)

    def is_live(self, *, grad: bool) -> bool:
        """It ran, and nothing is left to prove for calls with or without gradients."""
        return self.state == "live" and not self.candidate.owes(grad=grad)

    @property
    def minds_gradients(self) -> bool:
        """Whether it may take calls without gradients and not those with."""
        return self.has_backward is False or self.is_live(grad=False) != self.is_live(grad=True)


class Leaf:
    """The end of the questions: an entry takes the call, as one that is live or not."""

    __slots__ = ("entry", "live")

    def __init__(self, entry: Entry, live: bool) -> None:
        self.entry = entry
        self.live = live


class Split:
    """A question with a branch an answer."""

    __slots__ = ("branches", "name")

    def __init__(self, name: str, branches: list[tuple[Any, Split | Leaf | None]]) -> None:
        self.name = name
        self.branches = branches


def grow(choose: Callable[[Moment], Entry | None], questions: list[tuple[str, Any]]) -> Split | Leaf | None:
    """The questions a call has to be asked, those alone on whose answers the choice depends.

    Args:
        choose: The entry for a moment, or ``None`` for the original.
        questions: Names of the attributes of a moment, each with its possible answers.
    """
    return _grow(choose, questions, {"device": None, "grad": False})


def _grow(
    choose: Callable[[Moment], Entry | None], questions: list[tuple[str, Any]], answers: dict[str, Any]
) -> Split | Leaf | None:
    if not questions:
        moment = Moment(**answers)
        entry = choose(moment)
        return None if entry is None else Leaf(entry, entry.is_live(grad=moment.grad))
    (name, values), rest = questions[0], questions[1:]
    branches = [(value, _grow(choose, rest, {**answers, name: value})) for value in values]
    if all(_same(branch, branches[0][1]) for _, branch in branches):
        return branches[0][1]
    return Split(name, branches)


def _same(a: Split | Leaf | None, b: Split | Leaf | None) -> bool:
    if isinstance(a, Split) and isinstance(b, Split):
        return a.name == b.name and all(
            x[0] == y[0] and _same(x[1], y[1]) for x, y in zip(a.branches, b.branches, strict=True)
        )
    if isinstance(a, Leaf) and isinstance(b, Leaf):
        return a.entry is b.entry and a.live == b.live
    return a is b
