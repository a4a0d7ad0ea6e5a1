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

__all__ = ["LossForm", "cases", "forms"]


@dataclass(frozen=True)
class LossForm:
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
_SHAPES = {
    "plain": (96, 64, 512),
    "one row": (1, 32, 128),
    "ragged": (37, 40, 1009),
    "wide": (5, 128, 40000),
    "some ignored": (64, 64, 300),
}


def forms() -> tuple[LossForm, ...]:
    """Each thing that may lie between, by itself."""
    return (
        LossForm("plain"),
        LossForm("bias", bias=True),
        LossForm("scaled", scale=0.25),
        LossForm("softcap", softcap=3.0),
        LossForm("smoothed", label_smoothing=0.1),
        LossForm("sum", reduction="sum"),
        LossForm("each_row", reduction="none"),
    )


def _definition(form: LossForm) -> Callable[..., Any]:
    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        # In the dtype of the hidden states as a head gives them, then as a loss reads them.
        logits = F.linear(hidden, weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if form.scale is not None:
            logits = logits * form.scale
        if form.softcap is not None:
            logits = form.softcap * torch.tanh(logits / form.softcap)
        return F.cross_entropy(logits, labels, reduction=form.reduction, label_smoothing=form.label_smoothing)

    return call


def _kernel(form: LossForm) -> Callable[..., Any]:
    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias=bias,
            scale=form.scale,
            softcap=form.softcap,
            reduction=form.reduction,  # type: ignore[arg-type]
            label_smoothing=form.label_smoothing,
        )

    return call


def cases(
    form: LossForm, dtype: torch.dtype, device: torch.device, backend: str = "triton_backend"
) -> Iterator[Case]:
    """A call of each shape; the last with labels that do not count."""
    generator = seeded(device)
    for shape, (rows, width, vocabulary) in _SHAPES.items():
        hidden = random((rows, width), dtype, generator)
        weight = random((vocabulary, width), dtype, generator, scale=0.3)
        bias = random((vocabulary,), dtype, generator) if form.bias else None
        labels = torch.randint(vocabulary, (rows,), generator=generator, device=device)
        if shape == "some ignored":
            labels[::3] = -100
        yield Case(shape, _definition(form), _kernel(form), (hidden, weight, bias, labels))
