"""What stands in a class in the place of a method while modules of it are marked, besides ``forward``.

A marked module keeps its class, so two things are seen there that a generated class would see:

- ``train``, where a mode was asked for by name. It holds until the module's own mode is set, also to what it
  is already: nothing but the call tells.
- Copies by a class's own ``__deepcopy__``, ``__copy__``, ``__reduce__`` or ``__getstate__``: they may leave
  the mark behind. A class without one gets none: ``copy`` takes all of ``__dict__`` along.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn

from twinkle.swap.code import forwarding_function
from twinkle.swap.copies import Maker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Marked", "StandIn", "can_follow_mode", "put_stand_ins", "take_stand_ins"]

_STATE = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


class Marked:
    """What a stand-in asks of a dispatch; see :class:`twinkle.swap.generated.LayerDispatch`."""

    target: type[nn.Module]
    pin: Any

    def unpin(self, module: nn.Module) -> None:
        """Let a module follow its own mode."""
        raise NotImplementedError

    def dress(self, twin: object) -> Any:
        """Give a copy the mark; returns it."""
        raise NotImplementedError


class StandIn:
    """The function that stands as a method in one class.

    Args:
        core: The class.
        name: The method.
        dispatch_of: Gives the dispatch that a module is marked with, or None.

    Attributes:
        function: The function. What stood there before is its ``__wrapped__``.
    """

    def __init__(self, core: Any, name: str, dispatch_of: Callable[[Any], Marked | None]) -> None:
        self.core = core
        self.name = name
        self._own = vars(core).get(name)
        self._dispatch_of = dispatch_of
        self._users: weakref.WeakSet[Marked] = weakref.WeakSet()
        found = getattr(core, name)
        called = {"train": self._train, "__reduce_ex__": self._reduce}.get(name, self._copy)
        self.function: Any = forwarding_function(found, _Callee(called, found))
        # That of a builtin has none, and who pickles it by value would look through all modules.
        self.function.__module__ = getattr(found, "__module__", None) or object.__module__
        self.function.__dict__.pop("__signature__", None)
        self.function.__dict__.update({"__wrapped__": found, "__twinkle__": self})

    def __reduce__(self) -> Any:
        return type(None), ()

    @classmethod
    def of(cls, core: type, name: str) -> StandIn | None:
        """The one that stands in a class itself, if one does."""
        function = vars(core).get(name)
        found = getattr(function, "__twinkle__", None)
        return found if isinstance(found, cls) and found.function is function else None

    def needed_by(self, user: Marked) -> None:
        """Stand in the class, until all users have let go."""
        self._users.add(user)
        if StandIn.of(self.core, self.name) is None:
            type.__setattr__(self.core, self.name, self.function)

    def let_go(self, user: Marked) -> None:
        """Leave the class if nobody else needs it."""
        self._users.discard(user)
        if self._users:
            return
        if self._own is None:
            type.__delattr__(self.core, self.name)
        else:
            type.__setattr__(self.core, self.name, self._own)

    def _standing(self, module: Any) -> Callable[..., Any]:
        """The method that would run without Twinkle, whatever the classes below have by now."""
        found: Any = getattr(super(self.core, module), self.name) if self._own is None else self._own
        return found if self._own is None else found.__get__(module)  # type: ignore[no-any-return]

    def _train(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        dispatch = self._dispatch_of(module)
        if dispatch is not None:
            dispatch.unpin(module)
        return self._standing(module)(*args, **kwargs)

    def _copy(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        twin, dispatch = self._standing(module)(*args, **kwargs), self._dispatch_of(module)
        return twin if dispatch is None or type(twin) is not type(module) else dispatch.dress(twin)

    def _reduce(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        value, dispatch = self._standing(module)(*args, **kwargs), self._dispatch_of(module)
        # Files are what they are without Twinkle: the caller of the function that stands in the class.
        copying = sys._getframe(3).f_globals.get("__name__") == "copy"
        if dispatch is None or not copying or not isinstance(value, tuple):
            return value
        make, *rest = value
        cls = type(module)
        return (Maker(make, lambda twin: dispatch.dress(twin) if type(twin) is cls else twin), *rest)


class _Callee:
    """What a stand-in calls; in a pickle of the class, which takes its functions along, the method itself.

    Args:
        called: The method of a stand-in.
        found: What stood in the class.
    """

    def __init__(self, called: Callable[..., Any], found: Callable[..., Any]) -> None:
        self.called = called
        self.found = found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.called(*args, **kwargs)

    def __reduce__(self) -> Any:
        return functools.partial, (self.found,)


def can_follow_mode(core: type) -> bool:
    """Whether the ``train`` of a class is a plain function, in whose place another one can stand."""
    return isinstance(inspect.getattr_static(core, "train", None), FunctionType)


def put_stand_ins(user: Marked, dispatch_of: Callable[[Any], Marked | None]) -> None:
    """Put what a dispatch needs in the class of its modules.

    Args:
        user: The dispatch.
        dispatch_of: Gives the dispatch that a module is marked with, or None.
    """
    for name in _needed(user):
        found = StandIn.of(user.target, name) or StandIn(user.target, name, dispatch_of)
        found.needed_by(user)


def take_stand_ins(user: Marked) -> None:
    """Take out of the class what only this dispatch needed."""
    for name in ("train", "__deepcopy__", "__copy__", "__reduce_ex__"):
        found = StandIn.of(user.target, name)
        if found is not None:
            found.let_go(user)


def _needed(user: Marked) -> Iterator[str]:
    core: Any = user.target
    if user.pin is not None:
        yield "train"
    for name in ("__deepcopy__", "__copy__"):
        if isinstance(inspect.getattr_static(core, name, None), FunctionType):
            yield name
    static = inspect.getattr_static
    if any(static(core, name, None) is not static(nn.Module, name, None) for name in _STATE):
        yield "__reduce_ex__"
