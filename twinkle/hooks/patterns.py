"""Patterns of module names, matched without importing ``re`` before a name comes near one.

Standard library only: this module is imported at interpreter start, where ``import re`` is half of
what an active start may cost.
"""

from __future__ import annotations

import sys

from twinkle.targets import pattern_source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Patterns"]


class Patterns:
    """Some patterns: ``*`` is a part of a name, ``**`` may hold dots, ``?`` is one character.

    Most names differ from every pattern before its first wildcard. Those that do not are matched by
    one regular expression once the program has imported ``re``, and by hand before: a finder is
    asked under the global import lock and must not import anything.
    """

    __slots__ = ("_fullmatch", "_heads", "_patterns")

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = tuple(patterns)
        self._heads = tuple({_head(pattern) for pattern in patterns})
        self._fullmatch: Callable[[str], object] | None = None

    def match(self, name: str) -> bool:
        """Whether one of the patterns means that name."""
        fullmatch = self._fullmatch
        if fullmatch is None:
            if not name.startswith(self._heads):
                return False
            fullmatch = self._compile()
            if fullmatch is None:
                return any(_matches(pattern, name) for pattern in self._patterns)
        return fullmatch(name) is not None

    def _compile(self) -> Callable[[str], object] | None:
        re = sys.modules.get("re")
        if re is None or getattr(re.__spec__, "_initializing", False):
            return None
        # Patterns of one head are grouped, so that a name fails at its first letters.
        groups: dict[str, list[str]] = {}
        for pattern in self._patterns:
            head = _head(pattern)
            groups.setdefault(head, []).append(pattern_source(pattern[len(head) :]))
        sources = [f"{pattern_source(head)}(?:{'|'.join(tails)})" for head, tails in groups.items()]
        self._fullmatch = re.compile("|".join(sources)).fullmatch
        return self._fullmatch


def _head(pattern: str) -> str:
    """The part of a pattern before its first wildcard, up to a dot."""
    literal = pattern.replace("?", "*").partition("*")[0]
    return literal[: literal.rfind(".") + 1]


def _matches(pattern: str, name: str) -> bool:
    if not pattern:
        return not name
    if pattern[0] != "*":
        same = name[:1] == pattern[0] or (pattern[0] == "?" and name[:1] not in ("", "."))
        return same and _matches(pattern[1:], name[1:])
    deep = pattern[:2] == "**"
    rest = pattern[2:] if deep else pattern[1:]
    for at in range(len(name) + 1):
        if _matches(rest, name[at:]):
            return True
        if not deep and name[at : at + 1] == ".":
            return False
    return False
