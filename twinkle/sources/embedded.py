"""The embedded kernels: made for the form and the attribute names that a target was recognised with."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from twinkle.errors import SourceError
from twinkle.ops.variants import ROOMS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["EmbeddedFunction", "EmbeddedLayer"]


class _Embedded:
    kind = "embedded"

    def __init__(self, op: str, form: Any, facts: Mapping[str, Any], room: str = "layer") -> None:
        self.op = op
        self.form = form
        self.facts = dict(facts)
        self.room = room
        self._made: Any = None

    def describe(self) -> str:
        """The op, its form and what computes it."""
        return f"embedded {self.op} ({self.form.name}), {ROOMS[self.room]}"

    def _room(self) -> Any:
        try:
            return import_module(f"twinkle.ops.{self.op}.{self.room}")
        except ImportError as error:
            raise SourceError(f"the embedded {self.op} cannot be imported", found=str(error)) from error


class EmbeddedLayer(_Embedded):
    """A layer class for a form of an op.

    Args:
        op: The folder under ``twinkle.ops``.
        form: The form that was recognised (``twinkle.ops.<op>.reference``).
        facts: From each argument of the definition to the attribute, the parameter or the number it is.
        room: The module of the op's folder: ``layer`` or ``cpu`` (``twinkle.ops.variants``).
    """

    def load(self) -> object:
        """The layer class; the same one each time.

        Raises:
            SourceError: The op cannot be imported.
        """
        if self._made is None:
            self._made = self._room().layer_class(self.form, self.facts)
        made: object = self._made
        return made


class EmbeddedFunction(_Embedded):
    """A function for a form of an op, with the arguments of the one it replaces.

    Args:
        op: The folder under ``twinkle.ops``.
        form: The form that was recognised.
        facts: As for :class:`EmbeddedLayer`.
        original: The function that is replaced.
        room: As for :class:`EmbeddedLayer`.
    """

    def __init__(
        self,
        op: str,
        form: Any,
        facts: Mapping[str, Any],
        original: Callable[..., Any],
        room: str = "layer",
    ) -> None:
        super().__init__(op, form, facts, room)
        self.original = original

    def load(self) -> object:
        """The function; the same one each time.

        Raises:
            SourceError: The op cannot be imported.
        """
        if self._made is None:
            self._made = self._room().function_for(self.form, self.facts, self.original)
        made: object = self._made
        return made
