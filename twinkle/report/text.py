"""The report as a table for a terminal."""

from __future__ import annotations

import os
import textwrap

from twinkle.errors import printable
from twinkle.report import captures

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

__all__ = ["render", "summary"]

_HEADERS = ("state", "target", "kernel", "source", "for", "where")
_SPEEDS = 4
"""Sizes of which the table gives the figures; the data has all."""
_MARKS = {"active": "+", "pending": ".", "skipped": "-", "reverted": "-"}


def render(snapshot: Mapping[str, Any], *, width: int = 120) -> str:
    """The table: one row a binding, its reason and notes indented below it.

    Args:
        snapshot: What :func:`twinkle.report.records.snapshot` returned.
        width: Columns of the terminal; long cells are cut in the middle, reasons are wrapped.
    """
    bindings: Sequence[Mapping[str, Any]] = snapshot["bindings"]
    lines = [f"twinkle {snapshot['twinkle']}: {summary(snapshot)}"]
    if snapshot["configs"]:
        lines.append(f"  config: {', '.join(printable(_near(path)) for path in snapshot['configs'])}")
    if bindings:
        lines += ["", *_table(bindings, width)]
    section = captures.lines(snapshot.get("captures", ()), width)
    lines += ["", *section] if section else []
    if snapshot["remarks"]:
        lines.append("")
        lines += [f"  note: {printable(remark)}" for remark in snapshot["remarks"]]
    return "\n".join(lines) + "\n"


def summary(snapshot: Mapping[str, Any]) -> str:
    """How many bindings are in which state, in one line."""
    counts: dict[str, int] = {}
    for binding in snapshot["bindings"]:
        counts[binding["state"]] = counts.get(binding["state"], 0) + 1
    if not counts:
        return "nothing is bound"
    order = ("active", "pending", "skipped", "failed", "quarantined", "displaced", "reverted")
    return ", ".join(f"{counts[state]} {state}" for state in order if state in counts)


def _table(bindings: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    rows = [
        (
            f"{_MARKS.get(binding['state'], '!')} {binding['state']}",
            printable(binding["target"]),
            printable(binding["kernel"]),
            printable(_near(binding["source"])),
            f"{binding['device']}/{binding['mode']}",
            _count(binding),
        )
        for binding in bindings
    ]
    widths = [max(len(row[i]) for row in (*rows, _HEADERS)) for i in range(len(_HEADERS))]
    # The target and the source are the cells that grow; they share what the others leave.
    spare = width - 2 * len(widths) - sum(w for i, w in enumerate(widths) if i not in (1, 3))
    if widths[1] + widths[3] > spare:
        widths[1] = min(widths[1], max(24, spare - min(widths[3], spare // 2)))
        widths[3] = min(widths[3], max(20, spare - widths[1]))
    lines = [_line(_HEADERS, widths), _line(tuple("-" * w for w in widths), widths)]
    for row, binding in zip(rows, bindings, strict=True):
        lines.append(_line(row, widths))
        for text in _remarks(binding):
            lines += textwrap.wrap(
                printable(text), width=max(40, width), initial_indent="    ", subsequent_indent="      "
            )
    return lines


def _near(text: str) -> str:
    """A path in the working directory or the home directory, as a reader there would write it."""
    for root, short in ((os.getcwd(), "."), (os.path.expanduser("~"), "~")):
        if len(root) > 1:
            text = text.replace(root, short)
    return text


def _count(binding: Mapping[str, Any]) -> str:
    number = binding.get("most_instances", binding["instances"])
    noun = "layer" if binding["kind"] == "layer" else "name"
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _remarks(binding: Mapping[str, Any]) -> list[str]:
    remarks = [binding["reason"]] if binding["reason"] else []
    if binding["state"] == "active" and binding["proof"] != "unproven":
        remarks.append(binding["proof"])
    if binding["state"] == "active":
        remarks += _speeds(binding.get("speeds", {}))
    return remarks + list(binding["notes"])


def _speeds(speeds: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How fast a kernel is beside its original: where it runs, and where the original does."""
    runs = [_speed(at, one) for at, one in speeds.items() if one["runs"]]
    left = [_speed(at, one) for at, one in speeds.items() if not one["runs"]]
    lines = [f"beside its original: {_some(runs)}"] if runs else []
    return lines + ([f"not faster here, the original runs: {_some(left)}"] if left else [])


def _speed(at: str, figures: Mapping[str, Any]) -> str:
    unsure = not figures["runs"] and figures["ratio"] >= 1 > figures["low"]
    doubt = f" ({figures['low']:.2f}x or less in a quarter of the rounds)" if unsure else ""
    return f"{figures['ratio']:.2f}x{doubt} at {at}"


def _some(figures: Sequence[str]) -> str:
    more = len(figures) - _SPEEDS
    return ", ".join(figures[:_SPEEDS]) + (f" and {more} sizes more" if more > 0 else "")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    shown = (_cut(cell, size).ljust(size) for cell, size in zip(cells, widths, strict=True))
    return "  ".join(shown).rstrip()


def _cut(text: str, size: int) -> str:
    if len(text) <= size:
        return text
    head = (size - 1) // 3
    return f"{text[:head]}…{text[len(text) - (size - 1 - head) :]}"
