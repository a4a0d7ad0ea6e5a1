"""Failures of callbacks: recorded, told and warned of, and never an error of the program.

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

from twinkle.errors import warn
from twinkle.runtime import runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Failure", "failed", "failures", "on_failure"]


class Failure:
    """A callback that raised.

    Attributes:
        owner: Who registered it.
        subject: What it was called for, in words: ``module x`` or ``model x:Class``.
        kind: The class of what it raised.
        text: What that said.

    The exception itself is not kept: its frames hold what the callback was called for, a model for instance.
    """

    __slots__ = ("kind", "owner", "subject", "text")

    def __init__(self, owner: str, subject: str, error: Exception) -> None:
        self.owner = owner
        self.subject = subject
        self.kind = type(error)
        self.text = str(error)

    def __str__(self) -> str:
        owner = self.owner or "unknown owner"
        return f"a hook of {owner} on {self.subject} raised {self.kind.__name__}: {self.text}"


class _Failures:
    """The callbacks that raised, and who is told of them."""

    def __init__(self) -> None:
        self.seen: dict[str, Failure] = {}
        self.handlers: list[Callable[[Failure], object]] = []


def failures() -> tuple[Failure, ...]:
    """Every callback that raised so far, oldest first; one that said the same again is there once."""
    return tuple(runtime.of(_Failures).seen.values())


def on_failure(handler: Callable[[Failure], object]) -> None:
    """Call ``handler`` with every failure from now on; what it raises itself is dropped."""
    handlers = runtime.of(_Failures).handlers
    if handler not in handlers:
        handlers.append(handler)


def failed(error: Exception, *, owner: str, subject: str, strict: bool) -> None:
    """Record what a callback raised, tell the handlers and warn once; called in its ``except`` block.

    Args:
        error: What it raised.
        owner: Who registered it.
        subject: What it was called for, in words.
        strict: Raise it again instead of warning.
    """
    failure = Failure(owner, subject, error)
    state = runtime.of(_Failures)
    state.seen.setdefault(str(failure), failure)
    for handler in tuple(state.handlers):
        try:
            handler(failure)
        except Exception as second:
            warn(f"the failure handler raised {type(second).__name__}: {second}")
    if strict:
        raise error
    warn(f"{failure}; the program goes on without it")
