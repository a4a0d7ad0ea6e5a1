"""Places where a sum of two values is computed and then, as the next step, a layer of it."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, NamedTuple

from twinkle.match.symbolic.syntax import first_step, given_names, loaded, own_nodes, path_of, repeatable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SumThenLayer", "sum_before_layer", "sums_inside_calls"]


class SumThenLayer(NamedTuple):
    """``total = left + right`` and then ``self.path(total)``; or ``self.path(left + right)``.

    Attributes:
        total: The statement that gives the sum its names; None where nothing does.
        then: The statement with the call; None where the sum is the argument of the call.
        when: The condition of ``then``, where it is an ``if`` and the call the first step under it.
        call: The call.
        path: The layer, as a path from ``self``.
        left, right: The addends; ``right`` without its factor.
        scale: The factor of ``right``, an attribute of ``self`` or a number, or None.
    """

    total: ast.stmt | None
    then: ast.stmt | None
    when: ast.expr | None
    call: ast.Call
    path: str
    left: ast.expr
    right: ast.expr
    scale: ast.expr | None


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
    then = at + 1
    while then < len(block):
        more = given_names(block[then])
        if more is None or not isinstance(more[1], ast.Name) or more[1].id not in names:
            break
        names.update(more[0])
        then += 1
    if then == len(block):
        return None
    step, when = block[then], None
    if isinstance(step, ast.If) and repeatable(step.test, owner) and not loaded(step.test) & names:
        when, step = step.test, step.body[0]
    found = _layer_call(first_step(step, owner), owner)
    if found is None:
        return None
    (call, path), argument = found, found[0].args[0]
    if not isinstance(argument, ast.Name) or argument.id not in names:
        return None
    left, right, scale = _addends(total, owner)
    return SumThenLayer(block[at], block[then], when, call, path, left, right, scale)


def sums_inside_calls(node: ast.FunctionDef, owner: str) -> Iterator[SumThenLayer]:
    """The places where the sum is written as the argument of the layer.

    Args:
        node: The method.
        owner: What the method calls ``self``.
    """
    for part in own_nodes(node):
        found = _layer_call(part, owner)
        total = None if found is None else _sum(found[0].args[0])
        if found is not None and total is not None:
            left, right, scale = _addends(total, owner)
            yield SumThenLayer(None, None, None, *found, left, right, scale)


def _sum(node: ast.expr) -> ast.BinOp | None:
    return node if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) else None


def _layer_call(node: ast.AST | None, owner: str) -> tuple[ast.Call, str] | None:
    if not isinstance(node, ast.Call) or node.keywords or len(node.args) != 1:
        return None
    path = path_of(node.func, owner)
    return None if path is None else (node, path)


def _addends(total: ast.BinOp, owner: str) -> tuple[ast.expr, ast.expr, ast.expr | None]:
    """Left and right addend and the factor of the right one: an attribute of ``self``, a number or None."""
    node = total.right
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for side, other in ((node.right, node.left), (node.left, node.right)):
            number = isinstance(side, ast.Constant) and type(side.value) is float
            if number or path_of(side, owner) is not None:
                return total.left, other, side
    return total.left, node, None
