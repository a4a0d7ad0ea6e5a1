"""Watch for the first call of layers that nobody has met: those that came without their ``__init__``.

The function that stands in the class as ``forward`` (:mod:`twinkle.swap.front`) asks about an instance whose
mark means nothing. Whoever was decided about has one that does: of its kernel, or that it is left alone.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from twinkle.hooks.first_use import standing
from twinkle.runtime import runtime
from twinkle.swap.class_tree import core_of
from twinkle.swap.front import LEFT_ALONE, MARK, Front, meaning_of
from twinkle.swap.generated import dispatch_of, front_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

__all__ = [
    "ask_anew",
    "ask_no_more",
    "asking_modules",
    "asks",
    "is_decided",
    "leave_alone",
    "watch_first_calls",
]


class _Asking:
    """The fronts that ask.

    Attributes:
        passed: The classes that nothing is registered for, and whose own forward calls one that asks.
    """

    def __init__(self) -> None:
        self.fronts: WeakSet[Front] = WeakSet()
        self.passed: WeakSet[type] = WeakSet()

    def close(self) -> None:
        """Ask no more."""
        for front in list(self.fronts):
            front.ask_no_more()


def watch_first_calls(
    cls: type[nn.Module], met: Callable[[Any], bool | None], traced: Callable[[type], None]
) -> bool:
    """Ask about instances of a class that nobody has decided about as they are called.

    Args:
        cls: What it inherits its forward from asks about its own instances, too.
        met: Called in the thread of the call with an instance that is not decided about; whether it has
            got a kernel, for which the call goes again. None where nothing is registered for its class:
            then it is asked no more about that one until :func:`ask_anew`.
        traced: Called instead with its class where a compiler traces.

    Returns:
        Whether it is watched: a forward that is no plain function cannot be.
    """
    runtime.of(_Asking).passed.discard(cls)
    if asks(cls):
        return True
    front = front_for(core_of(cls)[0])
    if front is None:
        return False
    state = runtime.of(_Asking)
    front.ask(partial(_ask, front, met, state.passed), _when_traced(traced))
    state.fronts.add(front)
    return True


def asking_modules() -> list[str]:
    """The modules of the classes that ask."""
    return [front.owner.__module__ for front in list(runtime.of(_Asking).fronts)]


def ask_no_more(module: str) -> None:
    """Have the classes of a module ask no more."""
    fronts = runtime.of(_Asking).fronts
    for front in [front for front in list(fronts) if front.owner.__module__ == module]:
        front.ask_no_more()
        fronts.discard(front)


def ask_anew() -> None:
    """Ask again about the classes that nothing was registered for."""
    runtime.of(_Asking).passed.clear()


def asks(cls: type) -> bool:
    """Whether the forward of a class asks about instances that nobody has met.

    The question wakes nothing: a class that nobody has used is not looked at for it.
    """
    front = Front.behind(standing(cls))
    return front is not None and front.asks


def is_decided(module: nn.Module) -> bool:
    """Whether a module has a kernel, or is marked as one that has none."""
    if module.__dict__.get(MARK) == LEFT_ALONE:
        return True
    dispatch = dispatch_of(module)
    # Not by what a class of the same name had, before a reload put its instances into this one.
    return dispatch is not None and isinstance(module, dispatch.target)


def leave_alone(modules: Iterable[nn.Module]) -> None:
    """Ask about modules no more: those that have no kernel by now are to have none."""
    known: dict[type, bool] = {}
    for module in modules:
        cls = type(module)
        if cls not in known:
            known[cls] = asks(cls)
        if known[cls] and not is_decided(module):
            module.__dict__[MARK] = LEFT_ALONE


def _ask(front: Front, met: Callable[[Any], bool | None], passed: WeakSet[type], module: Any) -> bool:
    """Whether the call of a module is to go again, to what is its ``forward`` by now."""
    if type(module) in passed:
        return False
    if is_decided(module):  # by a mark for the forward of a subclass, which has called this one
        return False
    # Around a wrapper that the program has put there a call goes once: the kernel is for the next.
    directly = getattr(type(module), "forward", None) is front.function
    known = met(module)
    if known is None:
        passed.add(type(module))
    return bool(known) and directly


def _when_traced(traced: Callable[[type], None]) -> Callable[[type, str | None], int]:
    def when_traced(cls: type, mark: str | None) -> int:  # dynamo knows no partial for a constant
        if mark != LEFT_ALONE and meaning_of(mark) is None:
            traced(cls)
        return 0

    return when_traced
