"""The templates: the references of the ops, executed symbolically with holes for their arguments.

The definition of a form and what is recognised as that form are one and the same code.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from twinkle.match.symbolic.execute import Run
from twinkle.match.symbolic.terms import Arena, Term
from twinkle.match.unify import shape_key

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["OPS", "ROLES", "Template", "templates"]

OPS: tuple[str, ...] = ("rms_norm", "layer_norm", "gated_mlp", "rotary", "experts")
"""The ops that are one expression of one class or function."""

_COMMON = {"x": "input", "weight": "attr", "bias": "attr", "eps": "scalar", "activation": "callable"}
ROLES: dict[str, dict[str, str]] = {
    "rms_norm": {
        **_COMMON,
        "gate": "input",
        "group_size": "scalar",
        "with_weight": "attr",
        "normalized_shape": "any",
    },
    "layer_norm": {**_COMMON, "normalized_shape": "any"},
    "gated_mlp": {
        **_COMMON,
        **dict.fromkeys(("gate", "up", "down", "gate_up", "dropout", "norm"), "attr"),
        **dict.fromkeys(("limit", "gate_scale", "output_scale"), "scalar"),
    },
    "rotary": {
        **dict.fromkeys(("q", "k", "v", "cos", "sin", "position_ids", "mrope_section"), "input"),
        "unsqueeze_dim": "scalar",
    },
    "experts": {
        **_COMMON,
        **dict.fromkeys(("indices", "weights"), "input"),
        **dict.fromkeys(("gate_up", "down", "gate_up_bias", "down_bias", "norm"), "attr"),
        **dict.fromkeys(("num_experts", "limit", "alpha"), "scalar"),
    },
}
"""What each argument of a reference may stand for in the code of a class."""


def _table_orders(form: Any) -> tuple[dict[str, Any], ...]:
    if form.tables in ("full", "half"):
        return ({"slice_last": False},)
    return ({"slice_last": False}, {"slice_last": True})


# Arguments of a reference that change its spelling, not its result.
_SPELLINGS = {"rotary": _table_orders}


class Template(NamedTuple):
    """One form as a term with holes."""

    op: str
    form: Any
    term: Term
    key: int


class _Forms:
    """The templates of one op, made as they are asked for: the commonest forms come first."""

    def __init__(self, op: str) -> None:
        self.op = op
        reference = import_module(f"twinkle.ops.{op}.reference")
        self.function = getattr(reference, op)
        code = self.function.__code__
        self.names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self.arena = Arena()
        self.made: list[Template] = []
        self.todo = [
            (form, spelling)
            for form in reference.FORMS
            for spelling in _SPELLINGS.get(op, lambda form: ({},))(form)
        ]
        self.todo.reverse()

    def __iter__(self) -> Iterator[Template]:
        at = 0
        while True:
            while at < len(self.made):
                yield self.made[at]
                at += 1
            if not self.todo:
                return
            self.make(*self.todo.pop())

    def make(self, form: Any, spelling: dict[str, Any]) -> None:
        run = Run(self.arena, inline=200)
        given: dict[str, Term] = {"form": run.embed(form)}
        given.update({name: run.embed(value) for name, value in spelling.items()})
        for name in self.names:
            if name not in given:
                given[name] = self.arena.term("hole", name)
        term = run.function(self.function, [], given)
        if run.effects:
            raise AssertionError(
                f"the reference of {self.op} {form.name} is no mere computation: {run.effects}"
            )
        self.made.append(Template(self.op, form, term, shape_key(term)))


@cache
def templates(op: str) -> _Forms:
    """The templates of an op, the commonest forms first."""
    return _Forms(op)
