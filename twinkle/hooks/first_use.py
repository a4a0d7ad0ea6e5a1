"""Watch for the first use of a class: what stands as its ``forward`` is put back, and whoever waits is told.

A class is put into a program long before it is run, if it ever is, and reading its code takes milliseconds.
Until then a descriptor stands in the place of its ``forward``. The first read of it, by a call, by
``inspect``, a compiler or TorchScript, puts the function back, has the callback look at the class, and gives
what stands there by then. Nobody but ``vars(cls)`` sees the descriptor, and pickling it pickles the function.

Neither torch nor transformers is imported by this module.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

from twinkle import forks
from twinkle.hooks import guard
from twinkle.hooks.construction import hidden
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FirstUses", "first_uses", "standing", "watch_first_use"]


class FirstUses:
    """The classes in which a descriptor stands."""

    def __init__(self) -> None:
        self.lock = forks.lock()
        self.owners: WeakSet[type] = WeakSet()
        self._stop: Callable[[], object] | None = None

    def tell_all(self, *_: object) -> None:
        """Tell of every class now."""
        for owner in list(self.owners):
            _unwrapped(owner)

    def before_compiling(self, callback: Any) -> None:
        """Tell of every class before a graph is traced: dynamo sees what stands in a class.

        Args:
            callback: The module ``torch._dynamo.callback``.
        """
        if self._stop is None:
            callback.on_compile_start(self.tell_all)
            self._stop = partial(callback.callback_handler.remove_start_callback, self.tell_all)
            frames: Any = sys.modules["torch"]._C._dynamo.eval_frame
            with contextlib.suppress(AttributeError):  # torch 2.6: a read may be compiled by itself
                skip = frames._FrameAction.SKIP
                strategy = frames._FrameExecStrategy(skip, skip)
                frames.set_code_exec_strategy(_FirstUse.__get__.__code__, strategy)

    def close(self) -> None:
        """Watch no more: every class gets its own back, and nobody is told."""
        stop, self._stop = self._stop, None
        if stop is not None:
            with contextlib.suppress(ValueError):  # somebody has cleared them all
                stop()
        for owner in list(self.owners):
            _take_out(owner)


def first_uses() -> FirstUses:
    """Those of this process."""
    return runtime.of(FirstUses)


def watch_first_use(
    cls: type, callback: Callable[[type], object], *, owner: str = "", strict: bool = False
) -> bool:
    """Call ``callback(cls)`` when the ``forward`` of a class is first read, from it or from an instance.

    Args:
        cls: Any class with a ``forward`` that a class in its line defines.
        callback: Called in the thread that reads, before it is given what stands there by then.
        owner: Who asks, for messages.
        strict: Let what the callback raises leave the read, instead of a warning.

    Returns:
        Whether it is watched: only a plain function is.
    """
    home = next((base for base in cls.__mro__ if "forward" in vars(base)), None)
    if home is None:
        return False
    state = first_uses()
    with state.lock:
        waiting = vars(home)["forward"]
        if type(waiting) is not _FirstUse:
            if type(waiting) is not FunctionType:
                return False
            original, waiting = waiting, _FirstUse()
            _FirstUse.home.__set__(waiting, ref(home))  # type: ignore[attr-defined]
            _FirstUse.original.__set__(waiting, original)  # type: ignore[attr-defined]
            _FirstUse.waiting.__set__(waiting, [])  # type: ignore[attr-defined]
            type.__setattr__(home, "forward", waiting)
            state.owners.add(home)
        _waiting(waiting).append((ref(cls), callback, owner, strict))
    return True


def standing(cls: type) -> Any:
    """The ``forward`` of a class, or None; what waits for its first use goes on waiting."""
    found = next((vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base)), None)
    return _original(found) if type(found) is _FirstUse else found


class _FirstUse:
    """What stands as ``forward`` until somebody reads it."""

    __slots__ = ("home", "original", "waiting")

    @hidden
    def __get__(self, instance: object, kind: type | None = None) -> Any:
        home = _home(self)()
        if home is not None:
            _unwrapped(home)
            now: Any = vars(home).get("forward", self)
        if home is None or type(now) is _FirstUse:
            now = _original(self)
        return now.__get__(instance, kind)

    def __getattr__(self, name: str) -> Any:
        return getattr(_original(self), name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return operator.itemgetter(0), ((_original(self),),)


_home: Callable[[_FirstUse], ref[type]] = _FirstUse.home.__get__  # type: ignore[attr-defined]
_original: Callable[[_FirstUse], Any] = _FirstUse.original.__get__  # type: ignore[attr-defined]
_waiting: Callable[[_FirstUse], list[Any]] = _FirstUse.waiting.__get__  # type: ignore[attr-defined]


def _take_out(owner: type) -> list[Any]:
    """Put the function back, if the descriptor still stands there; who waited for that."""
    state = first_uses()
    with state.lock:
        state.owners.discard(owner)
        waiting = vars(owner).get("forward")
        if type(waiting) is not _FirstUse:
            return []
        type.__setattr__(owner, "forward", _original(waiting))
        return _waiting(waiting)


def _unwrapped(owner: type) -> None:
    """Put the function back, and tell who waited."""
    for known, callback, who, strict in _take_out(owner):
        cls = known()
        if cls is not None:
            _tell(cls, callback, who, strict)


def _tell(cls: type, callback: Callable[[type], object], owner: str, strict: bool) -> None:
    try:
        callback(cls)
    except Exception as error:
        subject = f"{cls.__module__}:{cls.__qualname__}"
        guard.failed(error, owner=owner, subject=subject, strict=strict)
