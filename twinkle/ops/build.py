"""Layer classes and functions written at run time, with the names that a target uses."""

from __future__ import annotations

import functools
import inspect
import keyword
import re
from typing import TYPE_CHECKING

from torch import nn

from twinkle.codegen import compile_source, def_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

__all__ = ["forward_class", "once_for", "plain_function"]


def once_for(*known: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a maker of kernels give the same one for the same variant and facts.

    Args:
        known: The facts that it looks at; it is given no others.
    """

    def decorate(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.cache
        def made(variant: Any, facts: tuple[tuple[str, Any], ...], *rest: Any) -> Any:
            return make(variant, dict(facts), *rest)

        @functools.wraps(make)
        def call(variant: Any, facts: Mapping[str, Any], *rest: Any) -> Any:
            return made(variant, tuple((name, facts[name]) for name in known if name in facts), *rest)

        return call

    return decorate


def forward_class(
    name: str,
    function: Callable[..., Any],
    facts: Mapping[str, Any],
    *,
    inputs: tuple[str, ...],
    optional: tuple[str, ...] = (),
    constants: Mapping[str, Any] | None = None,
    absent_ok: tuple[str, ...] = (),
) -> type[nn.Module]:
    """Make a layer whose ``forward`` calls ``function`` with attributes of the instance.

    Args:
        name: The name of the class.
        function: Takes everything by keyword.
        facts: From an argument of ``function`` to what it is on the instance: an argument of ``forward``
            for the names in ``inputs``, else a path of attributes, or a value.
        inputs: Which arguments of ``function`` are arguments of ``forward``, in this order.
        optional: Those of them that default to None.
        constants: Arguments that are objects.
        absent_ok: Arguments that are None where the instance has no such attribute.

    Returns:
        An ``nn.Module`` class with ``forward`` alone.

    Raises:
        ValueError: A name is no name.
    """
    scope: dict[str, Any] = {"function": function, **(constants or {})}
    parameters = [
        f"{_identifier(facts[role])}{'=None' if role in optional else ''}"
        for role in inputs
        if facts.get(role)
    ]
    handed = [f"{role}={facts[role]}" for role in inputs if facts.get(role)]
    for role, value in facts.items():
        if role in inputs:
            continue
        if isinstance(value, str):
            path = ".".join(map(_identifier, value.split(".")))
            handed.append(
                f"{role}=getattr(self, {path!r}, None)" if role in absent_ok else f"{role}=self.{path}"
            )
        else:
            handed.append(f"{role}={_literal(value)}")
    handed += [f"{role}={role}" for role in constants or {}]
    text = f"def forward(self, {', '.join(parameters)}):\n    return function({', '.join(handed)})\n"
    compile_source(text, "forward", scope)
    forward = scope["forward"]
    forward.__module__, forward.__qualname__ = __name__, f"{name}.forward"
    members = {"forward": forward, "can_torch_compile": True, "has_backward": True, "__module__": __name__}
    return type(name, (nn.Module,), members)


def _literal(value: Any) -> str:
    # inf and nan are printed as names that nothing defines.
    return f"float({str(value)!r})" if isinstance(value, float) else repr(value)


def _identifier(text: Any) -> str:
    if not isinstance(text, str) or not re.fullmatch(r"[A-Za-z_]\w*", text) or keyword.iskeyword(text):
        raise ValueError(f"{text!r} is no name of an attribute or an argument")
    return text


def plain_function(
    original: Callable[..., Any],
    function: Callable[..., Any],
    facts: Mapping[str, Any],
    *,
    constants: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Make a function with the arguments and defaults of ``original`` that calls ``function``.

    Args:
        original: Whose arguments it takes.
        function: Takes everything by keyword.
        facts: From an argument of ``function`` to the name of an argument of ``original``, or a value.
        constants: Arguments that are objects.

    Raises:
        ValueError: A fact names an argument that ``original`` lacks.
    """
    # `kernels` puts a module with a forward in the place of the functions it decorates.
    signature = inspect.signature(original.forward if isinstance(original, nn.Module) else original)
    parameters = signature.parameters.values()
    names = [_identifier(parameter.name) for parameter in parameters]
    missing = [value for value in facts.values() if isinstance(value, str) and value not in names]
    if missing:
        raise ValueError(f"{getattr(original, '__qualname__', original)} has no argument {missing[0]!r}")
    scope: dict[str, Any] = {"function": function, **(constants or {})}
    defaults: dict[str, str] = {}
    for parameter in parameters:
        if parameter.default is not parameter.empty:
            defaults[parameter.name] = f"default_{parameter.name}"
            scope[f"default_{parameter.name}"] = parameter.default
    handed = [
        f"{role}={value if isinstance(value, str) else _literal(value)}" for role, value in facts.items()
    ]
    handed += [f"{role}={role}" for role in constants or {}]
    name = _identifier(original.__name__)
    text = f"{def_line(name, parameters, defaults)}\n    return function({', '.join(handed)})\n"
    compile_source(text, name, scope)
    made = scope[name]
    made.__module__ = __name__
    return made  # type: ignore[no-any-return]
