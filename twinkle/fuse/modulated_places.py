"""Places where a layer is called and its result multiplied with ``1 + scale``, and a shift added.

    y = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
    y = modulate(self.norm(x), shift, scale)

Scale and shift are names, or what indexing and casts make of them: that may be evaluated ahead of the layer.
"""

from __future__ import annotations

import ast
import copy
from typing import TYPE_CHECKING, NamedTuple

from twinkle.match.symbolic.syntax import (
    first_step,
    given_names,
    layer_call,
    loaded,
    own_nodes,
    read_after,
    stored,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "CalledModulation",
    "LayerThenModulation",
    "Modulation",
    "condition_of",
    "modulation_of",
    "modulations",
    "scale_in",
]

_VIEWS = ("unsqueeze", "squeeze")
_PURE = (*_VIEWS, "float", "to", "type_as")
_STEPS = (
    *_PURE,
    *("chunk", "split", "unbind", "view", "reshape", "flatten", "unflatten", "size", "dim"),
    *("permute", "transpose", "expand", "type", "stack", "cat"),
)
"""Methods of tensors, and functions of torch, that only read, or make a view or a copy."""


class Modulation(NamedTuple):
    """``normed * factor + shift``, with a factor ``1 + scale``, or an index of that.

    Attributes:
        normed: What is modulated.
        factor: The factor.
        one: The number in it, 1 or 1.0.
        shift: What is added, or None.
        factor_first: The factor is evaluated before ``normed``.
    """

    normed: ast.expr
    factor: ast.expr
    one: int | float
    shift: ast.expr | None
    factor_first: bool


class LayerThenModulation(NamedTuple):
    """``self.path(x)`` and its modulation, in one expression or in two statements.

    Attributes:
        node: The expression that is the whole.
        named: The statement that gives the layer's result a name; None where nothing does.
        call: The call of the layer.
        path: The layer, as a path from ``self``.
        upcast: Its argument is ``x.float()``.
        widened: Its result is cast to float32.
        factor: ``1 + scale``.
        one: The number in it.
        shift: What is added, or None.
        like: The tensor to whose dtype the result is cast next, or None.
    """

    node: ast.expr
    named: ast.stmt | None
    call: ast.Call
    path: str
    upcast: bool
    widened: bool
    factor: ast.expr
    one: int | float
    shift: ast.expr | None
    like: ast.expr | None


class CalledModulation(NamedTuple):
    """``function(self.path(x), …)``: whether the function modulates, only the function can tell.

    Attributes:
        node: The call of the function.
        named: As of :class:`LayerThenModulation`, with all up to ``widened``.
        call: The call of the layer.
        path: The layer.
        upcast: Its argument is ``x.float()``.
        widened: Its result is cast to float32.
        function: The name of the function.
        like: The tensor to whose dtype the result is cast next, or None.
    """

    node: ast.Call
    named: ast.stmt | None
    call: ast.Call
    path: str
    upcast: bool
    widened: bool
    function: str
    like: ast.expr | None


# -- expressions ----------------------------------------------------------------------------------


def modulation_of(node: ast.expr, is_normed: Callable[[ast.expr], bool]) -> Modulation | None:
    """A modulation that an expression is, or None.

    Args:
        node: The expression.
        is_normed: Whether an expression is what may be modulated.
    """
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for product, shift in ((node.left, node.right), (node.right, node.left)):
            found = _product(product, is_normed)
            if found is not None and condition_of(shift):
                first = found.factor_first or shift is node.left
                return found._replace(shift=shift, factor_first=first)
        return None
    return _product(node, is_normed)


def _product(node: ast.expr, is_normed: Callable[[ast.expr], bool]) -> Modulation | None:
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return None
    for normed, factor in ((node.left, node.right), (node.right, node.left)):
        if is_normed(normed) and (one := one_plus(factor)) is not None:
            return Modulation(normed, factor, one[0], None, factor is node.left)
    return None


def one_plus(node: ast.expr) -> tuple[int | float, ast.BinOp, ast.expr] | None:
    """Of ``1 + scale``, or an index of it: the number, the sum, and the scale; None for all else."""
    while True:
        if isinstance(node, ast.Subscript) and _is_index(node.slice):
            node = node.value
        elif _method(node) in _VIEWS and _are_numbers(node):
            node = node.func.value  # type: ignore[attr-defined]
        else:
            break
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add):
        return None
    for number, scale in ((node.left, node.right), (node.right, node.left)):
        if isinstance(number, ast.Constant) and type(number.value) in (int, float) and number.value == 1:
            return (number.value, node, scale) if condition_of(scale) else None  # type: ignore[return-value]
    return None


def scale_in(factor: ast.expr) -> ast.expr:
    """The scale of a factor ``1 + scale``, with the indices that the factor has; a copy."""
    found = one_plus(factor)
    assert found is not None
    _, total, scale = found
    memo = {id(total): copy.deepcopy(scale)}
    return copy.deepcopy(factor, memo)


def condition_of(node: ast.expr) -> bool:
    """Whether an expression is a name, or an attribute, an index or a cast of one."""
    if isinstance(node, ast.Name):
        return True
    if isinstance(node, ast.Attribute):
        return condition_of(node.value)
    if isinstance(node, ast.Subscript):
        return _is_index(node.slice) and condition_of(node.value)
    if _method(node) not in _PURE or node.keywords:  # type: ignore[attr-defined]
        return False
    given: list[ast.expr] = node.args  # type: ignore[attr-defined]
    ready = all(_is_number(argument) or condition_of(argument) for argument in given)
    return ready and condition_of(node.func.value)  # type: ignore[attr-defined]


def _method(node: ast.expr) -> str:
    """The name of the method that an expression calls, or nothing."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr
    return ""


def _are_numbers(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and not node.keywords and all(map(_is_number, node.args))


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int


def _is_index(node: ast.expr) -> bool:
    if isinstance(node, ast.Tuple):
        return all(map(_is_index, node.elts))
    if isinstance(node, ast.Slice):
        return all(part is None or _is_number(part) for part in (node.lower, node.upper, node.step))
    if isinstance(node, ast.Constant) and (node.value is None or node.value is ...):
        return True
    return _is_number(node)


def _float(node: ast.expr) -> ast.expr | None:
    """What ``.float()`` is called on, or None."""
    if _method(node) != "float" or node.args or node.keywords:  # type: ignore[attr-defined]
        return None
    return node.func.value  # type: ignore[attr-defined,no-any-return]


# -- places ---------------------------------------------------------------------------------------

Place = LayerThenModulation | CalledModulation


def modulations(
    node: ast.FunctionDef, owner: str, blocks: Sequence[tuple[list[ast.stmt], bool]]
) -> Iterator[Place]:
    """The places of a method.

    Args:
        node: The method.
        owner: What the method calls ``self``.
        blocks: Its lists of statements, and whether each is repeated.
    """
    casts = {id(inner): like for part in own_nodes(node) for inner, like in _cast(part)}
    local = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
    local = local.union(*map(stored, node.body))
    handled = _handled(node)
    for block, repeated in blocks:
        for at in range(len(block)):
            named = _named(node, block, at, repeated, owner)
            if named is None or named.name in handled:
                continue
            for part in own_nodes(named.then):
                place = _place(part, owner, local, casts, named)
                first = first_step(named.then, owner)
                if place is not None and any(first is inside for inside in ast.walk(place.node)):
                    yield place
                    break
    for part in own_nodes(node):
        place = _place(part, owner, local, casts, None)
        if place is not None:
            yield place


def _cast(part: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What is cast to the dtype of a name, and the name."""
    if not isinstance(part, ast.Call) or len(part.args) != 1 or part.keywords:
        return
    kind, given = _method(part), part.args[0]
    if kind == "to" and isinstance(given, ast.Attribute) and given.attr == "dtype":
        given = given.value
    elif kind != "type_as":
        return
    if isinstance(given, ast.Name):
        yield part.func.value, given  # type: ignore[attr-defined]


def _handled(node: ast.FunctionDef) -> set[str]:
    """The names that are read where something was raised before."""
    found: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Try):
            found = found.union(*map(loaded, (*part.handlers, *part.finalbody)))
    return found


class _Named(NamedTuple):
    """A statement ``name = self.path(x)``, and a later one that alone reads the name.

    Attributes:
        name: The name.
        statement: The statement.
        then: The other one.
        call: The call of the layer.
        path: The layer.
    """

    name: str
    statement: ast.stmt
    then: ast.stmt
    call: ast.Call
    path: str


def _named(
    node: ast.FunctionDef, block: list[ast.stmt], at: int, repeated: bool, owner: str
) -> _Named | None:
    given = given_names(block[at])
    found = None if given is None else layer_call(given[1], owner)
    if given is None or found is None or len(given[0]) != 1:
        return None
    [name] = given[0]
    argument = found[0].args[0]
    for then in block[at + 1 :]:
        if name in loaded(then):
            again = given_names(then)
            over = again is not None and name in again[0]
            reads = [part for part in ast.walk(then) if isinstance(part, ast.Name) and part.id == name]
            once = sum(isinstance(part.ctx, ast.Load) for part in reads) == 1
            if not once or not (over or (not repeated and not read_after(node, name, then))):
                return None
            return _Named(name, block[at], then, *found)
        # The layer is called after what stands between: that may neither see its result nor change its input.
        free = condition_of(argument) and not stored(then) & ({name} | loaded(argument))
        if not free or not _is_harmless(then):
            return None
    return None


def _is_harmless(statement: ast.stmt) -> bool:
    """Whether a statement gives names to sums, products, indices and views, and does nothing else."""
    if not isinstance(statement, ast.Assign):
        return False
    targets = [part for target in statement.targets for part in getattr(target, "elts", [target])]
    names = [target.value if isinstance(target, ast.Starred) else target for target in targets]
    return all(isinstance(name, ast.Name) for name in names) and _computes(statement.value)


def _computes(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return _computes(node.left) and _computes(node.right)
    if isinstance(node, ast.UnaryOp):
        return _computes(node.operand)
    if isinstance(node, ast.Tuple | ast.List):
        return all(map(_computes, node.elts))
    if isinstance(node, ast.Attribute):
        return _computes(node.value)
    if isinstance(node, ast.Subscript):
        return _computes(node.value) and (_is_index(node.slice) or _computes(node.slice))
    if isinstance(node, ast.Call):
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        return _method(node) in _STEPS and _computes(node.func.value) and all(map(_computes, given))  # type: ignore[attr-defined]
    return isinstance(node, ast.Name | ast.Constant)


def _place(
    part: ast.AST, owner: str, local: set[str], casts: dict[int, ast.expr], named: _Named | None
) -> Place | None:
    """The place that an expression is, with a layer that is called in it, or whose result has a name."""
    if not isinstance(part, ast.BinOp | ast.Call):
        return None

    def call_of(node: ast.expr) -> tuple[ast.Call, str] | None:
        if named is None:
            return layer_call(node, owner)
        return (named.call, named.path) if isinstance(node, ast.Name) and node.id == named.name else None

    def is_normed(node: ast.expr) -> bool:
        inner = _float(node)
        return call_of(node) is not None or (inner is not None and call_of(inner) is not None)

    found, function, widened = None, None, False
    if isinstance(part, ast.BinOp):
        found = modulation_of(part, is_normed)
        normed = None if found is None else found.normed
    else:
        normed = part.args[0] if isinstance(part.func, ast.Name) and len(part.args) > 0 else None
        function = None if normed is None else part.func.id  # type: ignore[attr-defined]
        given = [*part.args[1:], *(keyword.value for keyword in part.keywords)]
        ready = all(keyword.arg is not None for keyword in part.keywords) and all(map(condition_of, given))
        if function in local or not given or not ready or normed is None or not is_normed(normed):
            return None
    if normed is None:
        return None
    call, inner = call_of(normed), _float(normed)
    if call is None and inner is not None:
        call, widened = call_of(inner), True
    assert call is not None
    argument = call[0].args[0]
    wide = _float(argument)
    if any(isinstance(below, ast.NamedExpr) for below in ast.walk(argument)):
        return None
    node, like, upcast = part, casts.get(id(part)), wide is not None
    statement = None if named is None else named.statement
    if isinstance(node, ast.Call):
        assert function is not None
        return CalledModulation(node, statement, *call, upcast, widened, function, like)
    assert found is not None
    if found.factor_first and named is None and not condition_of(argument):
        return None
    return LayerThenModulation(
        node, statement, *call, upcast, widened, found.factor, found.one, found.shift, like
    )
