"""Sample calls of the embedded kernels, each beside its definition: for proofs, tests and benchmarks.

Every op with a kernel has a ``samples.py`` with these functions, the last one where it can be told::

    variants()                                                  the variants of the op
    cases(variant, dtype, device, backend)                      calls of it, of several shapes
    inputs(instance)                                         random inputs for an instance at hand

``inputs`` returns values by argument of the definition, or None where it cannot know them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from twinkle.ops.catalog import all_ops, find_op

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    from torch import Tensor, nn

__all__ = [
    "SHAPES",
    "Case",
    "Instance",
    "cases",
    "implementation",
    "random",
    "sampled_ops",
    "seeded",
    "strided",
    "variants",
]

SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "plain": ((2, 48), 256),
    "one row": ((1, 1), 128),
    "ragged": ((3, 7), 100),
    "wide": ((1, 3), 5000),
    "strided": ((2, 5), 64),
}
"""Leading dimensions and width; ``strided`` is not contiguous, ``ragged`` and ``wide`` fill no block."""


@dataclass(frozen=True)
class Case:
    """One call of a kernel and of its definition.

    Attributes:
        shape: What is special about it.
        original: The definition; takes the module first where there is one.
        kernel: The same for the kernel.
        args: The arguments, without the module.
        module: The layer, for layers.
        facts: What the kernel was made for, as ``twinkle.match`` gives it.
    """

    shape: str
    original: Callable[..., Any]
    kernel: Callable[..., Any]
    args: tuple[Any, ...]
    module: nn.Module | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Instance:
    """What a kernel that was never called is for, to make up inputs from.

    Attributes:
        variant, facts: As recognised and read from it.
        module: The layer, or None for a function.
        lead: Leading dimensions of the inputs, ``[batch, tokens]``.
        dtype: Of the inputs.
        generator: Of the random numbers, on the device of the inputs.
    """

    variant: Any
    facts: Mapping[str, Any]
    module: nn.Module | None
    lead: tuple[int, int]
    dtype: torch.dtype
    generator: torch.Generator

    def part(self, role: str) -> Any:
        """What the facts name as the ``role`` in the module, at the end of a dotted path; None without it."""
        found: Any = self.module
        for name in str(self.facts.get(role)).split("."):
            found = getattr(found, name, None)
        return found

    def tokens(self, width: int, *, scale: float = 1.0) -> Tensor:
        """``[batch, tokens, width]``."""
        return random((*self.lead, width), self.dtype, self.generator, scale=scale)


def sampled_ops() -> tuple[str, ...]:
    """The names of the ops that have samples, in the order of their ranks."""
    return tuple(op.name for op in all_ops() if op.has("samples"))


def variants(op: str) -> tuple[Any, ...]:
    """The variants of an op that have samples, whether or not there is a kernel for them."""
    found: tuple[Any, ...] = find_op(op).module("samples").variants()
    return found


def cases(
    op: str, variant: Any, dtype: torch.dtype, device: torch.device, backend: str | None = None
) -> Iterator[Case]:
    """Calls of one variant, on random inputs that follow from ``torch.manual_seed``.

    Args:
        op: The name of the op.
        variant: One of :func:`variants`.
        dtype: Of the inputs and parameters.
        device: Where they are.
        backend: The name of what computes it (:mod:`twinkle.ops.backends`); the op's first by default.
    """
    record = find_op(op)
    yield from record.module("samples").cases(variant, dtype, device, backend or record.backends[0].name)


def implementation(op: str, backend: str) -> Any:
    """The module of an op with the kernels for a kind of device."""
    return find_op(op).backend(backend).load()


def seeded(device: torch.device) -> torch.Generator:
    """A generator on a device whose numbers follow from ``torch.manual_seed``."""
    return torch.Generator(device).manual_seed(torch.initial_seed() % 2**62)


def random(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, *, scale: float = 1.0
) -> Tensor:
    """Normal numbers on the device of the generator."""
    made = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return (made * scale).to(dtype)


def strided(tensor: Tensor) -> Tensor:
    """The same values, with a gap behind each row."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 16, dtype=tensor.dtype, device=tensor.device)
    view = wide[..., : tensor.shape[-1]]
    view.copy_(tensor)
    return view
