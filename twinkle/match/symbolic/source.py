"""The syntax tree of a function, and the function behind a wrapper.

Reading by line numbers parses the function alone: parsing the whole module, as ``inspect.getsource``
of a class does, costs 10 to 60 ms for a modeling file.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

from twinkle.codegen import parse_source
from twinkle.runtime import runtime

__all__ = ["NoSource", "function_of_callable", "parse", "size_of", "unwrap"]


class NoSource(Exception):
    """A function whose source cannot be read; the message names it."""


class _Definitions:
    """The definitions that were parsed, by the code of the function, and their sizes."""

    def __init__(self) -> None:
        # Code that is equal is one key: a class that is made again, in a loop, is not read again.
        self.by_code: WeakKeyDictionary[CodeType, ast.FunctionDef] = WeakKeyDictionary()
        self.sizes: WeakKeyDictionary[ast.FunctionDef, tuple[int, bool]] = WeakKeyDictionary()


def parse(function: FunctionType) -> ast.FunctionDef:
    """The definition of ``function``.

    Raises:
        NoSource: It is a lambda, was compiled, or its file is gone or was changed.
    """
    code = function.__code__
    parsed = runtime.of(_Definitions).by_code
    found = parsed.get(code)
    if found is None:
        found = parsed[code] = _parse(function, code)
    return found


def size_of(node: ast.FunctionDef) -> tuple[int, bool]:
    """How many statements a definition has, and whether the executor follows all kinds of them."""
    sizes = runtime.of(_Definitions).sizes
    found = sizes.get(node)
    if found is None:
        children = list(ast.walk(node))
        odd = any(
            isinstance(child, ast.Yield | ast.YieldFrom | ast.Await | ast.While | ast.Try)
            for child in children
        )
        found = sizes[node] = (sum(isinstance(child, ast.stmt) for child in children) - 1, not odd)
    return found


def _parse(function: FunctionType, code: CodeType) -> ast.FunctionDef:
    lines = linecache.getlines(code.co_filename, function.__globals__)
    what = f"{function.__module__}.{function.__qualname__}"
    if not lines:
        raise NoSource(f"no source for {what} ({code.co_filename})")
    if "_tw" in code.co_freevars:
        # What twinkle.swap.scope generates bears the file and line of its original, and runs kernels.
        raise NoSource(f"{what} runs kernels")
    start = code.co_firstlineno - 1
    for text in _blocks(lines, start, code):
        try:
            tree = parse_source(textwrap.dedent(text))
        except (SyntaxError, ValueError):
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
                return node
    raise NoSource(f"{code.co_filename}:{code.co_firstlineno} does not hold the source of {what}")


def _blocks(lines: list[str], start: int, code: CodeType) -> Any:
    last = _last_line(code)
    if last:
        yield "".join(lines[start:last])
    try:
        yield "".join(inspect.getblock(lines[start:]))
    except Exception:  # tokenize raises several kinds on text that is no Python
        return


def _last_line(code: CodeType) -> int:
    positions = getattr(code, "co_positions", None)  # from Python 3.11
    if positions is None:
        return 0
    last = max((end for _, end, _, _ in positions() if end is not None), default=0)
    for const in code.co_consts:
        if isinstance(const, CodeType):
            last = max(last, _last_line(const))
    return last


# Wrappers that call what they wrap with the same arguments and return what it returns (or, for the
# experts, what the implementation chosen in the config returns, which the instance check reads).
_TRANSPARENT = ("transformers.", "kernels.", "accelerate.")


def unwrap(function: Any) -> tuple[Any, str | None]:
    """The function below all decorators, and the name of the first decorator that is not known."""
    foreign = None
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        module = function.__globals__.get("__name__", "") if isinstance(function, FunctionType) else ""
        if foreign is None and not str(module).startswith(_TRANSPARENT):
            foreign = f"{module}.{getattr(function.__code__, 'co_qualname', function.__code__.co_name)}"
        function = inner
    return function, foreign


def function_of_callable(obj: Any) -> FunctionType | None:
    """The Python function that a call of ``obj`` runs; None where there is no single one.

    That is ``obj`` itself, the function of a bound method, or the one behind a layer that `kernels` made
    of a function. Decorators are not taken off: see :func:`unwrap`.
    """
    if isinstance(obj, FunctionType):
        return obj
    if isinstance(obj, MethodType):
        return function_of_callable(obj.__func__)
    if isinstance(obj, type):
        return None
    # `kernels` turns a decorated function into an instance of a class whose forward calls it.
    forward = getattr(type(obj), "forward", None)
    if isinstance(forward, FunctionType) and forward.__code__.co_freevars == ("func",):
        inner = forward.__closure__[0].cell_contents if forward.__closure__ else None
        return function_of_callable(inner)
    return None
