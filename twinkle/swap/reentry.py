"""Kernels that call the function they replace by its name: inside the kernel, that is the original.

``net.act(x)`` in a kernel for ``net:act`` finds the kernel again once that is in place. A kernel whose code
can come to the name, as far as it can be followed, runs under a mark of its thread or task, by which a call
from inside goes to the original. Names in the kernel's own module that hold the original hold it for good.
"""

from __future__ import annotations

import dis
import sys
from contextvars import ContextVar
from types import CellType, CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from twinkle.sources import packages
from twinkle.swap.kinds import COROUTINE, body_of, kind_of
from twinkle.swap.scope import dispatch_behind
from twinkle.swap.tensors import constant

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

__all__ = ["MARKED", "Mark", "Own", "names_forward", "reaches"]

_LIBRARIES = frozenset({*sys.stdlib_module_names, "numpy", "torch", "triton", "twinkle"}) - {"__main__"}
_MOST_FUNCTIONS = 500
_NOISE = ("CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "PUSH_NULL", "RESUME")
_IMPORTERS = frozenset({"__import__", "import_module", "modules"})
_UNKNOWN: Any = object()


class Own(NamedTuple):
    """A name in a module of the kernel's own that holds the original, and is to hold it for good."""

    names: dict[str, Any]
    name: str


class _Walk:
    """Follows the code of a kernel to all that it can name.

    Attributes:
        found: It comes to the target, or to another function that has kernels, which may come back.
        own: The names that stay the original's.
    """

    def __init__(self, original: Any, standing: Any, target: str, others: Collection[str]) -> None:
        self.originals = (original, standing)
        self.module, _, path = target.partition(":")
        self.name = path.rpartition(".")[2]
        self.targets = {target, *others}
        self.found = False
        self.own: list[Own] = []
        self._seen: set[int] = set()
        self._todo: list[FunctionType] = []

    def run(self, kernel: Any) -> None:
        self._meet(kernel)
        while self._todo and len(self._seen) < _MOST_FUNCTIONS:
            function = self._todo.pop()
            held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            for value in (*held, *_contents(function.__closure__ or ())):
                # The original itself is held for good here.
                self.found = self.found or (
                    all(value is not one for one in self.originals) and self._is_target(value)
                )
                self._meet(value)
            for code in _codes(function.__code__):
                self._read(code, function.__globals__)

    def _read(self, code: CodeType, names: dict[str, Any]) -> None:
        """Meet all that the code of a function names."""
        base: Any = None
        imports = not _IMPORTERS.isdisjoint(code.co_names)
        self.found = self.found or ("getattr" in code.co_names and self.name in code.co_consts)
        for instruction in dis.get_instructions(code):
            what, name = instruction.opname, instruction.argval
            if what in _NOISE:
                continue
            imports = imports or what == "IMPORT_NAME"
            if what in ("LOAD_GLOBAL", "LOAD_NAME"):
                base = self._global(names, name)
            elif what in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
                base = self._attribute(base, name, imports)
            else:
                base = _UNKNOWN

    def _global(self, names: dict[str, Any], name: str) -> Any:
        value = names.get(name, _UNKNOWN)
        if self._is_target(value):
            module = names.get("__name__")
            if module in (self.module, "__main__"):
                self.found = True  # The program's own name, which has the kernel.
            else:
                self.own.append(Own(names, name))
            return _UNKNOWN
        self._meet(value)
        return value

    def _attribute(self, base: Any, name: str, imports: bool) -> Any:
        if base is _UNKNOWN or base is None:
            # It may be the target's module, where the function imports one itself.
            self.found = self.found or (imports and name == self.name)
            return _UNKNOWN
        if not isinstance(base, (ModuleType, type)):
            return _UNKNOWN
        value = vars(base).get(name, _UNKNOWN)
        place = f"{base.__module__}:{base.__qualname__}." if isinstance(base, type) else f"{base.__name__}:"
        if f"{place}{name}" in self.targets or self._is_target(value):
            self.found = True
            return _UNKNOWN
        self._meet(value)
        return value

    def _is_target(self, value: Any) -> bool:
        if any(value is original for original in self.originals):
            return True
        dispatch = dispatch_behind(value) if isinstance(value, FunctionType) else None
        return dispatch is not None and dispatch.original is self.originals[0]

    def _meet(self, value: Any) -> None:
        value = getattr(value, "__func__", value)
        if isinstance(value, type):
            if id(value) not in self._seen and not _is_library(value.__module__):
                self._seen.add(id(value))
                for part in list(vars(value).values()):
                    self._meet(part)
            return
        if isinstance(value, nn.Module):
            value = body_of(value)
            value = getattr(value, "__func__", value)
        if not isinstance(value, FunctionType) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        self.found = self.found or f"{value.__module__}:{value.__qualname__}" in self.targets
        if not _is_library(value.__globals__.get("__name__")):
            self._todo.append(value)


def _is_library(module: object) -> bool:
    """Whether a module is of a library that calls no functions of programs by name."""
    name = str(module)
    # Packages of kernels are loaded under a name of Twinkle's.
    return name.partition(".")[0] in _LIBRARIES and not name.startswith(f"{packages.__name__}.")


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _codes(const)


def _contents(cells: Iterable[CellType]) -> Iterator[Any]:
    for cell in cells:
        try:
            yield cell.cell_contents
        except ValueError:  # empty
            continue


def reaches(
    kernel: Any, original: Any, standing: Any, target: str, others: Collection[str] = ()
) -> tuple[bool, list[Own]]:
    """Whether a kernel can come to its target by name, and the names of its own that hold the original.

    Args:
        kernel: As its source gave it.
        original: The function that it replaces.
        standing: What stands under the name, with its decorators.
        target: ``module:name``.
        others: The same of other functions that have kernels, by which it may come back.
    """
    walk = _Walk(original, standing, target, others)
    walk.run(kernel)
    return walk.found, walk.own


class _ForwardsNamed(_Walk):
    """Follows the code of a layer kernel until it names an attribute ``forward``, whatever it is of."""

    def _read(self, code: CodeType, names: dict[str, Any]) -> None:
        self.found = self.found or "forward" in code.co_names or "forward" in code.co_consts
        if not self.found:
            super()._read(code, names)

    def _meet(self, value: Any) -> None:
        # One that stands in a class, which a module took for the original when it was imported.
        self.found = self.found or (isinstance(value, FunctionType) and "__twinkle__" in vars(value))
        super()._meet(value)


def names_forward(kernel: Any) -> bool:
    """Whether a layer kernel may call a ``forward`` by name, which may be that of the class it is for.

    Args:
        kernel: Its ``forward``; what it reads of ``self`` is not followed.
    """
    nothing: Any = object()
    walk = _ForwardsNamed(nothing, nothing, "", ())
    walk.run(kernel)
    return walk.found


MARKED = """{head}
    if _tw_compiling():
        if _tw_inlined():
            return _tw_original({arguments})
        return _tw_kernel({arguments})
    _tw_me = _tw_ident()
    if _tw_me in _tw_threads:
        return _tw_original({arguments})
    _tw_threads.add(_tw_me)
    try:
        return _tw_kernel({arguments})
    finally:
        _tw_threads.discard(_tw_me)
"""
"""The text of a plain function that runs a kernel under its mark; a context variable takes 260 ns more."""


class Mark:
    """The mark under which a kernel runs, and what is behind the function that sets it.

    A plain kernel marks its thread, one that is awaited or iterated its task.

    Args:
        kernel: The kernel as a function.
        original: What runs where the mark is set.
    """

    def __init__(self, kernel: Callable[..., Any], original: Callable[..., Any]) -> None:
        self.kernel = kernel
        self.original = original
        self.threads: set[int] = set()
        self.running: ContextVar[bool] = ContextVar("twinkle kernel", default=False)
        code = getattr(body_of(kernel), "__code__", None)
        self.inlined = constant(lambda: _is_inlined(code))

    def started(self, *args: Any, **kwargs: Any) -> Any:
        """What a kernel gives that is awaited or iterated: every step of it under the mark."""
        if self.running.get():
            return self.original(*args, **kwargs)
        made = self.kernel(*args, **kwargs)
        return self._awaited(made) if kind_of(self.original) == COROUTINE else _Steps(made, self.running)

    async def _awaited(self, made: Any) -> Any:
        self.running.set(True)
        try:
            return await made
        finally:
            self.running.set(False)


class _Steps:
    """A generator, asynchronous or not, whose every step runs under a mark."""

    def __init__(self, generator: Any, running: ContextVar[bool]) -> None:
        self._generator = generator
        self._running = running

    def _step(self, name: str, *args: Any) -> Any:
        self._running.set(True)
        try:
            return getattr(self._generator, name)(*args)
        finally:
            self._running.set(False)

    async def _async_step(self, name: str, *args: Any) -> Any:
        self._running.set(True)
        try:
            return await getattr(self._generator, name)(*args)
        finally:
            self._running.set(False)

    def __iter__(self) -> _Steps:
        return self

    def __next__(self) -> Any:
        return self._step("__next__")

    def send(self, value: Any) -> Any:
        return self._step("send", value)

    def throw(self, *error: Any) -> Any:
        return self._step("throw", *error)

    def close(self) -> None:
        self._step("close")

    async def __anext__(self) -> Any:
        return await self._async_step("__anext__")

    async def asend(self, value: Any) -> Any:
        return await self._async_step("asend", value)

    async def athrow(self, *error: Any) -> Any:
        return await self._async_step("athrow", *error)

    async def aclose(self) -> None:
        await self._async_step("aclose")


def _is_inlined(code: CodeType | None) -> bool:
    """Whether dynamo is inlining that code: each of its translators is a frame of this stack."""
    frame = sys._getframe(1)
    while code is not None and frame.f_back is not None:
        frame = frame.f_back
        if getattr(frame.f_locals.get("self"), "f_code", None) is code:
            return True
    return False
