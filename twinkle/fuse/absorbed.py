"""What the report says of kernels whose calls a fused kernel has taken over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twinkle.fuse.rotations import plain_rotation
from twinkle.match.symbolic.source import function_of_callable
from twinkle.runtime import runtime
from twinkle.swap.layers import candidates_of, original_class

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from twinkle.fuse.steps import Step
    from twinkle.records import Binding

__all__ = ["note_absorbed"]


def note_absorbed(step: Step, owner: nn.Module, layers: Sequence[nn.Module], function: Any = None) -> None:
    """Say of kernels that wait for their first call that a fused one computes what it would be.

    Args:
        step: The place whose kernel ran.
        owner: The layer that holds the place.
        layers: Those that were not called.
        function: The function that was not called, if there is one.
    """
    bindings: list[Binding] = [candidate.binding for layer in layers for candidate in candidates_of(layer)]
    plain = function_of_callable(plain_rotation(function))
    name = f"{getattr(plain, '__module__', None)}:{getattr(plain, '__qualname__', None)}"
    bindings += [
        binding
        for binding in runtime.registry.bindings
        if (binding.kind, binding.target) == ("function", name)
    ]
    for binding in bindings:
        if binding.state == "pending":
            binding.note(f"its calls in {original_class(owner).__qualname__} are computed by {step.op}")
