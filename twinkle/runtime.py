"""Everything that Twinkle holds in this process: one object owns it, and can begin anew.

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

from twinkle import forks
from twinkle.options import Options
from twinkle.registry import Registry
from twinkle.session import Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    State = TypeVar("State")

__all__ = ["Runtime", "runtime"]


class Runtime:
    """The registrations, settings and records of this process, and what the rooms keep beside them.

    A room keeps its own state (watches, candidates, placements, caches) in an object of a class of
    its own, which :meth:`of` makes when it is first asked for::

        class Placements:
            def __init__(self) -> None:
                self.by_target: dict[str, Placement] = {}

            def close(self) -> None:  # optional: take back what outlives the object
                ...

        runtime.of(Placements).by_target

    Attributes:
        registry: What the program registered, and the records of what became of it.
        embedded: What stands in for a layer that nothing in ``registry`` is for: the document of
            the embedded kernels. Registrations alone; their records are in ``registry``.
        options: The settings in force.
        session: How Twinkle came into this process.
    """

    def __init__(self) -> None:
        self._lock = forks.lock()
        self._begin()

    def _begin(self) -> None:
        self.registry = Registry()
        self.embedded = Registry()
        self.options = Options()
        self.session = Session()
        self._states: dict[type, object] = {}

    def of(self, kind: type[State]) -> State:
        """The one object of that class in this runtime; made, without arguments, at the first question."""
        state = self._states.get(kind)
        if state is None:
            with self._lock:
                state = self._states.get(kind)
                if state is None:
                    state = self._states[kind] = kind()
        return state  # type: ignore[return-value]

    def reset(self) -> None:
        """Take back what is in place for the whole process, cancel every watch and begin anew.

        The states that have a ``close()`` are closed, the newest first. Models that were kernelized
        keep their kernels; ``unkernelize_model`` takes those out.
        """
        with self._lock:
            for state in reversed(list(self._states.values())):
                close = getattr(state, "close", None)
                if close is not None:
                    close()
            # Whoever still holds the old ones keeps no kernel alive by it.
            self.registry.clear()
            self.embedded.clear()
            self._begin()


runtime = Runtime()
