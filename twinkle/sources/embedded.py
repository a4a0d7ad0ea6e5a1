"""The embedded kernels: made for the form and the attribute names that a target was recognised with."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from twinkle.errors import SourceError
from twinkle.ops.variants import ROOMS
from twinkle.sources.specialised import SpecialisedSource

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from twinkle.records import Source

__all__ = ["EmbeddedFunction", "EmbeddedLayer"]


def _described(op: str, form: Any, room: str) -> str:
    return f"embedded {op} ({form.name}), {ROOMS[room]}"


class _Room:
    """The module of an op that holds an implementation, registered nowhere."""

    kind = "embedded"

    def __init__(self, op: str, room: str, maker: str) -> None:
        self.op = op
        self.room = room
        self.maker = maker

    def describe(self) -> str:
        """The op and what computes it."""
        return f"embedded {self.op}, {ROOMS[self.room]}"

    def load(self) -> object:
        """What makes its kernels, under the name that it has in a registered class.

        Raises:
            SourceError: The module cannot be imported.
        """
        try:
            module = import_module(f"twinkle.ops.{self.op}.{self.room}")
        except ImportError as error:
            raise SourceError(f"the embedded {self.op} cannot be imported", found=str(error)) from error
        return SimpleNamespace(for_form=getattr(module, self.maker))


class EmbeddedLayer(SpecialisedSource):
    """A layer class for a form of an op.

    Args:
        op: The folder under ``twinkle.ops``.
        form: The form that was recognised (``twinkle.ops.<op>.reference``).
        facts: From each argument of the definition to the attribute, the parameter or the number it is.
        room: The module of the op's folder: ``layer`` or ``cpu`` (``twinkle.ops.variants``).
        source: As the document of the pack registers it; by default that module itself.
    """

    kind = "embedded"
    facts: dict[str, Any]

    def __init__(
        self,
        op: str,
        form: Any,
        facts: Mapping[str, Any],
        room: str = "layer",
        source: Source | None = None,
    ) -> None:
        super().__init__(source or _Room(op, room, "layer_class"), op, form, dict(facts))
        self.room = room

    def describe(self) -> str:
        """The op, its form and what computes it."""
        return _described(self.op, self.form, self.room)


class EmbeddedFunction(SpecialisedSource):
    """A function for a form of an op, with the arguments of the one it replaces.

    Args:
        op: The folder under ``twinkle.ops``.
        form: The form that was recognised.
        facts: As for :class:`EmbeddedLayer`.
        original: The function that is replaced.
        room: As for :class:`EmbeddedLayer`.
        source: As for :class:`EmbeddedLayer`.
    """

    kind = "embedded"
    facts: dict[str, Any]

    def __init__(
        self,
        op: str,
        form: Any,
        facts: Mapping[str, Any],
        original: Callable[..., Any],
        room: str = "layer",
        source: Source | None = None,
    ) -> None:
        super().__init__(source or _Room(op, room, "function_for"), op, form, dict(facts), original)
        self.room = room

    def describe(self) -> str:
        """The op, its form and what computes it."""
        return _described(self.op, self.form, self.room)
