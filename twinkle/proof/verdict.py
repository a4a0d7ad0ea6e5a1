"""The outcome of a comparison, and how one ends before its time."""

from __future__ import annotations

import math

__all__ = ["Rejected", "Undecided", "Verdict", "in_a_line"]

_UNKNOWN = (math.nan,) * 4


class Verdict:
    """The outcome of a comparison.

    Attributes:
        ok: The kernel may run.
        text: The errors or the reason against the kernel, for the report; why there is no outcome yet.
        errors: The largest relative error of the results, that of the original there, and the same two of
            the gradients; NaN where nothing was compared.
        conclusive: Both ran and were compared. Otherwise something failed, memory perhaps, that says
            nothing of the next time.
        pending: There is no outcome: the original is to run for the call at hand, and the next one to be
            compared.
        tried: A comparison was begun.
        date: The day of the comparison, where it is not today's: ``2026-01-31``.
    """

    __slots__ = ("conclusive", "date", "errors", "ok", "pending", "text", "tried")

    def __init__(
        self,
        ok: bool,
        text: str,
        *,
        errors: tuple[float, float, float, float] = _UNKNOWN,
        conclusive: bool = True,
        pending: bool = False,
        tried: bool = True,
        date: str | None = None,
    ) -> None:
        self.ok = ok
        self.text = text
        self.errors = errors
        self.conclusive = conclusive and not pending
        self.pending = pending
        self.tried = tried
        self.date = date

    @classmethod
    def not_yet(cls, reason: object) -> Verdict:
        """No comparison can be made in the circumstances of the call."""
        return cls(False, str(reason), pending=True, tried=False)

    def __str__(self) -> str:
        word = "proven" if self.ok else "not compared yet" if self.pending else "rejected"
        return f"{word} (cached, {self.date}): {self.text}" if self.date else f"{word}: {self.text}"

    def __repr__(self) -> str:
        return f"<Verdict {self}>"


class Rejected(Exception):
    """The kernel does not compute the same; the message says in what way."""

    def __init__(self, reason: str, *, conclusive: bool = True) -> None:
        super().__init__(reason)
        self.conclusive = conclusive


class Undecided(Exception):
    """The runs of this call cannot be compared; the message says why."""


def in_a_line(error: Exception) -> str:
    """An exception as a line of a report."""
    if isinstance(error, Undecided):
        return str(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
