"""The classes of a class's attributes, read from the source of its ``__init__``."""

from __future__ import annotations

import ast
from types import FunctionType
from typing import Any

from twinkle.match.symbolic import source

__all__ = ["attribute_classes"]


def attribute_classes(owner: type) -> dict[str, set[type]]:
    """The classes whose instances ``__init__`` assigns to attributes of ``self``, by the attribute's name.

    No class for an attribute that is assigned what is no instance, as far as the source tells.
    """
    found: dict[str, set[type]] = {}
    for cls in owner.__mro__:
        init = _init(cls)
        if init is None or cls.__module__.startswith("torch."):
            continue
        try:
            node = source.parse(init)
        except source.NoSource:
            continue
        for child in ast.walk(node):
            if isinstance(child, ast.Assign) and len(child.targets) == 1:
                target = child.targets[0]
                if isinstance(target, ast.Attribute) and getattr(target.value, "id", None) == "self":
                    found.setdefault(target.attr, set())
                    for part in ast.walk(child.value):
                        if isinstance(part, ast.Call):
                            value = _resolve(part.func, init.__globals__)
                            if isinstance(value, type):
                                found.setdefault(target.attr, set()).add(value)
    return found


def _init(cls: type) -> FunctionType | None:
    init, _ = source.unwrap(vars(cls).get("__init__"))
    while isinstance(init, FunctionType):
        # A class decorator may wrap __init__ and keep it in a closure only.
        inner = [cell.cell_contents for cell in init.__closure__ or () if _is_init(cell)]
        if not inner:
            return init
        init, _ = source.unwrap(inner[0])
    return None


def _is_init(cell: Any) -> bool:
    try:
        value = cell.cell_contents
    except ValueError:
        return False
    return isinstance(value, FunctionType) and value.__name__ == "__init__"


def _resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(_resolve(node.value, names), node.attr, None)
    return None
