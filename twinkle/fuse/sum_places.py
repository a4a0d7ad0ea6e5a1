"""Places where a sum of two values is computed and then, as the next step, a layer of it."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, NamedTuple

from twinkle.match.symbolic.syntax import (
    asks_for_none,
    first_step,
    given_names,
    layer_call,
    loaded,
    own_nodes,
    path_of,
    repeatable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SumThenLayer", "sum_before_layer", "sums_inside_calls"]


class SumThenLayer(NamedTuple):
    """``total = left + right`` and then ``self.path(total)``; or ``self.path(left + right)``.

    Attributes:
        total: The statement that gives the sum its names; None where nothing does.
        then: The statement with the call; None where the sum is the argument of the call.
        when: The condition of ``then``, where it is an ``if`` and the call the first step under it; or that
            of an ``if`` before ``then``.
        call: The call.
        path: The layer, as a path from ``self``.
        left, right: The addends; ``right`` without its factor.
        scale: The factor of ``right``, an attribute of ``self`` or a number, or None.
        skipped: Whether the statement under ``when`` is between the two: where it runs there is no place.
    """

    total: ast.stmt | None
    then: ast.stmt | None
    when: ast.expr | None
    call: ast.Call
    path: str
    left: ast.expr
    right: ast.expr
    scale: ast.expr | None
    skipped: bool = False


def sum_before_layer(block: list[ast.stmt], at: int, owner: str) -> SumThenLayer | None:
    """The place that begins at a statement of a block, or None.

    Args:
        block: The statements.
        at: The index of the statement.
        owner: What the method calls ``self``.
    """
    given = given_names(block[at])
    total = None if given is None else _sum(given[1])
    if given is None or total is None:
        return None
    names = set(given[0])
    then, when, skipped = _past_names(block, at + 1, names), None, False
    found = None if then == len(block) else _call_of(block[then], owner, names)
    if found is None and then < len(block):
        step = block[then]
        if isinstance(step, ast.If) and repeatable(step.test, owner) and not loaded(step.test) & names:
            when, found = step.test, _call_of(step.body[0], owner, names)
        if found is None and _may_be_skipped(step, names):
            when, skipped = step.test, True  # type: ignore[attr-defined]
            then = _past_names(block, then + 1, names)
            found = None if then == len(block) else _call_of(block[then], owner, names)
    if found is None:
        return None
    left, right, scale = _addends(total, owner)
    return SumThenLayer(block[at], block[then], when, *found, left, right, scale, skipped)


def _call_of(step: ast.stmt, owner: str, names: set[str]) -> tuple[ast.Call, str] | None:
    """The call of a layer with one of these names, where it is the first step of a statement."""
    found = layer_call(first_step(step, owner), owner)
    argument = None if found is None else found[0].args[0]
    return found if isinstance(argument, ast.Name) and argument.id in names else None


def _past_names(block: list[ast.stmt], at: int, names: set[str]) -> int:
    """The index of the first statement that does more than to give the sum another name; ``names`` grows."""
    while at < len(block):
        more = given_names(block[at])
        if more is None or not isinstance(more[1], ast.Name) or more[1].id not in names:
            break
        names.update(more[0])
        at += 1
    return at


def _may_be_skipped(step: ast.stmt, names: set[str]) -> bool:
    """Whether a statement is left out where local names are None, or are not: nothing can change that before.

    A decoder's second attention stands under such a condition, between the sum and the norm of most calls.
    """
    if not isinstance(step, ast.If) or step.orelse or loaded(step.test) & names:
        return False
    return all(asks_for_none(part) for part in _terms(step.test))


def _terms(test: ast.expr) -> list[ast.expr]:
    if isinstance(test, ast.BoolOp):
        return [term for value in test.values for term in _terms(value)]
    return [test]


def sums_inside_calls(node: ast.FunctionDef, owner: str) -> Iterator[SumThenLayer]:
    """The places where the sum is written as the argument of the layer.

    Args:
        node: The method.
        owner: What the method calls ``self``.
    """
    for part in own_nodes(node):
        found = layer_call(part, owner)
        total = None if found is None else _sum(found[0].args[0])
        if found is not None and total is not None:
            left, right, scale = _addends(total, owner)
            yield SumThenLayer(None, None, None, *found, left, right, scale)


def _sum(node: ast.expr) -> ast.BinOp | None:
    return node if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) else None


def _addends(total: ast.BinOp, owner: str) -> tuple[ast.expr, ast.expr, ast.expr | None]:
    """Left and right addend and the factor of the right one: an attribute of ``self``, a number or None."""
    node = total.right
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for side, other in ((node.right, node.left), (node.left, node.right)):
            number = isinstance(side, ast.Constant) and type(side.value) is float
            if number or path_of(side, owner) is not None:
                return total.left, other, side
    return total.left, node, None
