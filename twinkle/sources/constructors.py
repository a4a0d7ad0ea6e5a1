"""The attributes that the ``__init__`` of a layer class would set, read from its source code."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import TYPE_CHECKING, Any

import torch

from twinkle.codegen import parse_source

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Made", "made_in_init"]

# ("module" | "parameter", description), ("default", the parameter's default) or ("value", "")
Made = tuple[str, Any]


def made_in_init(cls: type) -> dict[str, Made]:
    """The kind of value that each ``self.name = …`` in ``__init__`` assigns.

    A subclass's ``__init__`` wins over its base's. A class without source says nothing.
    """
    made: dict[str, Made] = {}
    for klass in reversed(cls.__mro__):
        if klass in torch.nn.Module.__mro__ or "__init__" not in vars(klass):
            continue
        init = vars(klass)["__init__"]
        try:
            tree = parse_source(textwrap.dedent(inspect.getsource(init)))
            defaults = {
                name: parameter.default
                for name, parameter in inspect.signature(init).parameters.items()
                if parameter.default is not parameter.empty
            }
        except (OSError, TypeError, ValueError, SyntaxError):
            continue
        for name, value in _assignments(tree):
            made[name] = _kind_of(value, defaults, getattr(init, "__globals__", {}))
    return made


def _assignments(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield from _pairs(target, node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield from _pairs(node.target, node.value)


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Tuple):
        values = value.elts if isinstance(value, ast.Tuple) else [value] * len(target.elts)
        for one, its in zip(target.elts, values, strict=False):
            yield from _pairs(one, its)
    elif (
        isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
    ):
        yield target.attr, value


def _kind_of(value: ast.expr, defaults: dict[str, Any], names: dict[str, Any]) -> Made:
    if isinstance(value, ast.Name) and value.id in defaults:
        return "default", defaults[value.id]
    for call in ast.walk(value):
        if not isinstance(call, ast.Call):
            continue
        made = _resolve(call.func, names)
        if isinstance(made, type) and issubclass(made, torch.nn.Module):
            return "module", made.__name__
        if isinstance(made, type) and issubclass(made, torch.nn.Parameter):
            return "parameter", "Parameter"
    return "value", ""


def _resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(_resolve(node.value, names), node.attr, None)
    return None
