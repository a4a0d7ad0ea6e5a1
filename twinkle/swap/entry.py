"""One candidate in one place, and the moments it is chosen for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from twinkle.devices import torch_type
from twinkle.modes import rank
from twinkle.swap.call_kind import ANY

if TYPE_CHECKING:
    from twinkle.swap.call_kind import DtypeKey
    from twinkle.swap.candidate import BaseCandidate

__all__ = ["Entry", "Leaf", "Moment", "Split", "grow"]


class Moment:
    """When a call happens: on which device, in training, under a compiler, with gradients recorded.

    Attributes:
        kind: What it computes with (``twinkle.swap.call_kind``).
    """

    __slots__ = ("compiling", "device", "grad", "kind", "training")

    def __init__(
        self, device: str | None, *, training: bool, compiling: bool, grad: bool, kind: DtypeKey = ANY
    ) -> None:
        self.device = device
        self.training = training
        self.compiling = compiling
        self.grad = grad
        self.kind = kind


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

    def __init__(self, candidate: BaseCandidate, index: int) -> None:
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
        if self.candidate.rejected is not None or self.device not in (None, moment.device):
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

    def is_live(self, moment: Moment) -> bool:
        """It ran, and nothing is left to prove for calls like that one."""
        return self.state == "live" and not self.candidate.proofs.owed(moment.kind, grad=moment.grad)

    def kinds(self, *, grad: bool) -> frozenset[DtypeKey] | None:
        """The kinds of calls, with or without gradients, that it takes without further ado; None for all."""
        return self.candidate.proofs.trusted(grad=grad) if self.state == "live" else frozenset()

    @property
    def minds_gradients(self) -> bool:
        """Whether it may take calls without gradients and not those with."""
        return self.has_backward is False or self.kinds(grad=False) != self.kinds(grad=True)


class Leaf:
    """The end of the questions: an entry takes the call.

    Attributes:
        kinds: The kinds of calls that go straight to the kernel; None for all.
    """

    __slots__ = ("entry", "kinds")

    def __init__(self, entry: Entry, kinds: frozenset[DtypeKey] | None) -> None:
        self.entry = entry
        self.kinds = kinds

    @property
    def live(self) -> bool:
        """It takes every call."""
        return self.kinds is None


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
        return None if entry is None else Leaf(entry, entry.kinds(grad=moment.grad))
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
        return a.entry is b.entry and a.kinds == b.kinds
    return a is b
