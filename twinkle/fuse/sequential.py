"""The forward of ``nn.Sequential`` with one kernel for a GroupNorm and the SiLU that is its next layer.

A ``Sequential`` has no statements to find a place in: its layers are its steps. Its kernel belongs to a class
of torch, which outlives every class of a program. So it knows torch's own GroupNorm and SiLU alone.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from torch import nn

from twinkle.fuse.group_norm_silu import ActivatedNormStep, activated, group_norm_of
from twinkle.match.reads import Guard
from twinkle.runtime import runtime
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from twinkle.ops.group_norm.reference import GroupNormVariant

__all__ = ["FusedSequential", "is_sequential", "variant_in"]


def is_sequential(cls: type) -> bool:
    """Whether layers of a class call their children in order, each with the result of the one before."""
    return (
        issubclass(cls, nn.Sequential)
        and own_forward(cls) is own_forward(nn.Sequential)
        and getattr(cls, "__iter__", None) is nn.Sequential.__iter__
    )


def variant_in(layers: nn.Module) -> GroupNormVariant | None:
    """The variant that a GroupNorm and a SiLU behind it among the children are; None without such a pair."""
    if not any(_is_pair(*pair) for pair in itertools.pairwise(layers._modules.values())):
        return None
    if isinstance(group_norm_of(nn.GroupNorm), str):
        return None
    found = activated(nn.SiLU)
    return None if isinstance(found, str) else found.variant


def _is_pair(norm: Any, act: Any) -> bool:
    return type(norm) is nn.GroupNorm and type(act) is nn.SiLU


class FusedSequential:
    """The source of that forward.

    Args:
        variant: What a GroupNorm and a SiLU are.

    Attributes:
        guarded: True: a kernel that raises is caught at its place.
        guard: Nothing: each place asks for itself.
    """

    kind = "embedded"
    guarded = True

    def __init__(self, variant: GroupNormVariant) -> None:
        self.variant = variant
        self.guard = Guard(())
        self._made: type[nn.Module] | None = None

    def describe(self) -> str:
        """The op and its variant."""
        return f"embedded {ActivatedNormStep.op} ({self.variant.name})"

    def load(self) -> object:
        """A layer class with that forward; the same one each time."""
        if self._made is None:
            proofs = runtime.options.proofs(None, bound_by_name=False)
            step = ActivatedNormStep(self, False, proofs=proofs, recall=runtime.options.recalls(None))
            members = {
                "forward": _forward(step.begin),
                "can_torch_compile": True,
                "has_backward": True,
                "__module__": __name__,
            }
            self._made = type("Fused", (nn.Module,), members)
        return self._made


def _forward(begin: Callable[..., tuple[Tensor, bool]]) -> Callable[..., Tensor]:
    def forward(self: Any, input: Any) -> Any:
        norm = None  # the layer that waits for the one behind it
        for module in self:
            if norm is not None:
                done = False
                if type(module) is nn.SiLU:
                    input, done = begin(self, input, norm, module)
                else:
                    input = norm(input)
                norm = None
                if done:
                    continue
            if type(module) is nn.GroupNorm:
                norm = module
            else:
                input = module(input)
        return input if norm is None else norm(input)

    return forward
