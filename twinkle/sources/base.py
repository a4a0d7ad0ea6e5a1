"""What every source of a kernel offers."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Source(Protocol):
        """Where an implementation comes from.

        ``load`` is called at first use, from any thread, any number of times; it returns the same
        object each time and imports it once.
        """

        kind: str  # "code" | "local" | "installed" | "hub" | "embedded"

        def describe(self) -> str:
            """One line for the report: what it is and where it comes from."""
            ...

        def load(self) -> object:
            """The layer class or the callable.

            Raises:
                SourceError: It cannot be loaded; the message says what, where and what to do.
            """
            ...


__all__ = ["Source"]
