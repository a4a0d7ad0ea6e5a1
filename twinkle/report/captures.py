"""The captured layers in the report: as data, and below the table."""

from __future__ import annotations

import sys
import textwrap

from twinkle.config.amounts import size_in_words
from twinkle.errors import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

__all__ = ["lines", "records"]

_MOST = 6
"""So many reasons, and so many kinds of calls, are named of a stack; the data has all."""


def records() -> list[dict[str, Any]]:
    """What became of the calls of each stack; nothing is imported for it."""
    state: Any = sys.modules.get("twinkle.capture.state")
    return [] if state is None else [record.as_data() for record in state.captured().stacks]


def lines(captures: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """The section of the text: a row a stack, what was captured of it and why not more below.

    Args:
        captures: What :func:`records` gave.
        width: Columns of the terminal; longer rows are wrapped.
    """
    if not captures:
        return []
    trunks = [one for one in captures if one.get("is_trunk")]
    return ["captured layers", *(line for one in captures for line in _stack(one, trunks, width))]


def _stack(one: Mapping[str, Any], trunks: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    place = " ".join(part for part in (one["model"], one["container"]) if part)
    models = f" in each of {one['models']} models" if one["models"] > 1 else ""
    did = [f"{_times(one['replays'], 'call')} replayed" if one["signatures"] else "nothing is captured"]
    if not one["signatures"] and not one.get("is_trunk"):
        around = [trunk for trunk in trunks if trunk["signatures"] and _is_inside(one, trunk)]
        did = [f"replayed as a part of {trunk['block']}" for trunk in around] or did
    if one["most_bytes"]:
        now, most = size_in_words(one["bytes"]), size_in_words(one["most_bytes"])
        did.append(f"{most} held" if now == most else f"{now} held, {most} at most")
    what = f"all of {one['block']}" if one.get("is_trunk") else f"{one['blocks']} x {one['block']}"
    rows = [f"  {place}: {what}{models}: {', '.join(did)}"]
    rows += _some([_signature(signature) for signature in one["signatures"]], "kinds of calls")
    reasons = [f"as it is, {_times(number, 'call')}: {reason}" for reason, number in one["eager"].items()]
    rows += _some(reasons, "reasons")
    return [
        line
        for row in rows
        for line in textwrap.wrap(printable(row), width=max(40, width), subsequent_indent="      ")
    ]


def _is_inside(one: Mapping[str, Any], trunk: Mapping[str, Any]) -> bool:
    place = trunk["container"]
    return bool(one["model"] == trunk["model"] and (not place or one["container"].startswith(f"{place}.")))


def _signature(one: Mapping[str, Any]) -> str:
    blocks, most = one["blocks"], one["most_blocks"]
    count = _times(blocks, "block") if blocks == most else f"{_times(blocks, 'block')}, {most} at most"
    return f"{one['mode']} {one['shapes']}: {count}"


def _some(rows: Sequence[str], what: str) -> list[str]:
    left = len(rows) - _MOST
    return [f"    {row}" for row in rows[:_MOST]] + ([f"    and {left} more {what}"] if left > 0 else [])


def _times(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
