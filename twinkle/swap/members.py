"""Members of a kernel class, made members of a generated class."""

from __future__ import annotations

import dis
from types import CellType, CodeType, FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["adopt", "renamed"]


def adopt(member: Any, owner: type, names: Mapping[str, str] | None = None) -> Any:
    """Make a member of a kernel class one of ``owner``, so that its ``super()`` reaches the original's.

    Args:
        member: A function, a static or class method, a property or any other value.
        owner: The generated class.
        names: New names for attributes of ``self`` that the code reads; see :func:`renamed`.
    """
    if isinstance(member, (staticmethod, classmethod)):
        return type(member)(adopt(member.__func__, owner, names))
    if isinstance(member, property):
        parts = (adopt(part, owner, names) for part in (member.fget, member.fset, member.fdel))
        return property(*parts)
    if not isinstance(member, FunctionType):
        return member
    code = renamed(member.__code__, names) if names else member.__code__
    if code is member.__code__ and "__class__" not in code.co_freevars:
        return member
    cells = tuple(
        CellType(owner) if name == "__class__" else cell
        for name, cell in zip(code.co_freevars, member.__closure__ or (), strict=True)
    )
    twin = FunctionType(code, member.__globals__, member.__name__, member.__defaults__, cells)
    twin.__kwdefaults__ = member.__kwdefaults__
    for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(twin, name, getattr(member, name))
    twin.__dict__.update(member.__dict__)
    return twin


def renamed(code: CodeType, names: Mapping[str, str]) -> CodeType:
    """Rename attributes in code: two kernels of one target may both have a ``helper``.

    Raises:
        ValueError: The code uses one of the names for anything but an attribute of its ``self``.
    """
    self_name = code.co_varnames[0] if code.co_argcount else ""
    return _renamed(code, names, self_name)


def _renamed(code: CodeType, names: Mapping[str, str], self_name: str) -> CodeType:
    constants = tuple(_renamed(c, names, self_name) if isinstance(c, CodeType) else c for c in code.co_consts)
    for constant in code.co_consts:
        if isinstance(constant, str) and constant in names:
            raise ValueError(constant)
    if any(name in names for name in code.co_names):
        before = ""
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("CACHE", "EXTENDED_ARG"):
                continue
            if instruction.argval in names and instruction.opname not in ("LOAD_CONST", "LOAD_FAST"):
                on_self = instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR")
                if not on_self or before != self_name:
                    raise ValueError(instruction.argval)
            loaded = instruction.argval if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) else ""
            before = loaded[-1] if isinstance(loaded, tuple) else loaded
    changed = tuple(names.get(name, name) for name in code.co_names)
    if changed == code.co_names and constants == code.co_consts:
        return code
    return code.replace(co_names=changed, co_consts=constants)
