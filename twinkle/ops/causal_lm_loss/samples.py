"""Sample calls of the loss without logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from twinkle.ops.cases import Case, random, seeded
from twinkle.ops.causal_lm_loss.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from torch import Tensor

__all__ = ["SHAPES", "LossVariant", "cases", "kernel", "variants"]


@dataclass(frozen=True)
class LossVariant:
    """What lies between the head and the mean of the losses.

    Attributes:
        name: A short name.
        bias: The head has a bias.
        scale: Factor on the logits.
        softcap: Bound on the logits.
        label_smoothing: Share of the target that is spread over the vocabulary.
        reduction: Of the losses of the rows.
    """

    name: str
    bias: bool = False
    scale: float | None = None
    softcap: float | None = None
    label_smoothing: float = 0.0
    reduction: str = "mean"


# Rows, width of the hidden states, vocabulary.
SHAPES = {
    "plain": (96, 64, 512),
    "one row": (1, 32, 128),
    "ragged": (37, 40, 1009),
    "wide": (5, 128, 40000),
    "some ignored": (64, 64, 300),
}


def variants() -> tuple[LossVariant, ...]:
    """Each thing that may lie between, by itself."""
    return (
        LossVariant("plain"),
        LossVariant("bias", bias=True),
        LossVariant("scaled", scale=0.25),
        LossVariant("softcap", softcap=3.0),
        LossVariant("smoothed", label_smoothing=0.1),
        LossVariant("sum", reduction="sum"),
        LossVariant("each_row", reduction="none"),
    )


def _definition(variant: LossVariant) -> Callable[..., Any]:
    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        # In the dtype of the hidden states as a head gives them, then as a loss reads them.
        logits = F.linear(hidden, weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if variant.scale is not None:
            logits = logits * variant.scale
        if variant.softcap is not None:
            logits = variant.softcap * torch.tanh(logits / variant.softcap)
        return F.cross_entropy(
            logits, labels, reduction=variant.reduction, label_smoothing=variant.label_smoothing
        )

    return call


def kernel(variant: LossVariant) -> Callable[..., Any]:
    """The function that is compared with the definition of a variant."""

    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias=bias,
            scale=variant.scale,
            softcap=variant.softcap,
            reduction=variant.reduction,  # type: ignore[arg-type]
            label_smoothing=variant.label_smoothing,
        )

    return call


def cases(
    variant: LossVariant, dtype: torch.dtype, device: torch.device, backend: str = "triton_backend"
) -> Iterator[Case]:
    """A call of each shape; the last with labels that do not count."""
    generator = seeded(device)
    for shape, (rows, width, vocabulary) in SHAPES.items():
        hidden = random((rows, width), dtype, generator)
        weight = random((vocabulary, width), dtype, generator, scale=0.3)
        bias = random((vocabulary,), dtype, generator) if variant.bias else None
        labels = torch.randint(vocabulary, (rows,), generator=generator, device=device)
        if shape == "some ignored":
            labels[::3] = -100
        yield Case(shape, _definition(variant), kernel(variant), (hidden, weight, bias, labels))
