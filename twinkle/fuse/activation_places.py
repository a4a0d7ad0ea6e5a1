"""Places where a layer is called and then, as the next step, an elementwise function of its result alone."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, NamedTuple

from twinkle.match.symbolic.syntax import first_step, given_names, loaded, own_nodes, path_of, stored

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LayerThenActivation", "activation_after_layer", "activations_of_calls", "visible_names"]


class LayerThenActivation(NamedTuple):
    """``h = self.path(x)`` and then ``h = act(h)``; or ``act(self.path(x))``.

    Nothing but the activation reads what the layer gave.

    Attributes:
        given: The statements that give the layer's result its name: one, or one in each branch of an ``if``
            that ends with it. None where the call is the argument of the activation.
        calls: Their calls of the layer.
        path: The layer, as a path from ``self``.
        outside: The ``if`` whose branches end with them, or None.
        activation: What is replaced: the expression ``act(h)`` or ``h * sigmoid(h)``, or the statement
            ``h *= sigmoid(h)``.
        function: What is called with the result: a layer of ``self``, or a function by its dotted name. None
            for a ``h * h.sigmoid()``.
        written: Whether the activation is the product of the result and that function of it.
        function_path: The function as a path from ``self``, or None.
    """

    given: tuple[ast.stmt, ...]
    calls: tuple[ast.Call, ...]
    path: str
    outside: ast.If | None
    activation: ast.expr | ast.AugAssign
    function: ast.expr | None
    written: bool
    function_path: str | None

    @property
    def function_name(self) -> str | None:
        """The dotted name of the function, where it is no layer of ``self``."""
        named = self.function is not None and self.function_path is None
        return ast.unparse(self.function) if named and self.function is not None else None


def activation_after_layer(
    block: list[ast.stmt], at: int, owner: str, node: ast.FunctionDef, visible: set[str]
) -> LayerThenActivation | None:
    """The place whose activation is the first step of a statement of a block, or None.

    Args:
        block: The statements.
        at: The index of the statement.
        owner: What the method calls ``self``.
        node: The method.
        visible: Names that code outside the statements of the method may read; see :func:`visible_names`.
    """
    if at == 0:
        return None
    before, outside = block[at - 1], None
    given = [before]
    if isinstance(before, ast.If):
        given, outside = list(_last_statements(before)), before
    found = [(one, *call) for one in given if (call := _named_call(one, owner)) is not None]
    if not found:
        return None
    name, path = found[0][1], found[0][3]
    if name in visible or any((other, place) != (name, path) for _, other, _, place in found):
        return None
    activation = _activation_of(block[at], owner, name)
    if activation is None or not _nothing_else_reads(block[at], activation[0], name, node):
        return None
    return LayerThenActivation(
        tuple(statement for statement, *_ in found),
        tuple(call for *_, call, _ in found),
        path,
        outside,
        *activation,
    )


def activations_of_calls(node: ast.FunctionDef, owner: str) -> Iterator[LayerThenActivation]:
    """The places where the call of the layer is written as the argument of the activation.

    Args:
        node: The method.
        owner: What the method calls ``self``.
    """
    for part in own_nodes(node):
        if isinstance(part, ast.Call) and len(part.args) == 1 and _plain(part):
            call = _layer_call(part.args[0], owner)
            if call is not None and _is_named(part.func, owner):
                function_path = path_of(part.func, owner)
                yield LayerThenActivation(
                    (), (call[0],), call[1], None, part, part.func, False, function_path
                )


def visible_names(node: ast.FunctionDef) -> set[str]:
    """The names of a method that functions inside it, other functions and ``locals()`` may read."""
    found: set[str] = set()
    for part in ast.walk(node):
        inner = isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)
        if (inner and part is not node) or isinstance(
            part, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
        ):
            found |= loaded(part)
        elif isinstance(part, ast.Global | ast.Nonlocal):
            found.update(part.names)
        elif isinstance(part, ast.Name) and part.id in ("locals", "vars", "eval", "exec"):
            found |= stored(node)
    return found


def _last_statements(branches: ast.If) -> Iterator[ast.stmt]:
    """The last statement of each branch; of one that is an ``if`` again, those of its branches."""
    for body in (branches.body, branches.orelse):
        if body and isinstance(body[-1], ast.If):
            yield from _last_statements(body[-1])
        elif body:
            yield body[-1]


def _named_call(statement: ast.stmt, owner: str) -> tuple[str, ast.Call, str] | None:
    """The name that a statement gives the result of a layer, the call and the path of the layer."""
    given = given_names(statement)
    call = None if given is None or len(given[0]) != 1 else _layer_call(given[1], owner)
    return None if given is None or call is None else (given[0][0], *call)


def _layer_call(node: ast.expr, owner: str) -> tuple[ast.Call, str] | None:
    if not isinstance(node, ast.Call) or node.keywords or len(node.args) != 1:
        return None
    path = path_of(node.func, owner)
    return None if path is None or isinstance(node.args[0], ast.Starred) else (node, path)


_Activation = tuple[ast.expr | ast.AugAssign, ast.expr | None, bool, str | None]


def _activation_of(statement: ast.stmt, owner: str, name: str) -> _Activation | None:
    """The activation of a name that a statement begins with: the last four fields of a place."""
    if isinstance(statement, ast.AugAssign):
        function = _sigmoid(statement.value, owner, name)
        in_place = isinstance(statement.op, ast.Mult) and _is(statement.target, name)
        return (statement, *function) if in_place and function is not None else None
    step = first_step(statement, owner)
    if not isinstance(step, ast.Call):
        return None
    function = _sigmoid(step, owner, name)
    product = next((one for one in own_nodes(statement) if _is_product(one, step, name)), None)
    if function is not None and isinstance(product, ast.BinOp):
        return (product, *function)
    if len(step.args) == 1 and _is(step.args[0], name) and _plain(step) and _is_named(step.func, owner):
        return step, step.func, False, path_of(step.func, owner)
    return None


def _sigmoid(node: ast.expr, owner: str, name: str) -> tuple[ast.expr | None, bool, None] | None:
    """What may be a sigmoid of a name: a call of a function by its name, or of the method."""
    if not isinstance(node, ast.Call) or node.keywords:
        return None
    if not node.args and isinstance(node.func, ast.Attribute) and node.func.attr == "sigmoid":
        return (None, True, None) if _is(node.func.value, name) else None
    named = len(node.args) == 1 and _is(node.args[0], name) and _is_named(node.func, owner)
    return (node.func, True, None) if named and path_of(node.func, owner) is None else None


def _is_product(node: ast.AST, gate: ast.expr, name: str) -> bool:
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return False
    return (node.left is gate and _is(node.right, name)) or (node.right is gate and _is(node.left, name))


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _plain(call: ast.Call) -> bool:
    """Whether a call has no arguments but one, and whether that may be written to."""
    return all(
        word.arg == "inplace" and isinstance(word.value, ast.Constant) and type(word.value.value) is bool
        for word in call.keywords
    )


def _is_named(function: ast.expr, owner: str) -> bool:
    """Whether a function is a layer, or is found by a dotted name."""
    if path_of(function, owner) is not None:
        return True
    while isinstance(function, ast.Attribute):
        function = function.value
    return isinstance(function, ast.Name) and function.id != owner


def _nothing_else_reads(then: ast.stmt, activation: ast.AST, name: str, node: ast.FunctionDef) -> bool:
    """Whether only the activation reads what a name is given before it.

    Its statement gives the name another value, or is the end of the method, or no statement below reads the
    name and none is repeated.
    """
    if isinstance(then, ast.AugAssign):
        return True
    if len(_reads(then, name)) != len(_reads(activation, name)):
        return False
    given = given_names(then)
    if given is not None and name in given[0]:
        return True
    kinds = {type(part) for part in ast.walk(node)}
    if isinstance(then, ast.Return) and not kinds & _HANDLERS:
        return True
    below = [part for part in _reads(node, name) if part.lineno > (then.end_lineno or then.lineno)]
    beside = [part for part in _reads(node, name) if then.lineno <= part.lineno <= (then.end_lineno or 0)]
    return not below and len(beside) == len(_reads(then, name)) and not kinds & _LOOPS


_HANDLERS = {ast.Try, getattr(ast, "TryStar", ast.Try)}
_LOOPS = {ast.For, ast.While, ast.AsyncFor}


def _reads(node: ast.AST, name: str) -> list[ast.Name]:
    return [
        part
        for part in ast.walk(node)
        if isinstance(part, ast.Name) and part.id == name and not isinstance(part.ctx, ast.Store)
    ]
