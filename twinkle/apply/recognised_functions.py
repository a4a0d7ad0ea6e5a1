"""Kernels for the functions beside the classes of a model, found by the structure of their code."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from twinkle import op_names
from twinkle.apply.bindings import function_binding
from twinkle.match.instance import Facts
from twinkle.match.structure import recognise
from twinkle.match.symbolic.source import function_of_callable
from twinkle.runtime import runtime
from twinkle.sources.specialised import SpecialisedSource
from twinkle.targets import Name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

    from twinkle.match.recognition import Recognition
    from twinkle.records import FunctionKernel, Source

__all__ = ["RecognisedFunction", "register", "register_in", "specialise_function"]


class RecognisedFunction(NamedTuple):
    """A function of a module that is an op.

    Attributes:
        module: The name of the module.
        name: Of the function in it.
        original: The function.
        recognition: Which op, and how.
    """

    module: str
    name: str
    original: Callable[..., Any]
    recognition: Recognition


class _Functions:
    """The recognised functions of modules, and the kernels that were made for them."""

    def __init__(self) -> None:
        self.recognised: dict[str, tuple[Any, list[RecognisedFunction]]] = {}
        self.specialised: dict[tuple[FunctionKernel, str, str, str | None], tuple[Any, FunctionKernel]] = {}


def register(
    model: nn.Module, offered: Callable[[RecognisedFunction], Sequence[FunctionKernel]] | None
) -> dict[str, bool]:
    """Register kernels for recognised functions in the modules that define the classes of a model.

    Args:
        model: The model.
        offered: Gives the embedded kernels for a function, which are taken where nothing else was bound;
            None where they are off.

    Returns:
        The modules that have new ones, and whether somebody asked for them.
    """
    return register_in(dict.fromkeys(type(layer).__module__ for layer in model.modules()), offered)


def register_in(
    modules: Iterable[str], offered: Callable[[RecognisedFunction], Sequence[FunctionKernel]] | None
) -> dict[str, bool]:
    """:func:`register` for modules by their names."""
    bound: dict[str, list[FunctionKernel]] = {}
    for kernel in runtime.registry.function_kernels:
        if kernel.op is None:
            continue
        if kernel.name in runtime.options.disabled:
            function_binding(kernel).set("skipped", "switched off by TWINKLE_DISABLE")
        else:
            bound.setdefault(kernel.op, []).append(kernel)
    if not bound and offered is None:
        return {}
    changed: dict[str, bool] = {}
    for module in modules:
        for found in _functions_of(module):
            asked_for = _registered(found, bound.get(str(found.recognition.op), ()))
            if asked_for or (offered is not None and _taken(offered(found))):
                changed[module] = changed.get(module, False) or asked_for
    return changed


def _registered(found: RecognisedFunction, kernels: Iterable[FunctionKernel]) -> bool:
    """Register the kernels of an op for one function that is it, unless a user named the function."""
    named = [kernel for kernel in runtime.registry.functions_of(found.module) if kernel.name == found.name]
    if any(not kernel.recognised for kernel in named):
        return False
    op, variant = found.recognition.op, found.recognition.variant
    facts = Facts(found.recognition.facts, found.recognition.reads)
    made = []
    for kernel in kernels:
        runtime.registry.unbind(kernel, kernel.target.text)
        made.append(
            specialise_function(
                kernel, found, lambda s: SpecialisedSource(s, str(op), variant, facts, found.original)
            )
        )
    made = [kernel for kernel in made if kernel not in named]
    runtime.registry.add(function_kernels=tuple(made))
    return bool(made)


def _taken(kernels: Sequence[FunctionKernel]) -> bool:
    """Register embedded kernels, unless they are."""
    made = tuple(kernel for kernel in kernels if kernel not in runtime.embedded.function_kernels)
    runtime.embedded.add(function_kernels=made)
    return bool(made)


def specialise_function(
    kernel: FunctionKernel,
    found: RecognisedFunction,
    source: Callable[[Source], Source],
    *,
    device: str | None = None,
) -> FunctionKernel:
    """A kernel that was registered for an op, for one function that is it; the same one each time.

    Args:
        kernel: As registered.
        found: The function.
        source: From the source of the kernel to that of the same kernel for this function.
        device: What the kernel is for where its registration does not say.
    """
    key = (kernel, found.module, found.name, device)
    made_before = runtime.of(_Functions).specialised
    known = made_before.get(key)
    if known is None or known[0] is not found.original:
        made = kernel.specialised(source(kernel.source), device=device)
        made.name, made.target = found.name, Name(found.module, found.name)
        known = made_before[key] = (found.original, made)
    return known[1]


def _functions_of(name: str) -> list[RecognisedFunction]:
    """The functions that a module defines and that are recognised; worked out once."""
    namespace = sys.modules.get(name)
    if namespace is None or name.partition(".")[0] == "torch":
        return []
    recognised = runtime.of(_Functions).recognised
    known = recognised.get(name)
    if known is None or known[0] is not namespace:
        known = recognised[name] = (namespace, list(_recognised(namespace, name)))
    return known[1]


def _recognised(namespace: Any, name: str) -> Iterable[RecognisedFunction]:
    for attribute, value in list(vars(namespace).items()):
        if isinstance(value, type) or not callable(value):
            continue
        recognition = recognise(value)
        if recognition.target.startswith(f"{name}:") and recognition.op in op_names.FUNCTION_OPS:
            # `kernels` puts a module in the place of the functions it decorates.
            yield RecognisedFunction(name, attribute, function_of_callable(value) or value, recognition)
