"""What was captured, how often it was replayed, and how often and why not: the record of each stack.

Standard library only: the report reads it.
"""

from __future__ import annotations

from collections import Counter

from twinkle import forks
from twinkle.runtime import runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Captured", "Signature", "StackRecord", "captured"]


class Signature:
    """One kind of call that was captured.

    Attributes:
        shapes: Its inputs in words, such as ``bfloat16[4, 512, 1024]``.
        mode: ``train`` for a call with gradients, ``inference`` for one without.
        blocks: How many blocks hold a capture of it.
        most: How many did at the same time.
    """

    __slots__ = ("blocks", "mode", "most", "shapes")

    def __init__(self, shapes: str, mode: str) -> None:
        self.shapes = shapes
        self.mode = mode
        self.blocks = 0
        self.most = 0


class StackRecord:
    """What became of the calls of alike blocks: those of one class in one container of one class of models.

    Models of the same class with as many blocks share a record. Counts that threads write at the same time
    may miss a call.

    What calls them all, their trunk, has a record of its own.

    Attributes:
        is_trunk: It is of a module that calls blocks: ``blocks`` is one, ``container`` its own name.
        model: The name of the model's class.
        container: The qualified name of the container in the model, such as ``model.layers``.
        block: The name of the blocks' class.
        blocks: How many blocks of that class a model has there.
        models: How many such models there were.
        replays: Calls that were replayed, forwards only.
        calls: Calls that ran as they are, by the reason in words.
        held: Bytes that captures of these blocks hold now.
        most_held: The most bytes they have held.
        signatures: What was captured, by shapes and mode.
    """

    __slots__ = (
        "block",
        "blocks",
        "calls",
        "container",
        "held",
        "is_trunk",
        "lock",
        "model",
        "models",
        "most_held",
        "replays",
        "signatures",
    )

    def __init__(
        self, model: str, container: str, block: str, blocks: int, *, is_trunk: bool = False
    ) -> None:
        self.is_trunk = is_trunk
        self.model = model
        self.container = container
        self.block = block
        self.blocks = blocks
        self.models = 0
        self.replays = 0
        self.calls: Counter[str] = Counter()
        self.held = 0
        self.most_held = 0
        self.signatures: dict[tuple[str, str], Signature] = {}
        self.lock = forks.lock()

    def replayed(self) -> None:
        """One call was replayed. A caller in a hurry writes ``record.replays += 1`` itself."""
        self.replays += 1

    def eager(self, reason: str) -> None:
        """One call ran as it is.

        Args:
            reason: Why, in words that are the same for calls of the same kind: they are counted by it.
        """
        self.calls[reason] += 1

    def captures(self, shapes: str, mode: str) -> None:
        """One block has a capture more.

        Args:
            shapes: The inputs of the call, in words.
            mode: ``train`` or ``inference``.
        """
        with self.lock:
            key = (shapes, mode)
            signature = self.signatures.get(key)
            if signature is None:
                signature = self.signatures[key] = Signature(shapes, mode)
            signature.blocks += 1
            signature.most = max(signature.most, signature.blocks)

    def drops(self, shapes: str, mode: str) -> None:
        """One block has a capture fewer: it was given up, or its model has gone."""
        with self.lock:
            self.signatures[shapes, mode].blocks -= 1

    def holds(self, change: int) -> None:
        """Captures hold so many bytes more, or fewer where it is negative."""
        with self.lock:
            self.held += change
            self.most_held = max(self.most_held, self.held)

    def as_data(self) -> dict[str, Any]:
        """The record as the report has it: JSON-ready, the most frequent reason first."""
        with self.lock:
            signatures = [
                {"shapes": one.shapes, "mode": one.mode, "blocks": one.blocks, "most_blocks": one.most}
                for one in self.signatures.values()
            ]
        return {
            "model": self.model,
            "container": self.container,
            "block": self.block,
            "blocks": self.blocks,
            "is_trunk": self.is_trunk,
            "models": self.models,
            "signatures": signatures,
            "replays": self.replays,
            "eager": dict(sorted(dict(self.calls).items(), key=lambda item: -item[1])),
            "bytes": self.held,
            "most_bytes": self.most_held,
        }


class Captured:
    """The records of this process."""

    def __init__(self) -> None:
        self._lock = forks.lock()
        self._records: dict[tuple[str, str, str, int, bool], StackRecord] = {}

    def stack(
        self,
        model: str,
        container: str,
        block: str,
        blocks: int,
        *,
        new: bool = True,
        is_trunk: bool = False,
    ) -> StackRecord:
        """The record of a stack of one more model; made where there is none of such a stack.

        Args:
            model: The name of the model's class.
            container: The qualified name of the container in the model; empty for the model itself.
            block: The name of the blocks' class.
            blocks: How many blocks of that class there are in it.
            new: The model counts as one more; otherwise it has got further blocks.
            is_trunk: It is the one that calls them.
        """
        with self._lock:
            key = (model, container, block, blocks, is_trunk)
            record = self._records.get(key)
            if record is None:
                record = self._records[key] = StackRecord(*key[:4], is_trunk=is_trunk)
            record.models += new
        return record

    @property
    def stacks(self) -> list[StackRecord]:
        """The records, in the order in which their stacks were met."""
        return list(self._records.values())

    @property
    def held(self) -> int:
        """Bytes that all captures hold now."""
        return sum(record.held for record in self._records.values())


def captured() -> Captured:
    """Those of this process."""
    return runtime.of(Captured)
