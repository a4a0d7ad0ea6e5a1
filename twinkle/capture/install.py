"""Gives the blocks of a model what stands in for their calls, and takes it out again."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.jit import _recursive

from twinkle.capture.block import calls_for
from twinkle.capture.slot import NAME, disown, empty, fill, is_left, leave, slot_of
from twinkle.capture.stacks import class_of, stacks_of
from twinkle.capture.state import captured
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twinkle.capture.slot import Slot
    from twinkle.capture.state import StackRecord

    CallsFor = Callable[[Sequence[nn.Module], StackRecord], Sequence[Slot]]

__all__ = ["Installed", "install", "remove"]


class Installed:
    """What was put into models in this process.

    Attributes:
        calls_for: Makes what stands in the slots of alike blocks, or of the one that calls them, given these
            and their record; one for each block, in their order.
    """

    def __init__(self) -> None:
        self.calls_for: CallsFor = calls_for
        self._replicate: Any = None

    def prepare(self) -> None:
        """Have those parts of torch pass over the slot that read the whole ``__dict__`` of a module.

        A replica of ``DataParallel`` has that of its original, and would call it; TorchScript would compile
        what it finds.
        """
        if self._replicate is not None:
            return
        _recursive.ignored_attributes.append(NAME)
        replicate = self._replicate = nn.Module._replicate_for_data_parallel

        def replica_of(self: nn.Module) -> nn.Module:
            replica: nn.Module = replicate(self)
            disown(replica)
            return replica

        nn.Module._replicate_for_data_parallel = replica_of

    def close(self) -> None:
        """Give torch its own back; models keep what is in place."""
        if self._replicate is not None:
            nn.Module._replicate_for_data_parallel = self._replicate
            _recursive.ignored_attributes.remove(NAME)


def install(model: nn.Module, *, again: bool = False) -> list[nn.Module]:
    """Fill the slots of the blocks of a model; those that have something already keep it.

    A block that holds others which were given theirs before takes these calls over. One whose class has a way
    of its own of copying is left alone: a copy with all of its ``__dict__`` would call the original.

    Args:
        model: Any module; one that is inside a block with a full slot gets nothing.
        again: Blocks that :func:`remove` has emptied are filled as well.

    Returns:
        The blocks, and the modules that call them, whose slots were filled.
    """
    state = runtime.of(Installed)
    found = slot_of(model)
    if found is not None and not found.is_of_trunk:
        return []
    filled: list[nn.Module] = []
    stacks = stacks_of(model)
    for stack in stacks:
        blocks = [block for block in stack.blocks if _is_free(block) and (again or not is_left(block))]
        if not blocks or _copies_itself(stack.cls):
            continue
        state.prepare()
        record = captured().stack(
            class_of(model).__name__,
            stack.container,
            stack.class_name,
            len(stack.blocks),
            new=len(blocks) == len(stack.blocks),
        )
        for block, call in zip(blocks, state.calls_for(blocks, record), strict=True):
            for inner in block.modules():
                empty(inner)
            fill(block, call)
        filled += blocks
    trunks = {id(stack.trunk[1]): stack.trunk for stack in stacks if stack.trunk is not None}
    if trunks and _is_of_transformers(model):
        trunks.setdefault(id(model), ("", model))
    for path, trunk in trunks.values():
        if _takes(trunk, again=again):
            state.prepare()
            cls = class_of(trunk)
            record = captured().stack(class_of(model).__name__, path, cls.__name__, 1, is_trunk=True)
            fill(trunk, *state.calls_for([trunk], record))
            filled.append(trunk)
    return filled


def _is_of_transformers(model: nn.Module) -> bool:
    """Whether a model is one of transformers, whose forward does nothing but to compute its output."""
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    return class_of(model).__module__.startswith("transformers.")


def _is_free(block: nn.Module) -> bool:
    """Whether a block has no call yet, or that of a trunk, which it was before others stood beside it."""
    found = slot_of(block)
    return found is None or found.is_of_trunk


def _takes(trunk: nn.Module, *, again: bool) -> bool:
    """Whether a module that calls blocks gets a call of its own."""
    if trunk._compiled_call_impl is not None or _copies_itself(class_of(trunk)):
        return False
    return again or not is_left(trunk)


def _copies_itself(cls: type[nn.Module]) -> bool:
    """Whether a class has its own of what copies and pickles are made by."""
    return any(
        getattr(cls, name, None) is not getattr(nn.Module, name, None)
        for name in ("__copy__", "__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__")
    )


def remove(model: nn.Module) -> int:
    """Take all out again that Twinkle has put into the slots of a model, for good; from how many modules."""
    emptied = [module for module in model.modules() if empty(module)]
    for module in emptied:
        leave(module)
    return len(emptied)
