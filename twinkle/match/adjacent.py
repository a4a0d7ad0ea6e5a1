"""Steps of one forward that stand next to each other and that one kernel can do.

Two patterns, in the statements of a function:

- a sum of two values that a name is given, and the call of a layer with that sum as the next thing that
  is computed (``h = residual + x; y = self.norm(h)``);
- two layers called with queries and keys, then nothing but a transpose (or the split into heads) on the
  way to a function of both and two tables (``q, k = rotate(q, k, cos, sin)``).

What the layers and the function are is not asked here. Names of classes and families play no part, but a
place is only found where the statements between cannot change the outcome; the rest is left alone.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal

__all__ = ["Place", "RotatedPair", "SumThenLayer", "find_places", "path_of"]

_SHAPES = {"view": "split", "reshape": "split", "unflatten": "split"}


class SumThenLayer(NamedTuple):
    """``total = left + right`` and, as the next step, ``self.path(total)``.

    Attributes:
        block: The statements among which both stand.
        at: The index of the sum.
        then: The index of the statement with the call.
        call: The call.
        path: The layer, as a path from ``self``.
        left, right: The addends; ``right`` without its factor.
        scale: The factor of ``right``, an attribute of ``self`` or a number, or None.
    """

    block: list[ast.stmt]
    at: int
    then: int
    call: ast.Call
    path: str
    left: ast.expr
    right: ast.expr
    scale: ast.expr | None


class RotatedPair(NamedTuple):
    """``q`` and ``k`` through a layer each, and then ``q, k = function(q, k, cos, sin)``.

    Attributes:
        block: The statements among which the function is called.
        at: The index of that statement.
        layer_block: The statements among which the layers are called.
        first: The index there of the first of the two.
        outside: Where ``layer_block`` is the body of an ``if`` of ``block``: its index there.
        calls: The calls of the layer on the queries and on the keys.
        paths: The two layers, as paths from ``self``.
        function: The name of the function.
        rotation: The call of the function.
        between: From the layers to the function there is ``nothing``, a ``transpose`` of dimensions 1 and
            2, or the ``split`` into heads and that transpose.
    """

    block: list[ast.stmt]
    at: int
    layer_block: list[ast.stmt]
    first: int
    outside: int | None
    calls: tuple[ast.Call, ast.Call]
    paths: tuple[str, str]
    function: str
    rotation: ast.Call
    between: Literal["nothing", "transpose", "split"]


Place = SumThenLayer | RotatedPair


def find_places(node: ast.FunctionDef) -> list[Place]:
    """The places in a method, in the order of the source.

    Args:
        node: Its definition; the places refer to its nodes.
    """
    if not node.args.args and not node.args.posonlyargs:
        return []
    owner = (*node.args.posonlyargs, *node.args.args)[0].arg
    if any(owner in _stored(statement) for statement in node.body):
        return []
    places: list[Place] = []
    taken: set[int] = set()
    for block, in_loop in _blocks(node.body):
        for at, statement in enumerate(block):
            total = _sum_at(block, at, owner)
            if total is not None and id(total.call) not in taken:
                taken.add(id(total.call))
                places.append(total)
            elif not in_loop and isinstance(statement, ast.Assign):
                pair = _pair_at(block, at, owner, node)
                if pair is not None:
                    places.append(pair)
    return places


def path_of(node: ast.expr, owner: str) -> str | None:
    """``a.b`` for ``self.a.b``."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not names or not isinstance(node, ast.Name) or node.id != owner:
        return None
    return ".".join(reversed(names))


def _blocks(body: list[ast.stmt], in_loop: bool = False) -> Iterator[tuple[list[ast.stmt], bool]]:
    """Every list of statements that belongs to the function itself, and whether it is repeated."""
    yield body, in_loop
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        repeated = in_loop or isinstance(statement, ast.For | ast.While | ast.AsyncFor)
        for field in ("body", "orelse", "finalbody"):
            inner = getattr(statement, field, None)
            if inner:
                yield from _blocks(inner, repeated)
        for handler in getattr(statement, "handlers", ()):
            yield from _blocks(handler.body, repeated)


# -- names ----------------------------------------------------------------------------------------


def _stored(node: ast.AST) -> set[str]:
    """The names that a statement binds or deletes, at any depth."""
    found = {
        part.id
        for part in ast.walk(node)
        if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load)
    }
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(part.name)
        elif isinstance(part, ast.Global | ast.Nonlocal):
            found.update(part.names)
        elif isinstance(part, ast.Import | ast.ImportFrom):
            found.update((alias.asname or alias.name).partition(".")[0] for alias in part.names)
        elif isinstance(part, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and part.name:
            found.add(part.name)
    return found


def _loaded(node: ast.AST) -> set[str]:
    return {
        part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)
    }


def _given_names(statement: ast.stmt) -> tuple[list[str], ast.expr] | None:
    """The plain names that a statement gives a value, and the value."""
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets: list[ast.expr] = [statement.target]
        value = statement.value
    elif isinstance(statement, ast.Assign):
        targets, value = statement.targets, statement.value
    else:
        return None
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return (names, value) if len(names) == len(targets) else None


# -- a sum and a layer ----------------------------------------------------------------------------


def _sum_at(block: list[ast.stmt], at: int, owner: str) -> SumThenLayer | None:
    given = _given_names(block[at])
    if given is None or not isinstance(given[1], ast.BinOp) or not isinstance(given[1].op, ast.Add):
        return None
    names, value = set(given[0]), given[1]
    then = at + 1
    while then < len(block):
        more = _given_names(block[then])
        if more is None or not isinstance(more[1], ast.Name) or more[1].id not in names:
            break
        names.update(more[0])
        then += 1
    if then == len(block):
        return None
    call = _first_step(block[then])
    if not isinstance(call, ast.Call) or call.keywords or len(call.args) != 1:
        return None
    argument, path = call.args[0], path_of(call.func, owner)
    if path is None or not isinstance(argument, ast.Name) or argument.id not in names:
        return None
    right, scale = _factor(value.right, owner)
    return SumThenLayer(block, at, then, call, path, value.left, right, scale)


def _factor(node: ast.expr, owner: str) -> tuple[ast.expr, ast.expr | None]:
    """A product with an attribute of ``self`` or a number, as its two sides."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for side, other in ((node.right, node.left), (node.left, node.right)):
            number = isinstance(side, ast.Constant) and type(side.value) is float
            if number or path_of(side, owner) is not None:
                return other, side
    return node, None


def _first_step(statement: ast.stmt) -> ast.expr | None:
    """What a statement computes first; reading names and attributes does not count."""
    if isinstance(statement, ast.Assign):
        # A target such as `a[i]` is evaluated after the value.
        value: ast.expr | None = statement.value
    elif isinstance(statement, ast.AnnAssign | ast.Return | ast.Expr):
        value = statement.value
    else:
        return None
    return None if value is None else _first(value)


_OPAQUE = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.BoolOp, ast.IfExp,
           ast.Compare, ast.NamedExpr, ast.JoinedStr, ast.Await, ast.Yield, ast.YieldFrom)  # fmt: skip


def _first(node: ast.expr) -> ast.expr | None:
    if isinstance(node, _OPAQUE):
        return node
    for child in _operands(node):
        found = _first(child)
        if found is not None:
            return found
    reads = (ast.Name, ast.Attribute, ast.Constant, ast.Starred, ast.Tuple, ast.List, ast.Dict, ast.Slice)
    return None if isinstance(node, reads) else node


def _operands(node: ast.expr) -> list[ast.expr]:
    """The operands in the order of evaluation."""
    if isinstance(node, ast.Call):
        return [node.func, *node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node, ast.Dict):
        return [
            part for pair in zip(node.keys, node.values, strict=True) for part in pair if part is not None
        ]
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]


# -- queries and keys -----------------------------------------------------------------------------


class _Found(NamedTuple):
    block: list[ast.stmt]
    place: int
    outside: int | None
    call: ast.Call
    path: str
    steps: tuple[str, ...]


def _pair_at(block: list[ast.stmt], at: int, owner: str, node: ast.FunctionDef) -> RotatedPair | None:
    statement = block[at]
    assert isinstance(statement, ast.Assign)
    call, target = statement.value, statement.targets[0]
    if len(statement.targets) != 1 or not isinstance(target, ast.Tuple | ast.List) or len(target.elts) != 2:
        return None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or len(call.args) < 4:
        return None
    names = [argument.id for argument in call.args[:2] if isinstance(argument, ast.Name)]
    results = [element.id for element in target.elts if isinstance(element, ast.Name)]
    if len(set(names)) != 2 or len(results) != 2 or any(isinstance(a, ast.Starred) for a in call.args):
        return None
    own = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
    if call.func.id in own or any(call.func.id in _stored(part) for part in node.body):
        return None
    q, k = (_layer_before(block, at, name, owner) for name in names)
    if q is None or k is None or q.block is not k.block or q.steps != k.steps:
        return None
    between = _BETWEEN.get(q.steps)
    if between is None or q.place == k.place:
        return None
    # Nobody else may see queries or keys that the layer has not been applied to.
    rest = [value for argument in call.args[2:] for value in _loaded(argument)]
    rest += [value for keyword in call.keywords for value in _loaded(keyword.value)]
    if any(name in rest or (name not in results and _seen_after(node, name, statement)) for name in names):
        return None
    return RotatedPair(
        block, at, q.block, min(q.place, k.place), q.outside, (q.call, k.call), (q.path, k.path),
        call.func.id, call, between,
    )  # fmt: skip


_BETWEEN: dict[tuple[str, ...], Literal["nothing", "transpose", "split"]] = {
    (): "nothing",
    ("transpose",): "transpose",
    ("split", "transpose"): "split",
}


def _seen_after(node: ast.FunctionDef, name: str, statement: ast.stmt) -> bool:
    end = (statement.end_lineno or statement.lineno, statement.end_col_offset or 0)
    return any(
        isinstance(part, ast.Name) and part.id == name and (part.lineno, part.col_offset) >= end
        for part in ast.walk(node)
    )


def _layer_before(block: list[ast.stmt], at: int, name: str, owner: str) -> _Found | None:
    """The call of a layer whose result, up to a change of shape, ``name`` holds before a statement."""
    steps: list[str] = []
    for index in range(at - 1, -1, -1):
        statement = block[index]
        if name not in _stored(statement):
            if name in _loaded(statement):
                return None
            continue
        if isinstance(statement, ast.If):
            return (
                None
                if steps and steps != ["transpose"]
                else _layer_inside(statement, index, name, owner, steps)
            )
        value = _value_for(statement, name)
        if value is None:
            return None
        inner = _peel(value, steps)
        if isinstance(inner, ast.Name) and inner.id == name and inner is not value:
            continue
        found = _layer_call(inner, owner)
        if found is None:
            return None
        return _Found(block, index, None, *found, tuple(reversed(steps)))
    return None


def _layer_inside(branch: ast.If, outside: int, name: str, owner: str, steps: list[str]) -> _Found | None:
    """The same, where it stands under an ``if`` on an attribute of ``self``, with nothing else."""
    if branch.orelse or path_of(branch.test, owner) is None:
        return None
    found = None
    for index, statement in enumerate(branch.body):
        value = _value_for(statement, name)
        other = _given_names(statement)
        if other is None or len(other[0]) != 1:
            return None
        call = _layer_call(other[1], owner)
        # Each of the statements is `x = self.layer(x)`: the names keep their shapes either way.
        if call is None or not isinstance(call[0].args[0], ast.Name) or call[0].args[0].id != other[0][0]:
            return None
        if value is not None:
            if found is not None:
                return None
            found = _Found(branch.body, index, outside, *call, tuple(reversed(steps)))
    return found


def _value_for(statement: ast.stmt, name: str) -> ast.expr | None:
    given = _given_names(statement)
    return given[1] if given is not None and given[0] == [name] else None


def _layer_call(node: ast.expr, owner: str) -> tuple[ast.Call, str] | None:
    if not isinstance(node, ast.Call) or node.keywords or len(node.args) != 1:
        return None
    path = path_of(node.func, owner)
    if path is None or isinstance(node.args[0], ast.Starred):
        return None
    return node, path


def _peel(node: ast.expr, steps: list[str]) -> ast.expr:
    """What is below changes of shape; these are noted from the outside in."""
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
