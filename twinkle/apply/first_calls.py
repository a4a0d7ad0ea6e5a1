"""Layers that came without their ``__init__`` are decided about at their first call.

After ``cls.__new__(cls)``, a ``__reduce__`` of the class's own or ``layer.__class__ = cls`` nobody has seen
it come. Its class asks about it as it is called (:mod:`twinkle.swap.first_calls`).
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import nn

from twinkle.apply.arrivals import OWNER, Arrivals
from twinkle.apply.arriving_layers import on_model
from twinkle.apply.candidates import can_run
from twinkle.apply.unseen import Traced
from twinkle.errors import warn
from twinkle.hooks import guard
from twinkle.hooks.construction import under_construction
from twinkle.proof.room import comparing
from twinkle.runtime import runtime
from twinkle.swap import first_calls
from twinkle.swap.front import LEFT_ALONE, MARK
from twinkle.swap.graphs import begin_again, called_by_dynamo
from twinkle.swap.layers import placed
from twinkle.targets import class_path

if TYPE_CHECKING:
    from collections.abc import Iterable

    from twinkle.records import LayerKernel

__all__ = ["Met", "renew", "watch"]


class Met:
    """The classes with layers that nobody saw come.

    Attributes:
        watched: Those that ask about theirs.
        served: Those that nothing is registered for, and that there are embedded kernels for.
        told: Those that strict has told of.
    """

    def __init__(self) -> None:
        self.watched: WeakSet[type[nn.Module]] = WeakSet()
        self.served: WeakSet[type[nn.Module]] = WeakSet()
        self.told: set[str] = set()


def watch(cls: type[nn.Module], kernels: Iterable[LayerKernel] | None = None) -> None:
    """Decide about layers of a class at their first call, where they were not met before.

    Args:
        cls: A class that something is registered for, or that there are embedded kernels for.
        kernels: Those that are registered. Where none can run on this machine, nothing is done.
    """
    state = runtime.of(Met)
    if kernels is None:
        state.served.add(cls)
    if (kernels is None or can_run(kernels)) and first_calls.watch_first_calls(cls, _met, _traced):
        state.watched.add(cls)


def renew(cls: type[nn.Module]) -> None:
    """Have a class ask that has been given another forward since it began to."""
    if not first_calls.asks(cls) and cls in runtime.of(Met).watched:
        first_calls.watch_first_calls(cls, _met, _traced)


def _met(layer: Any) -> bool | None:
    """Decide about a layer that is called, and that nobody has met; whether it has a kernel now.

    None for one of a subclass with a forward of its own, which has called this one.
    """
    classes, cls = runtime.of(Arrivals).classes, type(layer)
    if comparing() or classes is None or any(one is layer for one in under_construction()):
        return False
    state = runtime.of(Met)
    if not (cls in state.served or classes.wants(cls)):
        return None
    layer.__dict__[MARK] = LEFT_ALONE  # now: what it does on its way is not to ask again
    try:
        on_model(layer, whole=False)
    except Exception as error:
        subject = f"the first call of {class_path(cls)}"
        guard.failed(error, owner=OWNER, subject=subject, strict=runtime.options.raises)
    if placed(layer) is None:
        return False
    if type(layer) is not cls:
        layer.__dict__.pop(MARK, None)
    silent = runtime.options.strict and classes.wants(cls)
    if silent and class_path(cls) not in state.told:  # with strict no step is silent
        state.told.add(class_path(cls))
        warn(f"{class_path(cls)} came without its __init__: a layer of it gets its kernel at its first call")
    return True


def _undecided() -> list[nn.Module]:
    """The modules that are alive, and that their classes would ask about."""
    found, asking = [], dict[type, bool]()
    for thing in gc.get_objects():
        kind = type(thing)
        if kind not in asking:
            asking[kind] = issubclass(kind, nn.Module) and first_calls.asks(kind)
        if asking[kind] and not first_calls.is_decided(thing):
            found.append(thing)
    return found


def _traced(cls: type) -> None:
    """A compiler met a layer first: all that are alive are decided about, and its trace begins anew.

    It calls with the class alone, for which it takes the answer for a constant. Where a trace cannot begin
    anew the class is noted.
    """
    if called_by_dynamo(2):
        waiting = _undecided()
        for layer in waiting:
            _met(layer)
        if any(map(first_calls.is_decided, waiting)):
            begin_again("layers were decided about")
    classes = runtime.of(Arrivals).classes
    if classes is not None and classes.wants(cls):
        runtime.of(Traced).classes.add(class_path(cls))
