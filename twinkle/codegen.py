"""Functions written as source text at run time: the ``def`` line, and the compilation.

Standard library only.
"""

from __future__ import annotations

import ast
import linecache
from _weakref import ref
from inspect import Parameter
from itertools import count
from types import CodeType

from twinkle import forks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any, TypeVar

    Made = TypeVar("Made")

__all__ = ["compile_source", "compile_tree", "def_line", "parse_source"]

_trees = forks.lock()
_MOST_TRIES = 20

_numbers = count(1)
_in_use: dict[str, set[ref[CodeType]]] = {}
"""The functions' code of each text, by its file name; a text without any is forgotten."""


def def_line(name: str, parameters: Iterable[Parameter], defaults: Mapping[str, str] | None = None) -> str:
    """The ``def`` line of a function with the given parameters, the colon included.

    Args:
        name: The function's name.
        parameters: In order; their own defaults and annotations are not written.
        defaults: The expressions to write as defaults, by parameter name.

    Returns:
        For ``(a, /, b, *, c)`` with ``{"c": "None"}``: ``def name(a, /, b, *, c=None):``.
    """
    parts: list[str] = []
    star = positional_only = False
    for parameter in parameters:
        if positional_only and parameter.kind is not Parameter.POSITIONAL_ONLY:
            parts.append("/")
        positional_only = parameter.kind is Parameter.POSITIONAL_ONLY
        if parameter.kind is Parameter.KEYWORD_ONLY and not star:
            parts.append("*")
        star = star or parameter.kind in (Parameter.KEYWORD_ONLY, Parameter.VAR_POSITIONAL)
        text = f"{_stars(parameter)}{parameter.name}"
        default = defaults.get(parameter.name) if defaults else None
        parts.append(text if default is None else f"{text}={default}")
    if positional_only:
        parts.append("/")
    return f"def {name}({', '.join(parts)}):"


def _stars(parameter: Parameter) -> str:
    if parameter.kind is Parameter.VAR_POSITIONAL:
        return "*"
    return "**" if parameter.kind is Parameter.VAR_KEYWORD else ""


def parse_source(text: str | bytes, filename: str = "<unknown>") -> ast.Module:
    """``ast.parse``, in any thread."""
    return _alone(lambda: ast.parse(text, filename))


def compile_tree(tree: ast.Module, filename: str, flags: int = 0) -> CodeType:
    """The code of a module's syntax tree, in any thread; no ``__future__`` flags but the given ones."""
    code: CodeType = _alone(lambda: compile(tree, filename, "exec", flags=flags, dont_inherit=True))
    return code


def _alone(step: Callable[[], Made]) -> Made:
    """Do a step with a syntax tree again where another thread had one in hand.

    Up to Python 3.12 the interpreter counts the depth of trees for all threads together, and raises
    ``SystemError`` ("AST constructor recursion depth mismatch") when two of them are at it. Our own threads
    wait for each other; those of the program do not.
    """
    for _ in range(_MOST_TRIES):
        try:
            with _trees:
                return step()
        except SystemError:
            continue
    with _trees:
        return step()


def compile_source(text: str, title: str, scope: dict[str, Any]) -> None:
    """Run source text in ``scope``, under a file name of its own: ``<twinkle {title} #1>``.

    Args:
        text: One or several definitions.
        title: What the text is, for tracebacks.
        scope: The globals of what is defined, which receive the definitions.
    """
    filename = f"<twinkle {title} #{next(_numbers)}>"
    # Tracebacks, inspect.getsource and compilers find the text here.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    code = compile(text, filename, "exec")
    _forget_with(filename, [part for part in code.co_consts if isinstance(part, CodeType)])
    exec(code, scope)


def _forget_with(filename: str, codes: list[CodeType]) -> None:
    """Take a text out of ``linecache`` when the last function of it is gone."""
    alive = _in_use[filename] = set()

    def gone(code: ref[CodeType]) -> None:
        alive.discard(code)
        if not alive:
            _in_use.pop(filename, None)
            linecache.cache.pop(filename, None)

    alive.update(ref(code, gone) for code in codes)
