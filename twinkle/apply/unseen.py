"""Models and layers that came into the process unseen, and have no kernels.

Kernels are put in at the end of a construction or of ``__setstate__`` (:mod:`twinkle.hooks.restored`), and
into layers at their first call (:mod:`twinkle.apply.first_calls`). Models that were made ready in another way
come past all of these, and so do layers of a class that was never asked about. The report says so; of layers
that the user's kernels are for, the end of the process does, too.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from torch import nn

from twinkle.apply.arrivals import Arrivals
from twinkle.apply.candidates import can_run
from twinkle.apply.matching import kernels_for
from twinkle.hooks.construction import watched_classes
from twinkle.runtime import runtime
from twinkle.swap.class_tree import core_of
from twinkle.swap.first_calls import asks, is_decided
from twinkle.swap.layers import placed
from twinkle.targets import class_path

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

__all__ = ["Constructed", "Traced", "remarks"]


class Constructed:
    """The models and layers that kernels were put into, or looked for, when they came."""

    def __init__(self) -> None:
        self._models: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def add(self, model: Any) -> None:
        """Remember a model while it lives."""
        self._models[id(model)] = model

    def __contains__(self, model: object) -> bool:
        return self._models.get(id(model)) is model

    def parts(self) -> set[int]:
        """The ids of the modules in all of them."""
        return {id(part) for model in list(self._models.values()) for part in model.modules()}


class Traced:
    """The classes of which a tracer met a layer first that nobody had decided about."""

    def __init__(self) -> None:
        self.classes: set[str] = set()


def remarks() -> list[str]:
    """A sentence for each class with objects that nobody saw come and that have no kernels.

    Those of layers that the user's kernels are for are also the misses of the session from now on.
    """
    everything = gc.get_objects()
    misses = [
        f"{name} keeps its original where a tracer met a layer first that came without its __init__: "
        "call the model once before it is traced"
        for name in sorted(runtime.of(Traced).classes)
    ]
    why = "nobody saw them come: made without their __init__, or before the kernel was registered"
    what = "kernelize_model(model) puts them in"
    counts = _counted(_unseen_layers(everything))
    misses += [f"{count} {name} without kernels: {why}; {what}" for name, count in counts.items()]
    runtime.session.misses = misses
    why = "not constructed in this process but made from a pickle (torch.load, a worker) or a copy"
    what = "construct the model and load its state_dict"
    counts = _counted(_unseen_models(everything))
    return [*misses, *(f"{count} {name} without kernels: {why}; {what}" for name, count in counts.items())]


def _counted(things: Iterable[object]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for thing in things:
        name = class_path(type(thing))
        counts[name] = counts.get(name, 0) + 1
    return counts


def _unseen_models(everything: Iterable[object]) -> list[Any]:
    families, constructed = watched_classes(), runtime.of(Constructed)
    alive: list[Any] = [thing for thing in everything if issubclass(type(thing), families)]
    inner = {id(part) for model in alive for part in model.modules() if part is not model}
    return [
        model
        for model in alive
        if not (id(model) in inner or model in constructed or any(map(placed, model.modules())))
    ]


def _unseen_layers(everything: Iterable[object]) -> list[Any]:
    """The layers of classes that kernels are registered for and that do not ask about their instances."""
    classes = runtime.of(Arrivals).classes
    if classes is None:
        return []
    found, known = [], dict[type, bool]()
    for thing in everything:
        cls = type(thing)
        if cls not in known:
            core = core_of(cls)[0] if issubclass(cls, nn.Module) and not asks(cls) else None
            known[cls] = core is not None and classes.wants(core) and can_run(kernels_for(core))
        if known[cls]:
            found.append(thing)
    parts = runtime.of(Constructed).parts() if found else set()
    return [layer for layer in found if id(layer) not in parts and not is_decided(layer)]
