"""Functions written at run time with the arguments of another function."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from inspect import Parameter
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from twinkle.codegen import compile_source, def_line
from twinkle.errors import KernelError
from twinkle.fit.layer import check_function
from twinkle.fit.signatures import signature_of
from twinkle.swap.kinds import FRONTS, PLAIN, body_of, check_kind, kind_of
from twinkle.swap.reentry import MARKED, Mark
from twinkle.swap.scope import Scope

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CallForm", "adapt", "fitted", "forwarding_function", "set_code"]


_MOST_IN_A_TUPLE = 4


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

    def has(self, name: str) -> bool:
        """Whether there is a parameter of a name."""
        return name in self._names

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

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the expressions that name them in the text, without ``skip``.

        Those in short tuples and lists stand beside these: ``x``, ``tables[0]``, ``args[1]``.
        """
        found: dict[str, Any] = {}
        left, named = list(args), dict(kwargs)
        for p in self.parameters:
            if p.kind is Parameter.VAR_POSITIONAL:
                found.update((f"{p.name}[{n}]", value) for n, value in enumerate(left))
            elif p.kind is Parameter.VAR_KEYWORD:
                found.update((f"{p.name}[{name!r}]", value) for name, value in named.items())
            elif p.name in named:
                found[p.name] = named.pop(p.name)
            elif left and p.kind is not Parameter.KEYWORD_ONLY:
                found[p.name] = left.pop(0)
        for name in list(found)[: self.skip]:
            del found[name]
        for name, value in list(found.items()):
            if type(value) in (tuple, list) and len(value) <= _MOST_IN_A_TUPLE:
                found.update((f"{name}[{n}]", part) for n, part in enumerate(value))
        return found

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
    """The parameters that a function's code takes, whatever its ``__signature__`` says.

    Of a layer that stands for a function (``kernels`` puts one in the place of those it decorates) they are
    those of the function, which its forward says it has and hands on.
    """
    if isinstance(function, nn.Module) and _hands_on(type(function).forward):
        function = function.forward
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


def _hands_on(forward: Any) -> bool:
    """Whether a forward takes whatever it is given, and says what that is."""
    if not isinstance(forward, FunctionType) or "__signature__" not in forward.__dict__:
        return False
    code = forward.__code__
    takes_all = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
    return code.co_flags & takes_all == takes_all and code.co_argcount == 1 and not code.co_kwonlyargcount


def forwarding_function(
    original: Callable[..., Any],
    callee: Callable[..., Any],
    *,
    dispatch: object = None,
    wants_original: bool = False,
) -> FunctionType:
    """A function that looks like ``original``, is of its kind, and hands its arguments to ``callee``.

    It binds ``self`` where it is looked up on an instance, which a module or another callable does not.

    Args:
        original: What the function stands in for.
        callee: Gives what the original gives: the result, or what is to be awaited or iterated.
        dispatch: What is behind the function, for :func:`twinkle.swap.scope.dispatch_behind`.
        wants_original: Hand ``original`` on as well, by that name.
    """
    form = CallForm(original, 0)
    scope = Scope(original, ["_tw_callee"], dispatch)
    scope["_tw_callee"], scope["_tw_original"] = callee, original
    for error in (GeneratorExit, BaseException, StopAsyncIteration):
        scope[f"_tw_{error.__name__}"] = error
    handed = [form.arguments, "original=_tw_original" if wants_original else ""]
    call = f"_tw_callee({', '.join(filter(None, handed))})"
    text = FRONTS[kind_of(original)].format(head=form.head("forward"), call=call)
    function = scope.function(text, getattr(original, "__qualname__", "function"))
    form.dress(function, original)
    return function


def fitted(
    implementation: Any,
    original: Callable[..., Any],
    *,
    called: str | None = None,
    method: bool = False,
    marked: bool = False,
) -> Callable[..., Any]:
    """Make a function of an implementation that can stand where ``original`` stands.

    A kernel that has a keyword-only parameter ``original`` gets the original by it.

    Args:
        implementation: A callable or an ``nn.Module`` class.
        original: What it replaces.
        called: What messages call the original, where it does not know its own name.
        method: It has to bind ``self`` when it is looked up on an instance.
        marked: What it calls under the name of the original is to be the original.

    Raises:
        KernelError: It is of another kind, or has another signature.
    """
    if kind_of(original) != PLAIN and getattr(implementation, "__globals__", None) is vars(contextlib):
        implementation = implementation.__wrapped__  # The original's own contextmanager stays around it.
    check_kind(implementation, original)
    wants = _wants_original(implementation, original)
    if wants and isinstance(implementation, FunctionType):
        implementation, wants = _with_original(implementation, original), False
    check_function(implementation, original, called=called)
    made = adapt(implementation, original, method=method, wants_original=wants)
    return _marked(made, original) if marked else made


def _marked(kernel: Callable[..., Any], original: Callable[..., Any]) -> FunctionType:
    """A function that looks like ``original`` and runs a kernel under its mark."""
    mark = Mark(kernel, original)
    if kind_of(original) != PLAIN:
        return forwarding_function(original, mark.started, dispatch=mark)
    form = CallForm(original, 0)
    names = {
        "_tw_compiling": torch.compiler.is_compiling,
        "_tw_kernel": kernel,
        "_tw_ident": threading.get_ident,
    }
    scope = Scope(original, names, mark)
    rest = {"_tw_original": original, "_tw_threads": mark.threads, "_tw_inlined": mark.inlined}
    for name, value in (names | rest).items():
        scope[name] = value
    text = MARKED.format(head=form.head("forward"), arguments=form.arguments)
    function = scope.function(text, getattr(original, "__qualname__", "function"))
    form.dress(function, original)
    return function


def _wants_original(implementation: Any, original: Callable[..., Any]) -> bool:
    signature, theirs = signature_of(body_of(implementation)), signature_of(original)
    parameter = signature.parameters.get("original") if signature is not None else None
    taken = theirs is not None and "original" in theirs.parameters
    return parameter is not None and parameter.kind is Parameter.KEYWORD_ONLY and not taken


def _with_original(kernel: FunctionType, original: Callable[..., Any]) -> FunctionType:
    """A copy of a kernel whose default for ``original`` is the original: no call in between."""
    made = FunctionType(
        kernel.__code__, kernel.__globals__, kernel.__name__, kernel.__defaults__, kernel.__closure__
    )
    functools.update_wrapper(made, kernel)
    del made.__wrapped__  # type: ignore[attr-defined]
    vars(made).update(vars(kernel))
    made.__kwdefaults__ = {**(kernel.__kwdefaults__ or {}), "original": original}
    return made


def adapt(
    implementation: Any,
    original: Callable[..., Any],
    *,
    method: bool = False,
    wants_original: bool = False,
) -> Callable[..., Any]:
    """What :func:`fitted` does with an implementation that fits, for which see there.

    Args:
        implementation: A callable or an ``nn.Module`` class.
        original: What it replaces.
        method: It has to bind ``self`` when it is looked up on an instance.
        wants_original: It is no plain function, and has a parameter ``original``.
    """
    if isinstance(implementation, type) and issubclass(implementation, nn.Module):
        try:
            implementation = implementation()
        except Exception as error:
            raise KernelError(
                f"kernel {implementation.__qualname__} cannot be made: {type(error).__name__}: {error}",
                expected="an nn.Module class whose instance needs no arguments",
            ) from error
    binds = hasattr(type(implementation), "__get__")
    if wants_original or isinstance(implementation, nn.Module) or (method and not binds):
        return forwarding_function(original, implementation, wants_original=wants_original)
    made: Callable[..., Any] = implementation
    return made


def set_code(function: FunctionType, text: str, title: str) -> None:
    """Give a function another body; the text defines one named ``forward``."""
    scope: dict[str, Any] = {}
    compile_source(text, title, scope)
    function.__code__ = scope["forward"].__code__
