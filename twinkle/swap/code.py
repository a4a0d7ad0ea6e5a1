"""Functions written at run time with the arguments of another function."""

from __future__ import annotations

import inspect
from inspect import Parameter
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from twinkle.codegen import compile_source, def_line
from twinkle.errors import KernelError
from twinkle.fit.signatures import signature_of
from twinkle.swap.scope import Scope

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CallForm", "adapt", "forwarding_function", "set_code"]


class CallForm:
    """How the arguments of a function are taken and handed on, as source text.

    Args:
        function: The function whose arguments they are.
        skip: Leading arguments that never hold the first tensor (``self``).

    Attributes:
        parameters: The parameters of ``function``, or ``*args, **kwargs`` where they cannot be read.
        arguments: What a call hands on, every argument under its own name: ``x, *args, eps=eps``.
        packed: The same as a tuple and a dict: ``(x, *args, ), {'eps': eps}``.
        probe: The parameter that is expected to hold the first tensor; None where none has a name.
        first: The expression of the first argument.
    """

    def __init__(self, function: Callable[..., Any], skip: int) -> None:
        self.parameters = _parameters_of(function)
        self.skip = skip
        handed, packed, named = [], [], []
        for p in self.parameters:
            if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD):
                handed.append(p.name)
                packed.append(p.name)
            elif p.kind is Parameter.VAR_POSITIONAL:
                handed.append(f"*{p.name}")
                packed.append(f"*{p.name}")
            elif p.kind is Parameter.KEYWORD_ONLY:
                handed.append(f"{p.name}={p.name}")
                named.append(f"{p.name!r}: {p.name}")
            else:
                handed.append(f"**{p.name}")
                named.append(f"**{p.name}")
        self.arguments = ", ".join(handed)
        self.packed = f"({''.join(f'{p}, ' for p in packed)}), {{{', '.join(named)}}}"
        self._names = [
            p.name for p in self.parameters if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        ]
        star = self.parameters and self.parameters[0].kind is Parameter.VAR_POSITIONAL
        self.first = f"{self.parameters[0].name}{'[0]' if star else ''}" if self.parameters else "None"
        self.probe: str | None = next(iter(self._names[skip:]), None)
        self._settled = False

    def head(self, name: str) -> str:
        """The ``def`` line; defaults are set on the function, where they are the original's own objects."""
        return def_line(name, self.parameters)

    def values(self) -> str:
        """The expression of a tuple of all arguments that may hold the first tensor."""
        parts = []
        for p in self.parameters:
            if p.kind is Parameter.VAR_POSITIONAL:
                parts.append(f"*{p.name}")
            elif p.kind is Parameter.VAR_KEYWORD:
                parts.append(f"*{p.name}.values()")
            else:
                parts.append(p.name)
        return f"({''.join(f'{part}, ' for part in parts)})"

    def look_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Set ``probe`` to the argument of a call that holds the first tensor; true if that changed it."""
        if self._settled:
            return False
        given = dict(zip(self._names, args, strict=False))
        given.update({n: v for n, v in kwargs.items() if n in self._names})
        for name in self._names[self.skip :]:
            if isinstance(given.get(name), torch.Tensor):
                changed, self.probe, self._settled = self.probe != name, name, True
                return changed
        return False

    def probed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument of a call that is expected to hold the first tensor; None where it is not given."""
        if self.probe in kwargs or self.probe is None:
            return kwargs.get(self.probe) if self.probe else None
        at = self._names.index(self.probe)
        return args[at] if at < len(args) else None

    def dress(self, function: FunctionType, original: Callable[..., Any]) -> None:
        """Make a generated function look like the original; without ``__wrapped__``, or others strip it."""
        if isinstance(original, FunctionType):
            function.__defaults__ = original.__defaults__
            function.__kwdefaults__ = original.__kwdefaults__
        else:
            self._set_defaults(function)
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            value = getattr(original, name, None)
            if isinstance(value, str) or name == "__doc__":
                setattr(function, name, value)
        function.__annotations__ = dict(getattr(original, "__annotations__", None) or {})
        extra = {k: v for k, v in getattr(original, "__dict__", {}).items() if k != "__wrapped__"}
        if isinstance(original, FunctionType):
            function.__dict__.update(extra)
        signature = signature_of(original)
        if signature is not None:
            function.__signature__ = signature  # type: ignore[attr-defined]

    def _set_defaults(self, function: FunctionType) -> None:
        given = [p for p in self.parameters if p.default is not Parameter.empty]
        positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        function.__defaults__ = tuple(p.default for p in given if p.kind in positional) or None
        function.__kwdefaults__ = {
            p.name: p.default for p in given if p.kind is Parameter.KEYWORD_ONLY
        } or None


def _parameters_of(function: Callable[..., Any]) -> list[Parameter]:
    """The parameters that a function's code takes, whatever its ``__signature__`` says."""
    try:
        signature: inspect.Signature | None = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        signature = None
    if isinstance(function, FunctionType) and function.__dict__.get("__signature__") is not None:
        bare = FunctionType(function.__code__, {}, "f", function.__defaults__, function.__closure__)
        bare.__kwdefaults__ = function.__kwdefaults__
        signature = inspect.signature(bare)
    if signature is None or any(not name.isidentifier() for name in signature.parameters):
        return [Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)]
    return list(signature.parameters.values())


def forwarding_function(original: Callable[..., Any], callee: Callable[..., Any]) -> FunctionType:
    """A plain function that looks like ``original`` and hands its arguments to ``callee``.

    It binds ``self`` where it is looked up on an instance, which a module or another callable does not.
    """
    form = CallForm(original, 0)
    scope = Scope(original, ["_tw_callee"])
    scope["_tw_callee"] = callee
    title = getattr(original, "__qualname__", "function")
    function = scope.function(f"{form.head('forward')}\n    return _tw_callee({form.arguments})\n", title)
    form.dress(function, original)
    return function


def adapt(implementation: Any, original: Callable[..., Any], *, method: bool = False) -> Callable[..., Any]:
    """Make a function of an implementation that can stand where ``original`` stands.

    Args:
        implementation: A callable or an ``nn.Module`` class.
        original: What it replaces.
        method: It has to bind ``self`` when it is looked up on an instance.
    """
    if isinstance(implementation, type) and issubclass(implementation, nn.Module):
        try:
            implementation = implementation()
        except Exception as error:
            raise KernelError(
                f"kernel {implementation.__qualname__} cannot be made: {type(error).__name__}: {error}",
                expected="an nn.Module class whose instance needs no arguments",
            ) from error
    if isinstance(implementation, nn.Module) or (method and not isinstance(implementation, FunctionType)):
        return forwarding_function(original, implementation)
    made: Callable[..., Any] = implementation
    return made


def set_code(function: FunctionType, text: str, title: str) -> None:
    """Give a function another body; the text defines one named ``forward``."""
    scope: dict[str, Any] = {}
    compile_source(text, title, scope)
    function.__code__ = scope["forward"].__code__
