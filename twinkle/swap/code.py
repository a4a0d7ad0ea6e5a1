"""Python code written at run time: functions with the arguments of another function."""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable
from inspect import Parameter
from itertools import count
from types import FunctionType
from typing import Any

import torch

from twinkle.fit.signatures import signature_of

__all__ = ["CallForm", "execute", "set_code"]

_numbers = count(1)


class CallForm:
    """How the arguments of a function are taken and handed on, as text."""

    def __init__(self, function: Callable[..., Any], skip: int) -> None:
        try:
            signature: inspect.Signature | None = inspect.signature(function, follow_wrapped=False)
        except (TypeError, ValueError):
            signature = None
        if isinstance(function, FunctionType):
            # What the code really takes, whatever `__signature__` says.
            shown = function.__dict__.get("__signature__")
            if shown is not None:
                bare = FunctionType(function.__code__, {}, "f", function.__defaults__, function.__closure__)
                bare.__kwdefaults__ = function.__kwdefaults__
                signature = inspect.signature(bare)
        if signature is None or any(not n.isidentifier() for n in signature.parameters):
            self.parameters = [
                Parameter("args", Parameter.VAR_POSITIONAL),
                Parameter("kwargs", Parameter.VAR_KEYWORD),
            ]
        else:
            self.parameters = list(signature.parameters.values())
        self.signature = signature
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
        self.probe: str | None = next(iter(self._names[skip:]), None)
        self._settled = False

    def head(self, name: str) -> str:
        """The ``def`` line; defaults are set on the function, where they are the original's own objects."""
        parts, star = [], False
        for index, p in enumerate(self.parameters):
            if p.kind is Parameter.KEYWORD_ONLY and not star:
                parts.append("*")
                star = True
            parts.append(_stars(p) + p.name)
            star = star or p.kind is Parameter.VAR_POSITIONAL
            after = self.parameters[index + 1].kind if index + 1 < len(self.parameters) else None
            if p.kind is Parameter.POSITIONAL_ONLY and after is not Parameter.POSITIONAL_ONLY:
                parts.append("/")
        return f"def {name}({', '.join(parts)}):"

    def values(self) -> str:
        """A tuple of everything that may hold the first tensor."""
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
        """Settle on the argument that holds the first tensor; true if that changed it."""
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
        """What a call gives for the argument that holds the first tensor; None for none."""
        if self.probe in kwargs or self.probe is None:
            return kwargs.get(self.probe) if self.probe else None
        at = self._names.index(self.probe)
        return args[at] if at < len(args) else None

    def dress(self, function: FunctionType, original: Callable[..., Any]) -> None:
        """Make a generated function look like the original; no ``__wrapped__``, or others strip it."""
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
        shown = signature_of(original)
        if shown is not None:
            function.__signature__ = shown  # type: ignore[attr-defined]

    def _set_defaults(self, function: FunctionType) -> None:
        given = [p for p in self.parameters if p.default is not Parameter.empty]
        positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        function.__defaults__ = tuple(p.default for p in given if p.kind in positional) or None
        function.__kwdefaults__ = {
            p.name: p.default for p in given if p.kind is Parameter.KEYWORD_ONLY
        } or None


def _stars(parameter: Parameter) -> str:
    if parameter.kind is Parameter.VAR_POSITIONAL:
        return "*"
    return "**" if parameter.kind is Parameter.VAR_KEYWORD else ""


def execute(text: str, title: str, scope: dict[str, Any]) -> None:
    """Run a definition in ``scope``."""
    filename = f"<twinkle {title} #{next(_numbers)}>"
    # Tracebacks and inspect.getsource find the text here.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    exec(compile(text, filename, "exec"), scope)


def set_code(function: FunctionType, text: str, title: str) -> None:
    """Give a function another body; the text defines one named ``forward``."""
    scope: dict[str, Any] = {}
    execute(text, title, scope)
    function.__code__ = scope["forward"].__code__
