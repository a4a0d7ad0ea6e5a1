"""Embedded kernels that raise after they were proven: the definition computes the step, somebody is told."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch

from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["Failures", "Listener", "backward_survives", "is_failure", "made_good"]

_PASSING = frozenset({"_StopRecomputationError"})


def is_failure(error: Exception) -> bool:
    """Whether an exception is no way of torch's to end a forward early, as checkpoints do."""
    return type(error).__name__ not in _PASSING


class Listener(Protocol):
    """What is told of kernels that fail."""

    def backward_failed(self, op: str, error: Exception) -> None:
        """Take note that a backward of an op raised; raises ``error`` where that is what was asked for."""


class Failures:
    """Who is to be told of kernels that fail, while they live."""

    def __init__(self) -> None:
        self.listeners: weakref.WeakSet[Any] = weakref.WeakSet()

    def tell(self, op: str, error: Exception) -> None:
        """Tell all of a backward that raised.

        Args:
            op: As its folder is called.
            error: What it raised.
        """
        for listener in list(self.listeners):
            listener.backward_failed(op, error)


def backward_survives(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a ``backward`` that goes by the definition where a graph of the gradients is made.

    Args:
        op: As its folder is called.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def guarded(ctx: Any, *cotangents: Tensor | None) -> Any:
            try:
                return backward(ctx, *cotangents)
            except Exception as error:
                if torch.is_grad_enabled() or not is_failure(error):
                    raise
                runtime.of(Failures).tell(op, error)
            return made_good(backward, ctx, *cotangents)

        return guarded

    return decorate


def made_good(backward: Callable[..., Any], ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    """The gradients by the definition, for a backward that keeps no graph."""
    with torch.enable_grad():
        found = backward(ctx, *cotangents)
    return tuple(None if gradient is None else gradient.detach() for gradient in found)
