"""The slot of a module for another call than its own, and what Twinkle puts there.

It is ``_compiled_call_impl``, which ``nn.Module.compile()`` uses: ``nn.Module.__call__`` asks for it before
hooks, ``forward`` and all else, ``__getstate__`` leaves it out, and compilers pass over it.
"""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING, Any

from twinkle.swap.front import LEFT_ALONE

if TYPE_CHECKING:
    from torch import nn

__all__ = ["NAME", "Slot", "disown", "empty", "fill", "is_left", "leave", "slot_of"]

NAME = "_compiled_call_impl"
"""The attribute of the slot, which is None in the class."""
_LEFT = "_tw_call"
"""The attribute of a module whose calls stay as they are; its value means nothing in another process."""


class Slot:
    """A callable that stands in the slot of one module: the base of those that replay.

    It belongs to that module and to this process. A copy or a pickle of it is None, for whoever copies or
    pickles a whole ``__dict__``: the copy is called as it is.
    """

    __slots__ = ()

    @property
    def is_of_trunk(self) -> bool:
        """Whether the module is one that calls blocks, which have slots of their own."""
        return False

    def close(self) -> None:
        """Give back what it holds: it was taken out of its module."""

    def __copy__(self) -> None:
        return None

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return NoneType, ()


def slot_of(module: nn.Module) -> Slot | None:
    """What Twinkle has put there; None for nothing, or a compiled call of the program's."""
    found = module.__dict__.get(NAME)
    return found if isinstance(found, Slot) else None


def fill(module: nn.Module, call: Slot) -> None:
    """Put a callable into the slot of a module, past any ``__setattr__`` of its class."""
    module.__dict__.pop(_LEFT, None)
    module.__dict__[NAME] = call


def empty(module: nn.Module) -> bool:
    """Take what Twinkle has put there out, and close it; whether there was anything."""
    call = slot_of(module)
    if call is None:
        return False
    del module.__dict__[NAME]
    call.close()
    return True


def disown(module: nn.Module) -> None:
    """Take out of a module what stands in the slot of another, whose ``__dict__`` it was given."""
    if slot_of(module) is not None:
        del module.__dict__[NAME]


def leave(module: nn.Module) -> None:
    """Mark a module, and so the copies of it, as one whose calls stay as they are."""
    module.__dict__[_LEFT] = LEFT_ALONE


def is_left(module: nn.Module) -> bool:
    """Whether a module is marked so."""
    return bool(module.__dict__.get(_LEFT) == LEFT_ALONE)
