"""What a pattern of einops' ``rearrange`` does with the channels of a tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Merge", "Split", "move_of"]


class Split(NamedTuple):
    """The last axis becomes two.

    Attributes:
        lead: How many axes stand before it; None for any number.
        at: Which of the two has a size that is given, 0 or 1.
        size: That size.
    """

    lead: int | None
    at: int
    size: Any


class Merge(NamedTuple):
    """The last two axes become one.

    Attributes:
        lead: How many axes stand before them; None for any number.
    """

    lead: int | None


def move_of(pattern: str, sizes: dict[str, Any]) -> Split | Merge | None:
    """What a pattern of ``rearrange`` does where it splits the last axis or merges the last two, else None.

    Args:
        pattern: As ``... (d r) -> ... d r``.
        sizes: The sizes that are given, by axis.
    """
    sides = [_axes(side) for side in pattern.split("->")]
    if len(sides) != 2 or None in sides:
        return None
    left, right = sides
    assert left is not None
    assert right is not None
    known = [name for axis in (*left, *right) for name in axis]
    if len(set(known)) * 2 != len(known) or not set(sizes) <= set(known):
        return None  # an axis that stands on one side alone, or twice
    if left and len(right) > 1 and left[-1] == (*right[-2], *right[-1]) and left[:-1] == right[:-2]:
        wanted = [name for name in left[-1] if name in sizes]
        if len(left[-1]) != 2 or len(wanted) != 1 or not _plain(left[:-1]) or set(sizes) != set(wanted):
            return None
        return Split(_lead(left[:-1]), left[-1].index(wanted[0]), sizes[wanted[0]])
    if right and len(left) > 1 and right[-1] == (*left[-2], *left[-1]) and right[:-1] == left[:-2]:
        if len(right[-1]) != 2 or sizes or not _plain(left):
            return None
        return Merge(_lead(left[:-2]))
    return None


def _axes(side: str) -> list[tuple[str, ...]] | None:
    """Each axis of a side as the names that make it; None where it is not of names alone."""
    found: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(" and group is None:
            group = []
        elif word == ")" and group is not None:
            found.append(tuple(group))
            group = None
        elif word in ("(", ")") or not (word.isidentifier() or word == "...") or word == "_":
            return None
        elif group is not None:
            if word == "...":
                return None
            group.append(word)
        else:
            found.append((word,))
    return found if group is None else None


def _plain(axes: list[tuple[str, ...]]) -> bool:
    """Whether each is one axis, with dots for others at the beginning alone."""
    return all(len(axis) == 1 for axis in axes) and ("...",) not in axes[1:]


def _lead(axes: list[tuple[str, ...]]) -> int | None:
    return None if ("...",) in axes else len(axes)
