"""Questions about the statements of a method: names, order of evaluation, repeatable conditions."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "asks_for_none",
    "first_step",
    "given_names",
    "layer_call",
    "loaded",
    "own_nodes",
    "path_of",
    "read_after",
    "repeatable",
    "stored",
    "unchanged",
]

_OTHERS = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)


def path_of(node: ast.expr, owner: str) -> str | None:
    """``a.b`` for ``self.a.b``, and ``a[0].b`` for ``self.a[0].b``."""
    path = ""
    while True:
        if isinstance(node, ast.Attribute):
            path = f".{node.attr}{path}"
        elif isinstance(node, ast.Subscript) and _is_index(node.slice):
            path = f"[{ast.unparse(node.slice)}]{path}"
        else:
            break
        node = node.value
    if not path.startswith(".") or not isinstance(node, ast.Name) or node.id != owner:
        return None
    return path[1:]


def _is_index(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int


def layer_call(node: ast.AST | None, owner: str) -> tuple[ast.Call, str] | None:
    """The call of a layer with one argument that a node is, and the layer as a path; None for all else."""
    if not isinstance(node, ast.Call) or node.keywords or len(node.args) != 1:
        return None
    path = path_of(node.func, owner)
    if path is None or isinstance(node.args[0], ast.Starred):
        return None
    return node, path


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below a node, but for those of functions, classes and comprehensions inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _OTHERS):
            yield child
            yield from own_nodes(child)


# -- names ----------------------------------------------------------------------------------------


def stored(node: ast.AST) -> set[str]:
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


def loaded(node: ast.AST) -> set[str]:
    """The names that a statement or an expression reads, at any depth."""
    return {
        part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)
    }


def given_names(statement: ast.stmt) -> tuple[list[str], ast.expr] | None:
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


def read_after(node: ast.FunctionDef, name: str, statement: ast.stmt) -> bool:
    """Whether a name stands anywhere behind a statement in the source of a function."""
    end = (statement.end_lineno or statement.lineno, statement.end_col_offset or 0)
    return any(
        isinstance(part, ast.Name) and part.id == name and (part.lineno, part.col_offset) >= end
        for part in ast.walk(node)
    )


# -- order ----------------------------------------------------------------------------------------


def first_step(statement: ast.stmt, owner: str) -> ast.expr | None:
    """The expression that a statement computes first; reads of names, attributes and layers do not count."""
    if isinstance(statement, ast.Assign):
        # A target such as `a[i]` is evaluated after the value.
        value: ast.expr | None = statement.value
    elif isinstance(statement, ast.AnnAssign | ast.Return | ast.Expr):
        value = statement.value
    else:
        return None
    return None if value is None else _first(value, owner)


_OPAQUE = (
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.BoolOp,
    ast.IfExp,
    ast.Compare,
    ast.NamedExpr,
    ast.JoinedStr,
    ast.Await,
    ast.Yield,
    ast.YieldFrom,
)
_READS = (ast.Name, ast.Attribute, ast.Constant, ast.Starred, ast.Tuple, ast.List, ast.Dict, ast.Slice)


def _first(node: ast.expr, owner: str) -> ast.expr | None:
    if isinstance(node, _OPAQUE):
        return node
    for child in _operands(node, owner):
        found = _first(child, owner)
        if found is not None:
            return found
    return None if isinstance(node, _READS) else node


def _operands(node: ast.expr, owner: str) -> list[ast.expr]:
    """The operands in the order of evaluation."""
    if isinstance(node, ast.Call):
        function = [] if path_of(node.func, owner) is not None else [node.func]
        return [*function, *node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node, ast.Dict):
        return [
            part for pair in zip(node.keys, node.values, strict=True) for part in pair if part is not None
        ]
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]


# -- conditions -----------------------------------------------------------------------------------


def repeatable(test: ast.expr, owner: str) -> bool:
    """Whether a condition may be evaluated twice: it only reads ``self`` and compares names with None."""
    if isinstance(test, ast.BoolOp):
        return all(repeatable(part, owner) for part in test.values)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return repeatable(test.operand, owner)
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.comparators[0], ast.Constant):
        path, value = path_of(test.left, owner), test.comparators[0].value
        if isinstance(test.ops[0], ast.Is | ast.IsNot):
            return value is None and (path is not None or isinstance(test.left, ast.Name))
        return isinstance(test.ops[0], ast.Eq | ast.NotEq) and path is not None and isinstance(value, str)
    return path_of(test, owner) is not None


def asks_for_none(test: ast.expr) -> bool:
    """Whether a condition is that a name is None, or is not."""
    return (
        isinstance(test, ast.Compare)
        and isinstance(test.left, ast.Name)
        and len(test.ops) == 1
        and isinstance(test.ops[0], ast.Is | ast.IsNot)
        and isinstance(test.comparators[0], ast.Constant)
        and test.comparators[0].value is None
    )


def unchanged(test: ast.expr, node: ast.FunctionDef, start: ast.stmt, end: ast.stmt) -> bool:
    """Whether a method assigns nothing that a condition reads, from one statement up to another."""
    names = loaded(test)
    attributes = {part.attr for part in ast.walk(test) if isinstance(part, ast.Attribute)}
    for part in ast.walk(node):
        if isinstance(part, ast.Global | ast.Nonlocal) and names & {*part.names}:
            return False
        if not isinstance(part, ast.stmt) or not start.lineno <= part.lineno < end.lineno:
            continue
        written = {
            below.attr
            for below in ast.walk(part)
            if isinstance(below, ast.Attribute) and not isinstance(below.ctx, ast.Load)
        }
        if names & stored(part) or attributes & written:
            return False
    return True
