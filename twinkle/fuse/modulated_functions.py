"""Recognises functions that modulate: ``def modulate(x, shift, scale): return x * (1 + scale) + shift``.

A function is followed over each ``if`` that asks whether an argument is None, and over the names that it
gives to arguments. It may read nothing but its arguments.
"""

from __future__ import annotations

import ast
import copy
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

from twinkle.codegen import compile_source
from twinkle.fuse.modulated_places import condition_of, modulation_of, scale_in
from twinkle.match.symbolic import source
from twinkle.match.symbolic.syntax import asks_for_none, given_names, loaded
from twinkle.swap.placed import placed_as

if TYPE_CHECKING:
    from types import CodeType

__all__ = ["ModulatingFunction", "modulating_function"]


class ModulatingFunction(NamedTuple):
    """What a function of a tensor and of conditions does with them.

    Attributes:
        code: The code of the function.
        defaults: Its default arguments.
        scale_and_shift: With the function's own parameters: the number 1 or 1.0, the scale and the shift (or
            None), or None where the function does something else with such arguments.
    """

    code: CodeType
    defaults: tuple[Any, ...] | None
    scale_and_shift: FunctionType

    def is_still(self, function: Any) -> bool:
        """Whether a function is the one that was recognised."""
        return (
            type(function) is FunctionType
            and function.__code__ is self.code
            and function.__defaults__ is self.defaults
        )


def modulating_function(function: Any) -> ModulatingFunction | str:
    """What a function does, or in words why it is no modulation."""
    if type(function) is not FunctionType or placed_as(function) is not None or function.__dict__:
        return "it is no plain function"
    name = function.__name__
    try:
        node = source.parse(function)
    except source.NoSource as error:
        return str(error)
    given = node.args
    if node.decorator_list or given.vararg or given.kwarg or given.kwonlyargs or given.posonlyargs:
        return f"{name} has a decorator, or takes its arguments in another way"
    names = [arg.arg for arg in given.args]
    if len(names) < 2:
        return f"{name} takes no scale"
    branches: list[tuple[ast.expr, ast.expr]] = []
    followed = _follow(
        list(node.body), {name: ast.Name(name, ast.Load()) for name in names}, [], names, branches
    )
    if not followed or not branches:
        return f"{name} is not recognised as a modulation"
    return ModulatingFunction(function.__code__, function.__defaults__, _made(function, names, branches))


# -- the statements -------------------------------------------------------------------------------


def _follow(
    body: list[ast.stmt],
    values: dict[str, ast.expr],
    tests: list[ast.expr],
    names: list[str],
    branches: list[tuple[ast.expr, ast.expr]],
) -> bool:
    """Note the modulation that each way through some statements ends with; False where one cannot be told.

    Args:
        body: The statements.
        values: What names stand for, in terms of the parameters.
        tests: What has held so far.
        names: The parameters.
        branches: Grows: what holds, and the number, the scale and the shift.
    """
    for at, statement in enumerate(body):
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        if isinstance(statement, ast.If):
            if not _asks_for_none(statement.test, names) or loaded(statement.test) & _changed(values):
                return False
            rest = body[at + 1 :]
            held = ast.UnaryOp(ast.Not(), statement.test)
            yes = _follow([*statement.body, *rest], dict(values), [*tests, statement.test], names, branches)
            no = _follow([*statement.orelse, *rest], dict(values), [*tests, held], names, branches)
            return yes or no
        if isinstance(statement, ast.Return) and statement.value is not None:
            found = _result(_put(statement.value, values), names)
            if found is None:
                return False
            branches.append((_all(tests), found))
            return True
        told = given_names(statement)
        if told is None or len(told[0]) != 1 or not loaded(told[1]) <= {*values}:
            return False
        values[told[0][0]] = _put(told[1], values)
    return False


def _changed(values: dict[str, ast.expr]) -> set[str]:
    return {name for name, value in values.items() if not (isinstance(value, ast.Name) and value.id == name)}


def _asks_for_none(test: ast.expr, names: list[str]) -> bool:
    if isinstance(test, ast.BoolOp):
        return all(_asks_for_none(part, names) for part in test.values)
    if isinstance(test, ast.UnaryOp):
        return isinstance(test.op, ast.Not) and _asks_for_none(test.operand, names)
    return asks_for_none(test) and test.left.id in names  # type: ignore[attr-defined]


class _Put(ast.NodeTransformer):
    def __init__(self, values: dict[str, ast.expr]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self.values.get(node.id, node))


def _put(node: ast.expr, values: dict[str, ast.expr]) -> ast.expr:
    made: ast.expr = _Put(values).visit(copy.deepcopy(node))
    return made


def _result(node: ast.expr, names: list[str]) -> ast.expr | None:
    """The number, the scale and the shift of what a function returns, as a tuple; None for all else."""
    found = modulation_of(node, lambda part: isinstance(part, ast.Name) and part.id == names[0])
    if found is None:
        return None
    scale, shift = scale_in(found.factor), found.shift or ast.Constant(None)
    # The first argument is what the layer gave, and is not there to be asked for anything.
    if not (loaded(scale) | loaded(shift)) <= {*names[1:]} or not condition_of(scale):
        return None
    return ast.Tuple([ast.Constant(found.one), scale, copy.deepcopy(shift)], ast.Load())


def _all(tests: list[ast.expr]) -> ast.expr:
    return ast.BoolOp(ast.And(), [*tests, ast.Constant(True)]) if tests else ast.Constant(True)


def _made(
    function: FunctionType, names: list[str], branches: list[tuple[ast.expr, ast.expr]]
) -> FunctionType:
    """A function of the same parameters, which returns what was found for the first test that holds."""
    value: ast.expr = ast.Constant(None)
    for test, result in reversed(branches):
        value = ast.IfExp(test, result, value)
    scope: dict[str, Any] = {}
    text = ast.unparse(ast.fix_missing_locations(value))
    text = f"def scale_and_shift({', '.join(names)}):\n    return {text}\n"
    compile_source(text, f"modulation {function.__name__}", scope)
    made: FunctionType = scope["scale_and_shift"]
    made.__defaults__ = function.__defaults__
    return made
