"""One candidate in one place, and the decision tree that picks a candidate for a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twinkle.devices import torch_type
from twinkle.match.reads import Guard
from twinkle.modes import rank
from twinkle.swap.dtype_keys import ANY
from twinkle.swap.watch import Watch
from twinkle.swap.ways import Ways, is_timed

if TYPE_CHECKING:
    from collections.abc import Callable

    from twinkle.swap.candidate import BaseCandidate
    from twinkle.swap.dtype_keys import DtypeKey
    from twinkle.swap.habits import Habits

__all__ = ["Entry", "Leaf", "Moment", "Split", "grow", "is_checked"]


class Moment:
    """The circumstances of a call, which decide on the kernel.

    Attributes:
        device: What ``tensor.device.type`` says of the first tensor; None without a tensor.
        training: The layer is in training mode, or gradients are recorded for a function.
        compiling: ``torch.compile`` is tracing.
        grad: Gradients are recorded.
        dtype_key: See :mod:`twinkle.swap.dtype_keys`.
    """

    __slots__ = ("compiling", "device", "dtype_key", "grad", "training")

    def __init__(
        self, device: str | None, *, training: bool, compiling: bool, grad: bool, dtype_key: DtypeKey = ANY
    ) -> None:
        self.device = device
        self.training = training
        self.compiling = compiling
        self.grad = grad
        self.dtype_key = dtype_key


class Entry:
    """One candidate in one place.

    Args:
        candidate: The candidate.
        index: Its number there.
        target: The class of the layers that it is for; None for a function.

    Attributes:
        state: ``new`` (not loaded), ``ready`` (loaded and checked, never run), ``live`` (ran once).
        function: What to call, once loaded.
        guard: What the kernel rests on, which each call asks first; None for nothing. One in the place of a
            class's forward rests on that one at least: whoever gives the class another one later means it.
        guard_failed: Some call found it otherwise.
        habits: What was seen of the kernel at its first run; None for one that is not checked.
        unsettled: How often nobody could say whether a result is right in form.
        watch: Looks for NaN in results now and then; None where that is not asked for.
        ways: Which way calls go by their size; None where all go to the kernel.
    """

    __slots__ = (
        "can_torch_compile",
        "candidate",
        "device",
        "function",
        "guard",
        "guard_failed",
        "habits",
        "has_backward",
        "index",
        "mode",
        "state",
        "unsettled",
        "watch",
        "ways",
    )

    def __init__(self, candidate: BaseCandidate, index: int, target: type | None = None) -> None:
        self.candidate = candidate
        self.index = index
        self.mode = candidate.mode
        self.device = torch_type(candidate.device) if candidate.device else None
        self.state = "new"
        self.function: Callable[..., Any] | None = None
        self.can_torch_compile: bool | None = None
        self.has_backward: bool | None = None
        guard: Guard | None = getattr(candidate.kernel.source, "guard", None)
        if guard is None and target is not None:
            guard = Guard(())
        self.guard = None if guard is None else guard.of(target)
        self.guard_failed = False
        self.habits: Habits | None = None
        self.unsettled = 0
        self.watch = Watch(candidate.watch) if candidate.watch else None
        self.ways = Ways() if is_timed(candidate) else None

    def suits(self, moment: Moment) -> tuple[int, int, int] | None:
        """How well the candidate suits the moment: smaller first, ``None`` never."""
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
        """Whether the kernel ran before, and no comparison is pending for calls like this one."""
        return self.state == "live" and not self.is_pending(moment)

    def is_pending(self, moment: Moment) -> bool:
        """Whether the kernel has to be compared with the original before calls like this one."""
        return self.candidate.proofs.pending(moment.dtype_key, grad=moment.grad)

    def dtype_keys(self, *, grad: bool) -> frozenset[DtypeKey] | None:
        """The keys of the calls, with or without gradients, that go straight to the kernel; None for all."""
        return self.candidate.proofs.proven_keys(grad=grad) if self.state == "live" else frozenset()

    @property
    def minds_gradients(self) -> bool:
        """Whether calls without gradients may go to the kernel where those with gradients do not."""
        return self.has_backward is False or self.dtype_keys(grad=False) != self.dtype_keys(grad=True)


def is_checked(candidate: BaseCandidate) -> bool:
    """Whether a kernel's results are looked at: not those of Twinkle's own, which their launchers make."""
    return candidate.kernel.source.kind != "embedded"


class Leaf:
    """A leaf of the decision tree: the entry that takes the call.

    Attributes:
        dtype_keys: The keys of the calls that go straight to the kernel; None for all.
    """

    __slots__ = ("dtype_keys", "entry")

    def __init__(self, entry: Entry, dtype_keys: frozenset[DtypeKey] | None) -> None:
        self.entry = entry
        self.dtype_keys = dtype_keys

    @property
    def live(self) -> bool:
        """Whether every call goes straight to the kernel."""
        return self.dtype_keys is None


class Split:
    """An inner node of the decision tree: one attribute of the moment, and a subtree for each value."""

    __slots__ = ("branches", "name")

    def __init__(self, name: str, branches: list[tuple[Any, Split | Leaf | None]]) -> None:
        self.name = name
        self.branches = branches


def grow(choose: Callable[[Moment], Entry | None], attributes: list[tuple[str, Any]]) -> Split | Leaf | None:
    """Build the smallest decision tree that chooses as ``choose`` does.

    Args:
        choose: Gives the entry for a moment, or ``None`` for the original.
        attributes: Names of attributes of a moment, each with its possible values. A node stands in the
            tree only where the choice depends on its attribute.

    Returns:
        The root, or None where the original takes every call.
    """
    return _grow(choose, attributes, {"device": None, "grad": False})


def _grow(
    choose: Callable[[Moment], Entry | None], attributes: list[tuple[str, Any]], known: dict[str, Any]
) -> Split | Leaf | None:
    if not attributes:
        moment = Moment(**known)
        entry = choose(moment)
        return None if entry is None else Leaf(entry, entry.dtype_keys(grad=moment.grad))
    (name, values), rest = attributes[0], attributes[1:]
    branches = [(value, _grow(choose, rest, {**known, name: value})) for value in values]
    if all(_same(branch, branches[0][1]) for _, branch in branches):
        return branches[0][1]
    return Split(name, branches)


def _same(a: Split | Leaf | None, b: Split | Leaf | None) -> bool:
    if isinstance(a, Split) and isinstance(b, Split):
        return a.name == b.name and all(
            x[0] == y[0] and _same(x[1], y[1]) for x, y in zip(a.branches, b.branches, strict=True)
        )
    if isinstance(a, Leaf) and isinstance(b, Leaf):
        return a.entry is b.entry and a.dtype_keys == b.dtype_keys
    return a is b
