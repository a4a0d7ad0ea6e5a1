"""Places in a model: which of its modules a registration is for, by their names.

A pattern is names of modules joined by dots. It means each module whose dotted name in the outermost model
holds these names in a row, and everything inside that module. ``*`` stands for any characters of one name,
``?`` for one, ``**`` for any number of names; ``[2]``, ``[-1]`` and ``[1:-1]`` choose among numbered modules
as they do from a list. ``Class:`` in front begins at a module of that class, ``!`` leaves out.

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

from _weakref import ref

from twinkle.errors import ConfigError, suggest
from twinkle.targets import is_pattern, pattern_regex

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

__all__ = ["EXPECTED", "Place", "PlacePattern", "Where", "parse_where"]

EXPECTED = 'a place such as "model.layers.*.mlp" or "!model.layers.[-1]", or a list of them'
_FIX = 'join the names of modules by dots, such as "model.layers.*.mlp"; ? stands for any one character'
_NAMES_SHOWN = 3


class Place:
    """One way to a module from the outermost one.

    Attributes:
        names: The names on the way; none for the outermost module.
        counts: For each name, how many numbered modules stand beside it.
        owners: The classes of the module at each depth: one more than there are names. A wrapper that has no
            name of its own here stands at the depth of what it wraps.
    """

    __slots__ = ("counts", "names", "owners")

    def __init__(
        self,
        names: tuple[str, ...] = (),
        counts: tuple[int, ...] = (),
        owners: tuple[tuple[type, ...], ...] = (),
    ) -> None:
        self.names = names
        self.counts = counts
        self.owners = owners

    def within(self, name: str, count: int, cls: type) -> Place:
        """The place of a module inside."""
        return Place((*self.names, name), (*self.counts, count), (*self.owners, (cls,)))

    def wrapped(self, cls: type) -> Place:
        """The place of what this module is only a wrapper of."""
        return Place(self.names, self.counts, (*self.owners[:-1], (*self.owners[-1], cls)))

    def __str__(self) -> str:
        return ".".join(self.names)


class PlacePattern:
    """One pattern.

    Attributes:
        text: As it was written.
        leaves_out: It begins with ``!``.
        met: A module was met that it means.
    """

    __slots__ = ("_cls", "_parts", "leaves_out", "met", "text")

    def __init__(
        self, text: str, cls: str, parts: tuple[str | int | slice, ...], *, leaves_out: bool
    ) -> None:
        self.text = text
        self.leaves_out = leaves_out
        self.met = False
        self._cls = cls
        self._parts = parts

    def shifted(self, before: int, after: int) -> set[int]:
        """The numbers that are chosen otherwise where there are more numbered modules than before."""
        changed = set[int]()
        for part in self._parts:
            if isinstance(part, slice):
                changed.update(set(range(*part.indices(before))) ^ set(range(*part.indices(after))))
            elif isinstance(part, int) and part < 0:
                changed.update((before + part, after + part))
        return changed

    def means(self, place: Place) -> bool:
        """Whether the module at a place is meant, by itself or by a module that it is in."""
        starts: Iterable[int] = range(len(place.names) + 1)
        if self._cls:
            starts = [depth for depth, owners in enumerate(place.owners) if any(map(self._is_of, owners))]
        return any(self._fits(0, place, start) for start in starts)

    def _is_of(self, cls: type) -> bool:
        return any(_like(self._cls, base.__name__) for base in cls.__mro__)

    def _fits(self, at: int, place: Place, depth: int) -> bool:
        for n in range(at, len(self._parts)):
            part = self._parts[n]
            if part == "**":
                return any(self._fits(n + 1, place, deeper) for deeper in range(depth, len(place.names) + 1))
            if depth == len(place.names) or not _is(part, place.names[depth], place.counts[depth]):
                return False
            depth += 1
        return True


def _is(part: str | int | slice, name: str, count: int) -> bool:
    if isinstance(part, str):
        return _like(part, name)
    if not name.isdecimal():
        return False
    if isinstance(part, slice):
        return int(name) in range(*part.indices(count))
    return int(name) == (part if part >= 0 else count + part)


def _like(part: str, name: str) -> bool:
    return pattern_regex(part).fullmatch(name) is not None if is_pattern(part) else part == name


class Where:
    """The places that a registration is for, and what was met there.

    The last pattern that means a module decides. One that no pattern means is chosen where the first
    pattern leaves out, and is not chosen otherwise.

    Attributes:
        patterns: In the order in which they were written.
    """

    __slots__ = ("_chosen", "_left", "_most", "_names", "patterns")

    def __init__(self, patterns: tuple[PlacePattern, ...]) -> None:
        self.patterns = patterns
        self._chosen: dict[int, ref[Any]] = {}
        self._left: dict[int, ref[Any]] = {}
        self._names: dict[str, None] = {}
        self._most = (0, 0)

    def anew(self) -> Where:
        """The same patterns, which share what they met, for another target."""
        return Where(self.patterns)

    @property
    def text(self) -> str:
        """The patterns in one line."""
        return ", ".join(f'"{pattern.text}"' for pattern in self.patterns)

    def shifted(self, before: int, after: int) -> set[int]:
        """As for one pattern."""
        return set().union(*(pattern.shifted(before, after) for pattern in self.patterns))

    def includes(self, places: Sequence[Place]) -> bool:
        """Whether a module is chosen: by any of the places that it has."""
        found = [self._includes(place) for place in places]
        return any(found)

    def speaks_of(self, places: Sequence[Place]) -> bool:
        """Whether a pattern means a module, to choose it or to leave it out."""
        return any(pattern.means(place) for pattern in self.patterns for place in places)

    def _includes(self, place: Place) -> bool:
        chosen = self.patterns[0].leaves_out
        for pattern in self.patterns:
            if pattern.means(place):
                pattern.met = True
                chosen = not pattern.leaves_out
        return chosen

    def chooses(self, module: Any, places: Sequence[Place]) -> bool:
        """Decide about a module, and count it."""
        chosen = self.includes(places)
        here, there = (self._chosen, self._left) if chosen else (self._left, self._chosen)
        key = id(module)
        there.pop(key, None)
        here[key] = ref(module, lambda gone: here.pop(key) if here.get(key) is gone else None)
        if len(self._names) < 1000:
            for place in places:
                self._names[".".join("*" if name.isdecimal() else name for name in place.names)] = None
        if len(self._chosen) + len(self._left) >= sum(self._most):
            self._most = (len(self._chosen), len(self._left))
        return chosen

    @property
    def counts(self) -> tuple[int, int]:
        """How many modules are chosen and left out; where all are gone, of the most there were."""
        now = (len(self._chosen), len(self._left))
        return now if any(now) else self._most

    def nearest(self, pattern: PlacePattern) -> str:
        """Where the modules are that it was asked about, for one whose pattern met none."""
        deepest = sorted(self._names, key=lambda name: -name.count("."))
        names = [name for name in deepest if not any(other.endswith(f".{name}") for other in deepest)]
        names = [name for name in names if name]
        if not names:
            return "the layers that were met are in no other module"
        bare = pattern.text.removeprefix("!").rpartition(":")[2]
        hint = suggest(bare, names)
        shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
        return f"such layers are at {shown}" + (f"; {hint}" if hint else "")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Where) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"Where({self.text})"


def parse_where(value: object, *, where: str | None = None) -> Where:
    """Read a pattern or a list of them.

    Args:
        value: As written in a configuration or given to the API.
        where: Where it was written, for the message.

    Raises:
        ConfigError: It is no string and no list of strings, or one of them is no pattern.
    """
    if isinstance(value, Where):
        return value.anew()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not items:
        raise ConfigError(
            "no place" if items in ([], ()) else "wrong type",
            where=where,
            found=repr(value)[:80],
            expected=EXPECTED,
            fix='write where = "model.layers.*.mlp", or leave the key out for every place',
        )
    return Where(tuple(_pattern(item, where) for item in items))


def _pattern(text: object, where: str | None) -> PlacePattern:
    def wrong(fix: str) -> ConfigError:
        return ConfigError(
            "not a place in a model", where=where, found=repr(text)[:80], expected=EXPECTED, fix=fix
        )

    if not isinstance(text, str):
        raise wrong("write each place in quotes")
    bare = text.removeprefix("!")
    cls, colon, rest = bare.partition(":")
    if not colon or "[" in cls:
        cls, rest = "", bare
    elif not cls.replace("*", "a").replace("?", "a").isidentifier():
        raise wrong(
            'write the name of a class in front of the colon, such as "Qwen3ForCausalLM:model.layers"'
        )
    if colon and cls and not rest:
        raise wrong(f'write "{text}**" for everything in models of that class')
    if "," in rest or " " in rest.strip():
        raise wrong('write several places as a list, such as ["model.layers.*", "!model.layers.0"]')
    if "/" in rest:
        raise wrong(f'join the names by dots: "{text.replace("/", ".")}"')
    # layers[0] is layers.[0].
    dotted = rest.replace(".[", "[").replace("[", ".[")
    parts = [_part(part) for part in (dotted[1:] if rest.startswith("[") else dotted).split(".")]
    kept = [part for part in parts if part is not None]
    if len(kept) != len(parts):
        raise wrong(_FIX)
    # Two ** in a row mean what one means.
    single = tuple(p for n, p in enumerate(kept) if not (p == "**" and n and kept[n - 1] == "**"))
    return PlacePattern(text, cls, single, leaves_out=text.startswith("!"))


def _part(text: str) -> str | int | slice | None:
    """One name of a pattern; None where it is none."""
    if text.startswith("[") and text.endswith("]"):
        pieces = text[1:-1].split(":")
        if len(pieces) > 3 or not all(
            _is_number(piece) or (not piece and len(pieces) > 1) for piece in pieces
        ):
            return None
        numbers = [int(piece) if piece else None for piece in pieces]
        if len(numbers) == 1:
            return numbers[0]
        return None if numbers[2:] == [0] else slice(*numbers)
    if text.startswith("-") and _is_number(text):
        return int(text)
    bare = text.replace("*", "a").replace("?", "a").replace("-", "a").replace("_", "a")
    return text if bare.isalnum() and ("**" not in text or text == "**") else None


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()
