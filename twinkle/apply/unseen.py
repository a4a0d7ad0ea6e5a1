"""Models that came into the process ready-made: from a pickle, ``torch.load`` or the parent of a worker.

Kernels are put in at the end of a construction or of ``__setstate__`` (:mod:`twinkle.hooks.restored`). Where
a class takes its state in another way, nobody sees its objects come. The report says so.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from twinkle.hooks.construction import watched_classes
from twinkle.runtime import runtime
from twinkle.swap.layers import placed
from twinkle.targets import class_path

if TYPE_CHECKING:
    from typing import Any

__all__ = ["Constructed", "remarks"]


class Constructed:
    """The models that kernels were put into, or looked for, when they were constructed."""

    def __init__(self) -> None:
        self._models: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def add(self, model: Any) -> None:
        """Remember a model while it lives."""
        self._models[id(model)] = model

    def __contains__(self, model: object) -> bool:
        return self._models.get(id(model)) is model


def remarks() -> list[str]:
    """A sentence for each class with objects that nobody saw constructed and that have no kernels."""
    families, constructed = watched_classes(), runtime.of(Constructed)
    alive: list[Any] = [thing for thing in gc.get_objects() if issubclass(type(thing), families)]
    inner = {id(part) for model in alive for part in model.modules() if part is not model}
    counts: dict[str, int] = {}
    for model in alive:
        if id(model) in inner or model in constructed or any(map(placed, model.modules())):
            continue
        name = class_path(type(model))
        counts[name] = counts.get(name, 0) + 1
    why = "not constructed in this process but made from a pickle (torch.load, a worker) or a copy"
    what = "construct the model and load its state_dict"
    return [f"{count} {name} without kernels: {why}; {what}" for name, count in counts.items()]
