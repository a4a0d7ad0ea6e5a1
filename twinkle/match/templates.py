"""The templates: the references of the ops, executed symbolically with holes for their arguments.

The definition of a variant and what is recognised as that variant are one and the same code.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from twinkle.match.symbolic.execute import Run
from twinkle.match.symbolic.terms import Arena, Term
from twinkle.match.unify import shape_key
from twinkle.ops.catalog import all_ops

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twinkle.ops.catalog import Op

__all__ = ["Template", "holes", "template_ops", "templates"]

# What a hole may be bound to, by the role of its argument; any other role is an attribute.
_HOLES = {"input": "input", "table": "input", "number": "scalar", "activation": "callable", "shape": "any"}


def template_ops() -> tuple[Op, ...]:
    """The ops that are one expression of one class or function."""
    return tuple(op for op in all_ops() if op.roles)


@cache
def holes(op: Op) -> dict[str, str]:
    """What ``unify`` may bind each argument of an op's definition to."""
    return {argument: _HOLES.get(role, "attr") for argument, role in op.roles.items()}


class Template(NamedTuple):
    """One variant as a term with holes."""

    op: Op
    variant: Any
    term: Term
    key: int


class _Forms:
    """The templates of one op, made as they are asked for: the commonest variants come first."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.function = getattr(op.module("reference"), op.name)
        code = self.function.__code__
        self.names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self.arena = Arena()
        self.made: list[Template] = []
        spellings, by_form = op.hook("spellings"), op.hook("by_form")
        self.todo = [
            (variant, spelling)
            for variant in op.variants
            if by_form is None or not by_form(variant)
            for spelling in ((({},)) if spellings is None else spellings(variant))
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

    def make(self, variant: Any, spelling: dict[str, Any]) -> None:
        run = Run(self.arena, inline=200)
        given: dict[str, Term] = {"variant": run.embed(variant)}
        given.update({name: run.embed(value) for name, value in spelling.items()})
        for name in self.names:
            if name not in given:
                given[name] = self.arena.term("hole", name)
        term = run.function(self.function, [], given)
        if run.effects:
            raise AssertionError(
                f"the reference of {self.op.name} {variant.name} is no mere computation: {run.effects}"
            )
        self.made.append(Template(self.op, variant, term, shape_key(term)))


@cache
def templates(op: Op) -> _Forms:
    """The templates of an op, the commonest variants first."""
    return _Forms(op)
