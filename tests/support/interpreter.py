"""Triton's interpreter, without putting its own functions into triton's language anew at every call."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["quicken"]


def quicken() -> None:
    """Have the interpreter look among the functions of triton's language only, and once in a kernel.

    When a kernel starts, and at every call of a device function in it, the interpreter goes through all there
    is in ``triton.language``, and puts a function of its own in the place of each builtin of triton: a third
    of the time of a kernel. Names that hold no builtin while nothing is patched hold none later, and what a
    device function finds in place stays until its kernel ends.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    rooms = (tl, tl.core, tl.math, tl.tensor, getattr(tl.core, "tensor_descriptor_base", None))
    functions = {
        room: [name for name, member in inspect.getmembers(room) if tl.core.is_builtin(member)]
        for room in rooms
        if room is not None
    }

    def members(room: Any) -> list[tuple[str, object]]:
        names = functions.get(room)
        return inspect.getmembers(room) if names is None else [(name, getattr(room, name)) for name in names]

    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": members})
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _once_in_a_kernel(interpreter._patch_lang, interpreter._LangPatchScope)


def _once_in_a_kernel(patch: Callable[[Any], Any], nothing: Callable[[], Any]) -> Callable[[Any], Any]:
    """``patch(function)`` for one function of a module, as what it patches is what the module has imported.

    The kernel takes its patches back when it ends, and the interpreter leaves those of device functions.
    """
    done: set[int] = set()

    def patch_lang(function: Any) -> Any:
        module = id(function.__globals__)
        if module in done:
            return nothing()
        scope = patch(function)
        if not done:  # of the kernel itself
            take_back = scope.restore

            def restore() -> None:
                done.clear()
                take_back()

            scope.restore = restore
        done.add(module)
        return scope

    return patch_lang
