"""Watch for objects that come ready-made: from a pickle, ``torch.load``, or the parent of a worker.

They have no construction. What gives them their state is ``__setstate__`` of the root of their family, or
one of their own class: a callback runs when the outermost is done. Copies within the process are no arrivals:
what ``copy`` makes has what its original has, but for what is left out of every state. Whoever has put
something there is told of copies, too.

Neither torch nor transformers is imported by this module.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from twinkle.hooks import guard
from twinkle.hooks.construction import (
    Init,
    families,
    family,
    hidden,
    hook_subclasses,
    put_back,
    unhook_subclasses,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RestoredWatch", "watch_restored"]


class RestoredWatch:
    """A callback, and the classes whose ``__setstate__`` tells it of their objects."""

    def __init__(
        self,
        root: type,
        callback: Callable[[Any], object],
        copied: Callable[[Any], object] | None,
        *,
        owner: str,
        strict: bool,
    ) -> None:
        self._root = root
        self._callback = callback
        self._copied = copied
        self._owner = owner
        self._strict = strict
        self._classes: WeakSet[type] = WeakSet()

    def begin(self) -> None:
        """Observe the root, and the classes below it that there are and that are to come.

        Not those of torch, which all go on to the root's.
        """
        with families().lock:
            hook_subclasses(self._root, self._created)
        self._observe(self._root)
        for cls in list(family(self._root)):
            self._created(cls)

    def _created(self, cls: type) -> None:
        if "__setstate__" in cls.__dict__ and cls.__module__.partition(".")[0] != "torch":
            self._observe(cls)

    def _observe(self, cls: type) -> None:
        """Call back for objects whose state is given by the ``__setstate__`` that this class defines."""
        with families().lock:
            given = cls.__dict__.get("__setstate__")
            if given is None or type(given) is _SetState:
                return
            made = _SetState()
            Init.function.__set__(made, given)  # type: ignore[attr-defined]
            Init.owner.__set__(made, None)  # type: ignore[attr-defined]
            _SetState.watch.__set__(made, self)  # type: ignore[attr-defined]
            type.__setattr__(cls, "__setstate__", made)
            self._classes.add(cls)

    def cancel(self) -> None:
        """Call back no more; the classes get their own functions back."""
        with families().lock:
            unhook_subclasses(self._root, self._created)
            while self._classes:
                cls = self._classes.pop()
                given: Any = cls.__dict__.get("__setstate__")
                if type(given) is _SetState and _watch(given) is self:
                    put_back(cls, "__setstate__", _function(given))

    def restored(self, instance: object, *, copied: bool = False) -> None:
        """Call back; unless strict, what the callback raises does not leave this method."""
        callback = self._copied if copied else self._callback
        if callback is None:
            return
        try:
            callback(instance)
        except Exception as error:
            kind = type(instance)
            subject = f"{kind.__module__}:{kind.__qualname__}"
            guard.failed(error, owner=self._owner, subject=subject, strict=self._strict)


class _SetState(Init):
    """A ``__setstate__`` that tells of the object whose state it has set."""

    __slots__ = ("watch",)

    @hidden
    def __call__(self, instance: Any, /, *arguments: Any, **keywords: Any) -> Any:
        try:
            result = _function(self).__get__(instance, type(instance))(*arguments, **keywords)
        except BaseException as error:
            # As Init does it: a bare raise adds no frame.
            if error.__traceback__ is not None:
                error.__traceback__ = error.__traceback__.tb_next
            raise
        # The last of those that call each other tells of it: only then it has all of its state.
        last: Any = type(instance).__setstate__
        inner = type(last) is _SetState and last is not self
        if not inner:
            _watch(self).restored(instance, copied=sys._getframe(1).f_globals.get("__name__") == "copy")
        return result


_function: Callable[[Init], Any] = Init.function.__get__  # type: ignore[attr-defined]
_watch: Callable[[_SetState], RestoredWatch] = _SetState.watch.__get__  # type: ignore[attr-defined]


def watch_restored(
    root: type,
    callback: Callable[[Any], object],
    *,
    copied: Callable[[Any], object] | None = None,
    owner: str = "",
    strict: bool = False,
) -> RestoredWatch:
    """Call ``callback(instance)`` when an object below ``root`` was given its state by ``__setstate__``.

    Those inside another one are reported first. One whose ``__setstate__`` a class decorator put there is not
    reported.

    Args:
        root: A class that defines ``__setstate__``.
        callback: Called in the thread that restores.
        copied: Called in its place for what ``copy`` makes; None for nobody.
        owner: Who asks, for messages.
        strict: Let what the callback raises leave ``__setstate__``, instead of a warning.
    """
    watch = RestoredWatch(root, callback, copied, owner=owner, strict=strict)
    watch.begin()
    return watch
