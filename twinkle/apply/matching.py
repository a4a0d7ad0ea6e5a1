"""Match: which kernels are registered for which modules of a model. Nothing is planned or touched here."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

from twinkle.apply.bound import Bound, specialise
from twinkle.hooks.resolution import means
from twinkle.runtime import runtime
from twinkle.sources.specialised import SpecialisedSource
from twinkle.swap.generated import original_of
from twinkle.targets import Op, defining_match

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from twinkle.match.recognition import Recognition
    from twinkle.records import LayerKernel, LayerTarget, Source

__all__ = ["is_registered", "match", "taken_for"]


def match(model: nn.Module, embedded_on: str | None) -> list[Bound]:
    """The modules of a model that kernels are registered for, in the order of ``model.modules()``.

    What is the same for all modules of a class is asked once.

    Args:
        model: Is only read.
        embedded_on: The device of the embedded kernels, which are for modules that nothing else is
            registered for; None where they are off.
    """
    rules: dict[type, Callable[[nn.Module], Bound | None] | None] = {}
    found = []
    for module in model.modules():
        cls = type(module)
        if cls not in rules:
            rules[cls] = _rule(original_of(cls), embedded_on)
        rule = rules[cls]
        bound = rule(module) if rule is not None else None
        if bound is not None:
            found.append(bound)
    return found


def is_registered(cls: type) -> bool:
    """Whether something is registered for modules of a class: by name, by pattern or for the op it is."""
    return _registered(cls, _recognition(cls)) is not None


def taken_for(cls: type) -> LayerTarget | None:
    """The registration of an op that modules of a class are bound by, where that is what binds them."""
    found = _registered(cls, _recognition(cls))
    entry = found[1] if found is not None else None
    return entry if entry is not None and isinstance(entry.target, Op) else None


def _recognition(cls: type) -> Callable[[], Recognition]:
    @cache
    def recognition() -> Recognition:
        """What the class is recognised as: asked at most once, and not of a class that was named."""
        from twinkle.match.structure import recognise

        return recognise(cls)

    return recognition


def _rule(cls: type, embedded_on: str | None) -> Callable[[nn.Module], Bound | None] | None:
    """How a module of a class is bound; None where no module of it is."""
    recognition = _recognition(cls)
    registered = _registered(cls, recognition)
    if registered is not None:
        target, entry, kernels = registered
        if entry is None or not isinstance(entry.target, Op):
            return partial(_named, cls, target, kernels, entry)
        return partial(_recognised, cls, kernels, entry, recognition())
    if embedded_on is None:
        return None
    from twinkle.apply import embedded

    return embedded.layer_rule(cls, recognition(), embedded_on)


def _registered(
    cls: type, recognition: Callable[[], Recognition]
) -> tuple[type, LayerTarget | None, tuple[LayerKernel, ...]] | None:
    """The target class, the registration and its kernels; the newest registration wins."""
    for entry in reversed(runtime.registry.layer_targets):
        if isinstance(entry.target, Op):
            target = cls if recognition().op == entry.target.op else None
        else:
            target = defining_match(cls, entry.target, means)
        if target is not None:
            kernels = runtime.registry.kernels_named(entry.kernel_name)
            return (target, entry, kernels) if kernels else None
    running = getattr(cls, "forward", None)
    for base in cls.__mro__:
        name = base.__dict__.get("kernel_layer_name")
        if isinstance(name, str) and getattr(base, "forward", None) is running:
            kernels = runtime.registry.kernels_named(name)
            return (base, None, kernels) if kernels else None
    return None


def _named(
    cls: type, target: type, kernels: tuple[LayerKernel, ...], entry: LayerTarget | None, module: nn.Module
) -> Bound:
    """Bind a module of a class that was named."""
    return Bound(module, cls, target, kernels, entry)


def _recognised(
    cls: type,
    kernels: tuple[LayerKernel, ...],
    entry: LayerTarget,
    recognition: Recognition,
    module: nn.Module,
) -> Bound:
    """Bind a module of a class that is recognised as an op: its kernels are specialised for the module."""
    from twinkle.match.structure import check_instance

    checked = check_instance(recognition, module)
    facts = checked if isinstance(checked, dict) else str(checked)

    def source(registered: Source) -> SpecialisedSource:
        return SpecialisedSource(registered, str(recognition.op), recognition.variant, facts)

    return Bound(module, cls, cls, specialise(cls, kernels, facts, source), entry)
