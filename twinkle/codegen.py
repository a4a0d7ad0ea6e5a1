"""Functions written as source text at run time: the ``def`` line, and the compilation.

Standard library only.
"""

from __future__ import annotations

import linecache
from inspect import Parameter
from itertools import count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

__all__ = ["compile_source", "def_line"]

_numbers = count(1)


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
    exec(compile(text, filename, "exec"), scope)
