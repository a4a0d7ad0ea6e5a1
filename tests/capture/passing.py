"""What stands in a slot and calls its module as it is, and a machine where that is put in."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from twinkle import config
from twinkle.apply.activation import start
from twinkle.capture.slot import Slot, slot_of
from twinkle.capture.state import captured

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from twinkle.capture.state import StackRecord

__all__ = ["Passing", "Trunk", "begin", "blocks", "calls", "passing", "records"]


class Passing(Slot):
    """Calls its module as it is, and counts."""

    __slots__ = ("calls", "closed", "module", "record")

    def __init__(self, module: nn.Module, record: StackRecord) -> None:
        self.module = weakref.ref(module)
        self.record = record
        self.calls = 0
        self.closed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module()
        self.calls += 1
        self.record.replayed()
        return module._call_impl(*args, **kwargs)

    def close(self) -> None:
        self.closed = True


class Trunk(Slot):
    """Calls its module as it is."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)

    @property
    def is_of_trunk(self) -> bool:
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module()
        return module._call_impl(*args, **kwargs)


def passing(blocks: Sequence[nn.Module], record: StackRecord) -> list[Slot]:
    return [Passing(block, record) if not record.is_trunk else Trunk(block) for block in blocks]


def begin(**variables: str) -> None:
    """Open a door: constructions and pickles are watched from now on."""
    start(config.load(["auto"], {f"TWINKLE_{name}": text for name, text in variables.items()}), door="api")


def blocks(filled: list[nn.Module]) -> list[nn.Module]:
    """Those of the modules with a filled slot that are blocks."""
    return [module for module in filled if not isinstance(slot_of(module), Trunk)]


def records() -> list[StackRecord]:
    """Those of blocks."""
    return [record for record in captured().stacks if not record.is_trunk]


def calls(model: nn.Module) -> list[int]:
    """How often each filled slot was called, in order."""
    return [call.calls for call in map(slot_of, model.modules()) if isinstance(call, Passing)]
