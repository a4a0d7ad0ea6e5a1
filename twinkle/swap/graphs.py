"""What ``torch.compile`` made of a class before its ``forward`` became another function.

Dynamo guards on the class of a module and on what its ``forward`` reads, but not on which function that is:
graphs that were traced through the original would go on without a kernel.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["begin_again", "called_by_dynamo", "forget_graphs"]

_MOST_GONE = 3
"""Graphs of one function that are forgotten one by one. They stay in its list and count, and dynamo gives up
at eight. With more, all graphs of the function go, also those of other models."""


def forget_graphs(owner: type) -> int:
    """Have dynamo trace anew what it traced through the ``forward`` of a class.

    Graphs that hold no module of the class, or of one that inherits its ``forward``, stay.

    Args:
        owner: The class in which another function stands as ``forward`` now.

    Returns:
        How many graphs were forgotten.
    """
    frames: Any = sys.modules.get("torch._dynamo.convert_frame")
    if frames is None:
        return 0
    dynamo: Any = sys.modules["torch._dynamo"]
    try:
        codes = [one() for one in list(frames.input_codes.seen)]
        return sum(_forget_in(dynamo, code, owner) for code in codes if code is not None)
    except (AttributeError, TypeError):  # not the inside of the versions that are known: 2.13
        dynamo.reset()
        return 0


def _forget_in(dynamo: Any, code: Any, owner: type) -> int:
    """Forget the graphs of one function that was compiled."""
    deleted = dynamo.guards.DeletedGuardManagerWrapper
    entries = dynamo.eval_frame._debug_get_cache_entry_list(code)
    found = [entry for entry in entries if not isinstance(entry.guard_manager, deleted)]
    gone = len(entries) - len(found)
    found = [entry for entry in found if _may_run(entry, owner)]
    if found and gone + len(found) > _MOST_GONE:
        dynamo.reset_code(code)
        return len(found)
    for entry in found:
        reason = f"{owner.__qualname__}.forward is another function"
        entry.guard_manager.extra_state.invalidate(entry, deleted(reason))
    return len(found)


def _may_run(entry: Any, owner: type) -> bool:
    """Whether a graph was made with a module that has its ``forward`` from a class."""
    forward = vars(owner)["forward"]
    kinds = set(_kinds(entry.guard_manager.root))
    return any(issubclass(kind, owner) and kind.forward is forward for kind in kinds)  # type: ignore[attr-defined]


def _kinds(guards: Any) -> Iterator[type]:
    """The classes of all that a graph's guards look at."""
    todo = [guards]
    while todo:
        guard = todo.pop()
        kind = guard.get_type_of_guarded_value()
        if isinstance(kind, type):
            yield kind
        todo += guard.get_child_managers()
        if hasattr(guard, "get_key_value_managers"):  # of a dict, such as the modules of an nn.Sequential
            for pair in guard.get_key_value_managers().values():
                todo += filter(None, pair)


def called_by_dynamo(depth: int) -> bool:
    """Whether a frame is dynamo's own: it calls a function while it traces.

    Elsewhere ``torch.compiler.is_compiling()`` may be true, too (``torch.export`` without ``strict``).

    Args:
        depth: How many frames the frame is above that of the caller.
    """
    name = sys._getframe(depth + 1).f_globals.get("__name__", "")
    return bool(name.startswith("torch._dynamo."))


def begin_again(why: str) -> None:
    """Make dynamo begin the trace anew that this is called in; returns where this version of torch cannot.

    Args:
        why: For its log.
    """
    errors = sys.modules.get("torch._dynamo.exc")
    error: Any = getattr(errors, "UnspecializeRestartAnalysis", None)
    if error is not None:
        raise error(restart_reason=why)
