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
    from collections.abc import Collection, Iterator

    from twinkle.ops.catalog import Op

__all__ = ["Template", "holes", "template_ops", "templates"]

# What a hole may be bound to, by the role of its argument; any other role is an attribute.
_HOLES = {
    "input": "input",
    "table": "input",
    "number": "scalar",
    "constant": "constant",
    "activation": "callable",
    "shape": "any",
}


def template_ops() -> tuple[Op, ...]:
    """The ops that are one expression of one class or function."""
    return tuple(op for op in all_ops() if op.roles)


_OF_FUNCTIONS = {**_HOLES, "tensor": "given", "number": "given number"}
"""The same in a function: what a layer keeps is an argument there, or an attribute of one."""


@cache
def holes(op: Op, *, of_function: bool = False) -> dict[str, str]:
    """What ``unify`` may bind each argument of an op's definition to.

    Args:
        op: The op.
        of_function: The code is a function, and no forward of a layer.
    """
    kinds = _OF_FUNCTIONS if of_function else _HOLES
    return {argument: kinds.get(role, "attr") for argument, role in op.roles.items()}


class Template(NamedTuple):
    """One variant as a term with holes, and what its spelling says besides."""

    op: Op
    variant: Any
    term: Term
    key: int
    says: dict[str, Any]


class _Forms:
    """The templates of one op, made as they are asked for: the commonest variants come first."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.function = getattr(op.module("reference"), op.name)
        code = self.function.__code__
        self.names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self.arena = Arena()
        self.possible = op.hook("possible")
        self.forms: list[_Form] = []
        spellings, by_form = op.hook("spellings"), op.hook("by_form")
        for variant in op.variants:
            if by_form is not None and by_form(variant):
                continue  # see twinkle.match.spelled
            written: tuple[dict[str, Any], ...] = ({},) if spellings is None else tuple(spellings(variant))
            # What one spelling leaves out is there in the others.
            left_out = frozenset(name for spelling in written for name in spelling)
            self.forms += [_Form(variant, spelling, left_out) for spelling in written]

    def __iter__(self) -> Iterator[Template]:
        return self.among(None)

    def among(self, operations: Collection[str] | None) -> Iterator[Template]:
        """Those that can be the template of a term in which there are these operations; all for None."""
        for form in self.forms:
            if operations is None or self.possible is None or self.possible(form.variant, operations):
                if form.made is None:
                    form.made = self.make(form)
                yield form.made

    def make(self, form: _Form) -> Template:
        run = Run(self.arena, inline=200, assume=dict.fromkeys(form.left_out, "given"))
        given: dict[str, Term] = {"variant": run.embed(form.variant)}
        given.update({name: run.embed(value) for name, value in form.spelling.items()})
        for name in self.names:
            if name not in given:
                given[name] = self.arena.term("hole", name)
        term = run.function(self.function, [], given)
        if run.effects:
            raise AssertionError(
                f"the reference of {self.op.name} {form.variant.name} is no mere computation: {run.effects}"
            )
        roles = self.op.roles
        says = {name: value for name, value in form.spelling.items() if roles.get(name) == "spelling"}
        return Template(self.op, form.variant, term, shape_key(term), says)


class _Form:
    """One spelling of a variant, and its template once it was made."""

    def __init__(self, variant: Any, spelling: dict[str, Any], left_out: frozenset[str]) -> None:
        self.variant = variant
        self.spelling = spelling
        self.left_out = left_out
        self.made: Template | None = None


@cache
def templates(op: Op) -> _Forms:
    """The templates of an op, the commonest variants first."""
    return _Forms(op)
