"""Compatibility of signatures: whether a function accepts every call of another."""

from __future__ import annotations

import inspect
from inspect import Parameter, Signature
from typing import TYPE_CHECKING

from torch import nn

from twinkle.errors import suggest

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["arguments_text", "mismatch", "signature_of"]

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def signature_of(function: Callable[..., object]) -> Signature | None:
    """The signature that callers see, or ``None`` where there is none to read (many builtins).

    That of a module in a function's place (``kernels`` decorates functions so) is its ``forward``'s.
    """
    if isinstance(function, nn.Module):
        function = function.forward
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):
        return None


def arguments_text(signature: Signature) -> str:
    """The parameters of a signature in parentheses, as they are written."""
    return str(signature.replace(return_annotation=Signature.empty))


def mismatch(kernel: Signature, original: Signature) -> tuple[str, str | None] | None:
    """Find a call that ``original`` accepts and ``kernel`` does not.

    The count, the kinds and the names of the arguments are compared, and that what may be left out
    still may be. Further arguments are fine when they are optional, and so are ``*args`` and
    ``**kwargs`` that take what has no name of its own.

    Returns:
        Why there is such a call, and a hint where there is one; ``None`` if there is no such call.
    """
    ours = list(kernel.parameters.values())
    theirs = list(original.parameters.values())
    positional = [p for p in ours if p.kind in _POSITIONAL]
    named = {p.name: p for p in ours if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
    takes_rest = any(p.kind is Parameter.VAR_POSITIONAL for p in ours)
    takes_names = any(p.kind is Parameter.VAR_KEYWORD for p in ours)
    used: set[str] = set()
    index = 0
    for parameter in theirs:
        if parameter.kind in _POSITIONAL:
            mate = positional[index] if index < len(positional) else None
            index += 1
            problem = _positional(parameter, mate, takes_rest, takes_names, named)
            if problem is not None:
                return problem
            if mate is not None:
                used.add(mate.name)
        elif parameter.kind is Parameter.VAR_POSITIONAL:
            if not takes_rest:
                return f"takes no *{parameter.name}", None
            if len(positional) > index:
                return (
                    f"argument {positional[index].name!r} would swallow what belongs to *{parameter.name}",
                    None,
                )
        elif parameter.kind is Parameter.KEYWORD_ONLY:
            mate = named.get(parameter.name)
            if mate is None and not takes_names:
                return _absent(parameter, named)
            if mate is not None:
                used.add(mate.name)
                if _optional(parameter) and not _optional(mate):
                    return f"argument {parameter.name!r} may be left out of the original, not of this", None
        elif not takes_names:
            return f"takes no **{parameter.name}", None
    for parameter in ours:
        star = parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        if parameter.name not in used and not star and not _optional(parameter):
            return f"wants an argument {parameter.name!r} that the original is never given", None
    return None


def _positional(
    parameter: Parameter,
    mate: Parameter | None,
    takes_rest: bool,
    takes_names: bool,
    named: dict[str, Parameter],
) -> tuple[str, str | None] | None:
    if mate is None:
        by_name = parameter.kind is Parameter.POSITIONAL_OR_KEYWORD
        if takes_rest and (takes_names or not by_name):
            return None
        if takes_rest:
            return f"argument {parameter.name!r} cannot be given by name", "take **kwargs too"
        return _absent(parameter, named)
    if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD:
        if mate.name != parameter.name:
            return f"argument {mate.name!r} stands where the original has {parameter.name!r}", (
                f"rename it to {parameter.name!r}"
            )
        if mate.kind is Parameter.POSITIONAL_ONLY:
            return f"argument {parameter.name!r} cannot be given by name", None
    if _optional(parameter) and not _optional(mate):
        return f"argument {parameter.name!r} may be left out of the original, not of this", None
    return None


def _absent(parameter: Parameter, named: dict[str, Parameter]) -> tuple[str, str | None]:
    if parameter.name in named:
        return (
            f"argument {parameter.name!r} is of another kind ({named[parameter.name].kind.description})",
            None,
        )
    return f"has no argument {parameter.name!r}", suggest(parameter.name, list(named))


def _optional(parameter: Parameter) -> bool:
    return parameter.default is not Parameter.empty
