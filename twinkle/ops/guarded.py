"""Functions of a program that an op's kernel stands in for, written at run time with their own arguments.

The kernel is asked first, and gives None wherever it does not compute what the function is given: another
device or dtype, a weight that is no row, sizes below which it does not pay. There the function itself runs.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from torch import Tensor, nn

from twinkle.codegen import compile_source, def_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

__all__ = ["are_numbers", "are_tensors", "function_with", "is_row"]

_STATES = {"given": "is not None", "absent": "is None"}


def function_with(
    original: Callable[..., Any],
    attempt: Callable[..., Any],
    facts: Mapping[str, Any],
    constants: Mapping[str, Any],
) -> Callable[..., Any]:
    """A function with the arguments of another one, which runs wherever ``attempt`` gives None.

    Args:
        original: Is replaced.
        attempt: Takes the arguments of an op's definition by keyword, of whatever type a call gives.
        facts: From an argument of the definition to Python text over the parameters of ``original``, or to a
            value; ``requires`` holds conditions on parameters, such as ``weight given``.
        constants: Arguments of ``attempt`` that are objects.

    Raises:
        ValueError: ``original`` takes any number of arguments, or a fact names none of them.
    """
    # `kernels` puts a module with a forward in the place of the functions it decorates.
    called = original.forward if isinstance(original, nn.Module) else original
    parameters = [*inspect.signature(called).parameters.values()]
    names = {parameter.name for parameter in parameters}
    what = getattr(original, "__qualname__", type(original).__qualname__)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise ValueError(f"{what} takes any number of arguments")
    scope: dict[str, Any] = {"_tw_attempt": attempt, "_tw_original": original}
    handed = []
    for role, value in {**facts, **constants}.items():
        if role == "requires":
            continue
        if role in facts and isinstance(value, str):
            if value.partition(".")[0] not in names:
                raise ValueError(f"{what} has no argument {value!r}")
            handed.append(f"{role}={value}")
        else:
            scope[f"_tw_{role}"] = value
            handed.append(f"{role}=_tw_{role}")
    defaults = {p.name: f"_tw_default_{p.name}" for p in parameters if p.default is not p.empty}
    scope.update((text, p.default) for p in parameters if (text := defaults.get(p.name)))
    given = ", ".join(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in parameters)
    conditions = [_condition(text) for text in facts.get("requires", ())]
    asked = f"_tw_attempt({', '.join(handed)})"
    if conditions:
        asked = f"{asked} if {' and '.join(conditions)} else None"
    text = (
        f"{def_line(called.__name__, parameters, defaults)}\n"
        f"    _tw_made = {asked}\n"
        f"    return _tw_original({given}) if _tw_made is None else _tw_made\n"
    )
    compile_source(text, called.__name__, scope)
    made: Callable[..., Any] = scope[called.__name__]
    made.__module__ = __name__
    return made


def _condition(text: str) -> str:
    name, _, state = text.partition(" ")
    return f"{name} {_STATES[state]}"


def are_tensors(x: Any, *others: Any) -> bool:
    """Whether ``x`` is a tensor with rows, and each of the others one or None."""
    return (
        isinstance(x, Tensor)
        and x.dim() > 0
        and all(other is None or isinstance(other, Tensor) for other in others)
    )


def are_numbers(*values: Any) -> bool:
    """Whether all are numbers of Python, and neither flags nor tensors."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def is_row(shape: Any, x: Tensor) -> bool:
    """Whether a normalized shape is the last dimension of ``x``; None stands for it."""
    return shape is None or (isinstance(shape, tuple | list) and [*shape] == [x.shape[-1]])
