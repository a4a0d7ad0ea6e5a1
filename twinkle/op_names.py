"""The names of the ops as users write them, and what a misspelt one was meant to be.

``LAYER_OPS`` may stand behind ``match =`` of a layer, ``FUNCTION_OPS`` of a function; ``OPS`` are all. They
come from the records of the ops (:mod:`twinkle.ops.catalog`), which are read when one of the names is first
asked for.
"""

from __future__ import annotations

from twinkle.errors import suggest

TYPE_CHECKING = False
if TYPE_CHECKING:
    LAYER_OPS: tuple[str, ...]
    FUNCTION_OPS: tuple[str, ...]
    OPS: tuple[str, ...]

__all__ = ["FUNCTION_OPS", "LAYER_OPS", "OPS", "hint", "slip"]

_KINDS = {
    "LAYER_OPS": ("layer",),
    "FUNCTION_OPS": ("layer", "function"),
    "OPS": ("layer", "function", "inside"),
}


def __getattr__(name: str) -> tuple[str, ...]:
    if name not in _KINDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from twinkle.ops.catalog import all_ops

    of_kinds = [op for kind in _KINDS[name] for op in all_ops() if op.kind == kind]
    # A norm may be a layer or a function.
    return tuple(op.name for op in of_kinds if name != "FUNCTION_OPS" or op.is_function)


def hint(name: str) -> str | None:
    """``did you mean …`` for a name that should be an op and is none."""
    from twinkle.ops.catalog import all_ops

    for op in all_ops():
        if name.lower() in op.aliases:
            return f"did you mean {op.name!r}?"
    return suggest(name[:40].lower(), __getattr__("OPS"))


def slip(name: str) -> str | None:
    """The op that a name is one letter or two from, if it is none itself."""
    import difflib

    names = __getattr__("OPS")
    if name in names:
        return None
    near = difflib.get_close_matches(name[:40], names, n=1, cutoff=0.8)
    return near[0] if near else None
