"""Places where queries and keys pass a layer each, and then one function of both and two tables."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, NamedTuple

from twinkle.match.symbolic.syntax import (
    given_names,
    layer_call,
    loaded,
    read_after,
    repeatable,
    stored,
    unchanged,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal

__all__ = ["Parent", "RotatedPair", "pair_at"]

_SHAPES = {"view": "split", "reshape": "split", "unflatten": "split"}


class RotatedPair(NamedTuple):
    """``q`` and ``k`` through a layer each, and then ``q, k = function(q, k, cos, sin)``.

    Attributes:
        first: The statement with the first of the two calls of layers.
        outside: The ``if`` under which the layers are called and the function is not, or None.
        conditions: Each ``if`` between, which can be asked ahead of ``first``, and whether it is to hold:
            the function is called under it, or it does something to queries and keys.
        calls: The calls of the layer on the queries and on the keys.
        paths: The two layers, as paths from ``self``.
        function: The name of the function.
        rotation: The call of the function.
        between: From the layers to the function there is ``nothing``, a ``transpose`` of dimensions 1 and
            2, or the ``split`` into heads and that transpose.
    """

    first: ast.stmt
    outside: ast.If | None
    conditions: tuple[tuple[ast.If, bool], ...]
    calls: tuple[ast.Call, ast.Call]
    paths: tuple[str, str]
    function: str
    rotation: ast.Call
    between: Literal["nothing", "transpose", "split"]


class Parent(NamedTuple):
    """The position of an ``if`` in the statements around it.

    Attributes:
        block: The statements.
        at: The index of the ``if``.
    """

    block: list[ast.stmt]
    at: int


def pair_at(
    block: list[ast.stmt],
    at: int,
    owner: str,
    node: ast.FunctionDef,
    parents: Mapping[int, Parent],
) -> RotatedPair | None:
    """The place that ends with a statement of a block, or None.

    Args:
        block: The statements.
        at: The index of the statement.
        owner: What the method calls ``self``.
        node: The method.
        parents: By the id of a block, for the bodies of its ``if`` statements.
    """
    statement = block[at]
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    call, target = statement.value, statement.targets[0]
    if not isinstance(target, ast.Tuple | ast.List) or len(target.elts) != 2:
        return None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or len(call.args) < 4:
        return None
    names = [argument.id for argument in call.args[:2] if isinstance(argument, ast.Name)]
    results = [element.id for element in target.elts if isinstance(element, ast.Name)]
    if len(set(names)) != 2 or len(results) != 2 or any(isinstance(a, ast.Starred) for a in call.args):
        return None
    own = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
    if call.func.id in own or any(call.func.id in stored(part) for part in node.body):
        return None
    q, k = (_layer_before(block, at, name, owner, parents) for name in names)
    if q is None or k is None or q.block is not k.block or (q.outside, q.steps) != (k.outside, k.steps):
        return None
    between = _BETWEEN.get(q.steps)
    if between is None or q.at == k.at:
        return None
    # Nobody else may see queries or keys that the layer has not been applied to.
    rest = [value for argument in call.args[2:] for value in loaded(argument)]
    rest += [value for keyword in call.keywords for value in loaded(keyword.value)]
    if any(name in rest or (name not in results and read_after(node, name, statement)) for name in names):
        return None
    first = q.block[min(q.at, k.at)]
    # In the order of the source: an outer condition may be what makes it possible to ask an inner one.
    conditions = sorted({*q.conditions, *k.conditions}, key=lambda condition: condition[0].lineno)
    if not all(unchanged(branch.test, node, first, branch) for branch, _ in conditions):
        return None
    return RotatedPair(
        first, q.outside, tuple(conditions), (q.call, k.call), (q.path, k.path), call.func.id, call, between
    )


_BETWEEN: dict[tuple[str, ...], Literal["nothing", "transpose", "split"]] = {
    (): "nothing",
    ("transpose",): "transpose",
    ("split", "transpose"): "split",
}


class _LayerCall(NamedTuple):
    """The call of a layer on the way to a rotation.

    Attributes:
        block: The statements it stands in.
        at: Which of them it is.
        call: The call.
        path: The layer, as a path from ``self``.
        outside: The ``if`` under which the layer is called and the rotation is not, or None.
        steps: The changes of shape from the layer to the rotation.
        conditions: As of :class:`RotatedPair`.
    """

    block: list[ast.stmt]
    at: int
    call: ast.Call
    path: str
    outside: ast.If | None
    steps: tuple[str, ...]
    conditions: tuple[tuple[ast.If, bool], ...]


def _layer_before(
    block: list[ast.stmt], at: int, name: str, owner: str, parents: Mapping[int, Parent]
) -> _LayerCall | None:
    """The call of a layer whose result, up to a change of shape, ``name`` holds before a statement."""
    steps: list[str] = []
    conditions: list[tuple[ast.If, bool]] = []
    while True:
        at -= 1
        if at < 0:
            parent = parents.get(id(block))
            if parent is None:
                return None
            block, at = parent
            branch = block[at]
            assert isinstance(branch, ast.If)
            if not repeatable(branch.test, owner):
                return None
            conditions.append((branch, True))
            continue
        statement = block[at]
        if name not in stored(statement):
            if name not in loaded(statement):
                continue
            # Such as a clamp that a setting asks for: it has to see queries and keys that passed the layer.
            if not isinstance(statement, ast.If) or not repeatable(statement.test, owner):
                return None
            if statement.orelse or name in loaded(statement.test):
                return None
            conditions.append((statement, False))
            continue
        if isinstance(statement, ast.If):
            if steps and steps != ["transpose"]:
                return None
            found = _layer_inside(statement, name, owner)
            if found is None:
                return None
            inside, index, call, path = found
            return _LayerCall(inside, index, call, path, statement, tuple(steps), tuple(conditions))
        value = _value_for(statement, name)
        if value is None:
            return None
        inner = _peel(value, steps)
        if isinstance(inner, ast.Name) and inner.id == name and inner is not value:
            continue
        layer = layer_call(inner, owner)
        if layer is None:
            return None
        return _LayerCall(block, at, *layer, None, tuple(reversed(steps)), tuple(conditions))


def _layer_inside(branch: ast.If, name: str, owner: str) -> tuple[list[ast.stmt], int, ast.Call, str] | None:
    """The call of the layer that gives ``name`` its value in an ``if`` that does nothing but call layers."""
    if branch.orelse or name in stored(branch.test):
        return None
    found = None
    for index, statement in enumerate(branch.body):
        other = given_names(statement)
        if other is None or len(other[0]) != 1:
            return None
        call = layer_call(other[1], owner)
        # Each of the statements is `x = self.layer(x)`: the names keep their shapes either way.
        if call is None or not isinstance(call[0].args[0], ast.Name) or call[0].args[0].id != other[0][0]:
            return None
        if other[0] == [name]:
            if found is not None:
                return None
            found = (branch.body, index, *call)
    return found


def _value_for(statement: ast.stmt, name: str) -> ast.expr | None:
    given = given_names(statement)
    return given[1] if given is not None and given[0] == [name] else None


def _peel(node: ast.expr, steps: list[str]) -> ast.expr:
    """The expression without its changes of shape, which are appended to ``steps``, the last one first."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.keywords:
        step = _SHAPES.get(node.func.attr)
        if step is None and node.func.attr in ("transpose", "permute"):
            numbers = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            wanted = ((1, 2), (2, 1)) if node.func.attr == "transpose" else ((0, 2, 1, 3),)
            step = "transpose" if len(numbers) == len(node.args) and tuple(numbers) in wanted else None
        if step is None:
            return node
        steps.append(step)
        node = node.func.value
    return node
