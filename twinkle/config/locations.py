"""The places of the keys of a configuration, as messages write them: ``file:line (key)``."""

from __future__ import annotations

from twinkle.errors import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    Path = tuple[str | int, ...]

__all__ = ["Locations", "dotted", "printable"]

_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


class Locations:
    """The lines of the keys of one text.

    Args:
        name: The file, the variable or the call that the text came from.
        text: The text; without it there are no lines (a Python dict, JSON).
        offsets: Where each key path starts in ``text``.
        prefix: Keys that messages show and the text does not have (``TWINKLE_LAYERS`` holds what a
            file has under ``layers``).
    """

    __slots__ = ("name", "offsets", "prefix", "text")

    def __init__(
        self,
        name: str,
        text: str | None = None,
        offsets: Mapping[Path, int] | None = None,
        *,
        prefix: Path = (),
    ) -> None:
        self.name = printable(name)
        self.text = text
        self.offsets = offsets or {}
        self.prefix = prefix

    def line(self, path: Path) -> int | None:
        """The line of ``path``, or of its nearest known parent; ``None`` when there is no text."""
        if self.text is None:
            return None
        if path[: len(self.prefix)] == self.prefix:
            path = path[len(self.prefix) :]
        while path:
            offset = self.offsets.get(path)
            if offset is not None:
                return self.text.count("\n", 0, offset) + 1
            path = path[:-1]
        return 1

    def __call__(self, path: Path) -> str:
        """The place of a key: ``file:line (key)``."""
        line = self.line(path)
        place = self.name if line is None else f"{self.name}:{line}"
        return f"{place} ({dotted(path)})" if path else place


def dotted(path: Path) -> str:
    """A key path as TOML writes it: ``layers.MyMLP[0].target``."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
            continue
        if len(key) > 80:
            key = key[:77] + "..."
        word = key if key and _PLAIN.issuperset(key) else repr(key)
        text += f".{word}" if text else word
    return text
