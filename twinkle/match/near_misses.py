"""Near misses: what a term almost is, and the first difference.

A term counts as near an op when it holds the core expression of that op (a reciprocal root of a mean of
squares, a product with an activation between two layers, a rotation): ``core`` in the ``recognition.py`` of
the op says so. Which variant is nearest is counted.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from twinkle.match.recognition import NearMiss
from twinkle.match.symbolic.idioms import ACTIVATIONS
from twinkle.match.symbolic.terms import Term, walk
from twinkle.match.templates import holes, template_ops, templates
from twinkle.match.unify import attribute_path, difference

if TYPE_CHECKING:
    from twinkle.match.symbolic.execute import Run
    from twinkle.ops.catalog import Op

__all__ = ["Expression", "NearMiss", "near_misses", "ops_with_core"]


# The share of a variant's operations that must agree: below it the two only share their core expression.
_NEAR = 0.4
_MOST_PARTS = 600


class Expression:
    """A term as the ops look at it for their core expressions.

    Args:
        parts: The term and everything in it.

    Attributes:
        parts: As given; each has the name of an operation as ``op``, and ``args``.
        size: How many there are.
        ops: The names of their operations.
    """

    def __init__(self, parts: list[Term]) -> None:
        self.parts = parts
        self.size = len(parts)
        self.ops = {part.op for part in parts}

    @cached_property
    def centred(self) -> bool:
        """It divides by a root of what a mean was subtracted from, as layer norms do."""
        if "layer_norm" in self.ops and self.size < 60:
            return True
        roots = not self.ops.isdisjoint(("rsqrt", "sqrt", "std"))
        return roots and ("var" in self.ops or {"mean", "sub"} <= self.ops) and self.size < 80

    @cached_property
    def layer_calls(self) -> list[Term]:
        """The calls of layers of the module."""
        return [part for part in self.parts if self.calls_layer(part)]

    @staticmethod
    def is_term(value: Any) -> bool:
        """Whether it is a part of the expression, and no plain value in one."""
        return isinstance(value, Term)

    @staticmethod
    def is_activation(term: Term) -> bool:
        """Whether it is a known elementwise function of its first argument."""
        return term.op in ACTIVATIONS

    @staticmethod
    def calls_layer(term: Any) -> bool:
        """Whether it is the call of a layer of the module."""
        return isinstance(term, Term) and term.op == "call" and attribute_path(term.args[0]) is not None


def ops_with_core(term: Term) -> tuple[Op, ...]:
    """The ops whose core expression the term holds, the commonest first."""
    parts = walk(term)
    if len(parts) > _MOST_PARTS:
        return ()
    expression = Expression(parts)
    return tuple(op for op in template_ops() if (core := op.hook("core")) is not None and core(expression))


def near_misses(term: Term, run: Run) -> tuple[NearMiss, ...]:
    """The nearest variant of every op whose core expression the term holds."""
    return tuple(found for op in ops_with_core(term) if (found := _nearest(op, term, run)) is not None)


def _nearest(op: Op, term: Term, run: Run) -> NearMiss | None:
    best = None
    parts = walk(term)
    possible = tuple(templates(op).among({part.op for part in parts}))
    kinds = holes(op, of_function=all(part.op != "self" for part in parts))
    for template in possible:
        found = difference(template.term, term, kinds)
        if found is not None:
            share = found.agreed / len(walk(template.term))
            if best is None or share > best[0]:
                best = (share, template, found)
    if not possible:
        return None
    if best is None:
        # Equal to the last operation, and it does more than compute.
        return NearMiss(op.name, possible[0].variant, "; ".join(run.effects) or "unknown")
    share, template, found = best
    if share < _NEAR:
        return None
    return NearMiss(op.name, template.variant, f"expected {found.expected}, found {found.found}")
