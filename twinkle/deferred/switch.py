"""Lets a head defer while a forward of its model runs, and only then.

A head is an ``nn.Linear`` for everyone who looks at it between two calls. From the start of a deferring
forward to its end it has a subclass of its class: a compiler guards on that, so it never mixes up a graph
with logits and one without. Inside a larger graph nothing may be changed that the graph's guards look at:
there the model's forward is traced with a stand-in for the model that differs in its head alone.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from twinkle import forks
from twinkle.deferred.traced import TracedLogits
from twinkle.runtime import runtime
from twinkle.swap.class_tree import set_class

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor, nn

__all__ = ["ModelInGraph", "class_between_calls", "switch_off", "switch_on"]


class _Switched:
    """The heads that defer now in this process, and the classes that they have meanwhile.

    Attributes:
        running: How many forwards, of whichever threads, a head defers in now, by its id.
        classes: The deferring subclass of a class of heads.
    """

    def __init__(self) -> None:
        self.lock = forks.lock()
        self.running: dict[int, int] = {}
        self.classes: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()

    def class_over(self, cls: type, forward: Callable[..., Tensor]) -> type:
        """The subclass of ``cls`` with a forward that defers."""
        made = self.classes.get(cls)
        if made is None or vars(made)["forward"] is not forward:
            names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
            made = type(cls)(cls.__name__, (cls,), {**names, "forward": forward, "__defers__": True})
            self.classes[cls] = made
        return made


def switch_on(head: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Let a head have a forward that defers, until :func:`switch_off` was called as often.

    Args:
        head: An ``nn.Linear`` whose class keeps the forward of ``nn.Linear``.
        forward: Takes the head and its input, and asks by itself which threads it is to defer in.
    """
    switched = runtime.of(_Switched)
    with switched.lock:
        running = switched.running.get(id(head), 0)
        if not running:
            set_class(head, switched.class_over(class_between_calls(head), forward))
        switched.running[id(head)] = running + 1


def switch_off(head: nn.Module) -> None:
    """Undo one call of :func:`switch_on`."""
    switched = runtime.of(_Switched)
    with switched.lock:
        running = switched.running.pop(id(head), 1) - 1
        if running > 0:
            switched.running[id(head)] = running
        else:
            set_class(head, class_between_calls(head))


def class_between_calls(head: nn.Module) -> type:
    """The class that a head has while it does not defer."""
    cls = type(head)
    return cls.__bases__[0] if "__defers__" in vars(cls) else cls


class _HeadInGraph:
    """A head while a graph is traced: its output is an object in the place of the logits."""

    def __init__(self, head: Any) -> None:
        self.head = head

    def __call__(self, input: Tensor) -> TracedLogits:
        return TracedLogits(input, self.head.weight, self.head.bias)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)


class ModelInGraph:
    """A model for its own forward while a larger graph is traced: the same but for its head.

    Args:
        model: The model.
        name: The attribute its forward has the head by.
    """

    def __init__(self, model: Any, name: str) -> None:
        self._tw_model = model
        setattr(self, name, _HeadInGraph(getattr(model, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tw_model, name)
