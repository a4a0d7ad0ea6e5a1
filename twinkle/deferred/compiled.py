"""Gives compiled functions of the program deferred logits as the plain tensor that they are there.

Dynamo has a table of what it makes of an argument by its type. For deferred logits it is told to take their
attribute ``plain`` in their place, when it traces, in its guards and at each call. So the graph has plain
logits as an input, and its gradient goes on to the head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twinkle.deferred.logits import DeferredLogits
from twinkle.hooks.imports import watch_module
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from typing import Any

    from twinkle.hooks.imports import Watch

__all__ = ["tell_dynamo"]

_BUILDER = "torch._dynamo.variables.builder"


class _Telling:
    """Waits for dynamo."""

    def __init__(self) -> None:
        self.watch: Watch | None = None

    def begin(self) -> None:
        """Tell dynamo of deferred logits, now or when it is imported."""
        if self.watch is None or not self.watch.active:
            self.watch = watch_module(_BUILDER, _enter, owner="twinkle")


def tell_dynamo() -> None:
    """Let compiled functions be given deferred logits, from now on."""
    runtime.of(_Telling).begin()


def _enter(builder: Any, name: str) -> None:
    try:
        guards, sources = builder.GuardBuilder, builder.AttrSource
        table = builder.VariableBuilder._type_dispatch
    except AttributeError:
        return  # another torch: a compiled function is broken where it uses them

    def as_plain(made: Any, value: DeferredLogits) -> Any:
        if getattr(made.tx, "export", False):
            # An exported program would have them as a constant, as they are no input of its own.
            raise RuntimeError(
                "torch.export(strict=True) of a function that is given deferred logits: give it "
                "outputs.logits + 0, or set TWINKLE_DISABLE=causal_lm_loss"
            )
        made.install_guards(guards.TYPE_MATCH)
        return builder.VariableBuilder(made.tx, sources(made.source, "plain"))(value.plain)

    table()[DeferredLogits] = as_plain
