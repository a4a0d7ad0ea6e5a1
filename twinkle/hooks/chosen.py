"""Watch for the instances of chosen classes, which are not held for it.

Beside the watches for families and for classes that are asked about: what these take back leaves the
constructors that are observed here.

Neither torch nor transformers is imported by this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from twinkle.hooks import guard
from twinkle.hooks.construction import Init, families, is_observed, put_back

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ChosenWatch"]


class ChosenWatch:
    """Calls back at the end of the construction of each instance of one of some classes.

    Args:
        callback: Called with the instance, in the constructing thread; constructions in it are not reported.
        owner: Who asks, for messages.
        strict: Let what the callback raises leave the constructor, instead of a warning.

    Attributes:
        classes: Those that were chosen.
    """

    def __init__(self, callback: Callable[[Any], object], *, owner: str, strict: bool) -> None:
        self.classes: WeakSet[type] = WeakSet()
        self._callback = callback
        self._owner = owner
        self._strict = strict

    def choose(self, cls: type) -> None:
        """Call back for instances of a class, not for those of the classes below it.

        One that is asked about at this very construction is reported at its end.
        """
        with families().lock:
            if cls in self.classes:
                return
            if self._constructed not in families().singles:
                families().singles.append(self._constructed)
            self.classes.add(cls)
            init: Any = cls.__dict__.get("__init__")
            made = _Chosen()
            if is_observed(init) and type(init) is not Init and _owner(init) is None:
                # Beneath one that gives its place back at the first construction.
                Init.function.__set__(made, _function(init))  # type: ignore[attr-defined]
                Init.owner.__set__(made, None)  # type: ignore[attr-defined]
                Init.function.__set__(init, made)  # type: ignore[attr-defined]
                return
            Init.function.__set__(made, cls.__init__ if init is None else init)  # type: ignore[attr-defined, misc]
            Init.owner.__set__(made, cls if init is None else None)  # type: ignore[attr-defined]
            type.__setattr__(cls, "__init__", made)

    def cancel(self) -> None:
        """Call back no more; the classes get their own constructors back."""
        with families().lock:
            if self._constructed in families().singles:
                families().singles.remove(self._constructed)
            while self.classes:
                cls = self.classes.pop()
                init = cls.__dict__.get("__init__")
                if type(init) is _Chosen:
                    put_back(cls, "__init__", None if _owner(init) is not None else _function(init))
                elif is_observed(init) and type(_function(init)) is _Chosen:
                    Init.function.__set__(init, _function(_function(init)))  # type: ignore[attr-defined]

    def _constructed(self, instance: object, building: list[object]) -> None:
        kind = type(instance)
        if kind not in self.classes:
            return
        try:
            self._callback(instance)
        except Exception as error:
            subject = f"{kind.__module__}:{kind.__qualname__}"
            guard.failed(error, owner=self._owner, subject=subject, strict=self._strict)


class _Chosen(Init):
    """An ``__init__`` that stays observed whatever other watches take back."""

    __slots__ = ()


_function: Callable[[Any], Any] = Init.function.__get__  # type: ignore[attr-defined]
_owner: Callable[[Any], type | None] = Init.owner.__get__  # type: ignore[attr-defined]
