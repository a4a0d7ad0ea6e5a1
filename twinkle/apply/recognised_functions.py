"""Kernels for the functions beside the classes of a model, found by the structure of their code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from twinkle.apply.bindings import function_binding
from twinkle.apply.functions_beside import (
    forwards_of,
    functions_of,
    is_in_layers,
    methods_led_to,
    version_of,
)
from twinkle.match.instance import Facts
from twinkle.runtime import runtime
from twinkle.sources.specialised import SpecialisedSource
from twinkle.targets import Name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

    from twinkle.apply.functions_beside import RecognisedFunction
    from twinkle.records import FunctionKernel, Source

__all__ = ["register", "register_in", "specialise_function"]


class _Functions:
    """The kernels that were made for recognised functions."""

    def __init__(self) -> None:
        self.specialised: dict[tuple[FunctionKernel, str, str, str | None], tuple[Any, FunctionKernel]] = {}
        self.asked: dict[str, tuple[object, ...]] = {}
        self.asked_of: WeakKeyDictionary[type, tuple[object, ...]] = WeakKeyDictionary()


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
    classes = dict.fromkeys(type(layer) for layer in model.modules())
    return register_in(dict.fromkeys(cls.__module__ for cls in classes), offered, classes)


def register_in(
    modules: Iterable[str],
    offered: Callable[[RecognisedFunction], Sequence[FunctionKernel]] | None,
    classes: Iterable[type] = (),
) -> dict[str, bool]:
    """:func:`register` for modules by their names, and for the forwards of classes."""
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
    # What was asked about once is served, or is not, as long as the code and the settings are the same.
    terms = (
        tuple(map(tuple, bound.values())),
        offered is None,
        runtime.options.kernels,
        *runtime.options.disabled,
    )
    found = {module: functions_of(module) for module in modules}
    versions = {module: (version_of(module), *terms) for module in found}
    state = runtime.of(_Functions)
    new = [module for module in found if state.asked.get(module) != versions[module]]
    state.asked.update((module, versions[module]) for module in new)
    classes = [cls for cls in classes if state.asked_of.get(cls) != versions.get(cls.__module__, terms)]
    state.asked_of.update((cls, versions.get(cls.__module__, terms)) for cls in classes)
    forwards = list(forwards_of(classes))
    # A method is a part of its class, and is served where that is used: most of a library are not.
    methods = methods_led_to((one for own in found.values() for one in own), classes)
    if not (new or forwards or methods):
        return {}

    def kernels_for(one: RecognisedFunction) -> tuple[Sequence[FunctionKernel], Sequence[FunctionKernel]]:
        own = () if one.takes_self else bound.get(str(one.recognition.op), ())
        return own, offered(one) if offered is not None else ()

    functions = [one for own in found.values() for one in own if not one.is_method or one in methods]
    served = {one.original: one for one in functions if any(kernels_for(one))}
    wholes = list(served.values())
    # Where the rotation is a function that the forward calls, that one has the kernel.
    served |= {one.original: one for one in forwards if not any(_is_part_of(whole, one) for whole in wholes)}
    changed: dict[str, bool] = {}
    for one in served.values():
        if any(_is_part_of(one, whole) for whole in wholes):
            continue
        if one.of_layers and is_in_layers(one, found):
            continue
        own, embedded = kernels_for(one)
        asked_for = _registered(one, own)
        if asked_for or _taken(embedded):
            changed[one.module] = changed.get(one.module, False) or asked_for
    return changed


def _is_part_of(found: RecognisedFunction, whole: RecognisedFunction) -> bool:
    """Whether a function is called by another one: to the kernel of that one a new callee is a change."""
    return whole.original is not found.original and whole.recognition.rests_on(found.original)


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
