"""The loss of a language model: ``cross_entropy(transform(hidden @ weight.T + bias), labels)``.

What lies between the head and the loss differs: a scale, a tanh softcap, a cast, a bias. So does the loss:

- ``causal``, of transformers: logits in float32, labels shifted by one, mean over the labels that count;
- ``masked``, of transformers: the same without the shift;
- ``cross_entropy``: torch's, called by the forward itself, of logits as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from typing import Literal

    from torch import Tensor

__all__ = ["CausalLMLossVariant", "causal_lm_loss"]


@dataclass(frozen=True)
class CausalLMLossVariant:
    """What lies between the hidden states and the loss.

    Attributes:
        name: A short name.
        steps: In order: ``multiply`` and ``divide`` by a number, ``softcap`` (divide, tanh, multiply),
            ``float32`` (a cast), ``bias`` (plus a tensor as wide as the vocabulary), ``columns`` (the first
            of them). With ``optional_`` in front, only where the number is not None;
            ``optional_softcap_float32`` casts to float32 where it caps.
        hidden_cast: The hidden states are cast to the dtype of the head's weight first.
        labels: ``labels`` are shifted by the loss, ``shift_labels`` are already, or ``both`` may be given.
        sliced: The caller may ask for the logits of the last tokens only.
        loss: ``causal``, ``masked`` or ``cross_entropy``.
        rows: Whose loss ``cross_entropy`` is: of all rows, of all but the last with the ``next`` labels, or
            of rows that the forward has ``picked``, which are then the rows of the definition.
    """

    name: str
    steps: tuple[str, ...] = ()
    hidden_cast: bool = False
    labels: Literal["labels", "shift_labels", "both"] = "labels"
    sliced: bool = True
    loss: Literal["causal", "masked", "cross_entropy"] = "causal"
    rows: Literal["all", "next", "picked"] = "all"


def causal_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    variant: CausalLMLossVariant,
    factors: tuple[float | Tensor | None, ...] = (),
    ignore_index: int = -100,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The definition.

    Args:
        hidden: ``[batch, tokens, hidden]``.
        weight: ``[vocab, hidden]``.
        bias: ``[vocab]`` or None.
        labels: ``[batch, tokens]``.
        variant: What lies between.
        factors: One number a step of the variant, None for a cast or a softcap that is off, a tensor for a
            bias.
        ignore_index: Labels of this value do not count.
        num_items_in_batch: Divide the sum by this instead of the number of labels that count.
        shift_labels: Labels that are shifted already, instead of ``labels``.
        reduction: Of ``cross_entropy``.
        label_smoothing: Of ``cross_entropy``.

    Returns:
        The loss, a scalar, and the logits ``[batch, tokens, vocab]``.
    """
    if variant.hidden_cast:
        hidden = hidden.to(weight.dtype)
    logits = F.linear(hidden, weight, bias)
    for step, factor in zip(variant.steps, factors, strict=True):
        if step == "float32":
            logits = logits.float()
        elif factor is None:
            continue
        elif step == "bias":
            logits = logits + factor
        elif step == "columns":
            logits = logits[..., : int(factor)]
        elif step.endswith("multiply"):
            logits = logits * factor
        elif step.endswith("divide"):
            logits = logits / factor
        elif step == "optional_softcap_float32":
            logits = torch.tanh(logits.float() / factor) * factor
        else:
            logits = torch.tanh(logits / factor) * factor
    if variant.loss == "cross_entropy":
        rows = logits[..., :-1, :] if variant.rows == "next" else logits
        labels = labels[..., 1:] if variant.rows == "next" else labels
        loss = F.cross_entropy(
            rows.reshape(-1, rows.shape[-1]),
            labels.reshape(-1),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        return loss, logits
    rows = logits.float()
    if variant.loss == "masked":
        shift_labels = labels
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
    rows = rows.view(-1, rows.shape[-1])
    targets = shift_labels.view(-1).to(rows.device)
    reduction = "sum" if num_items_in_batch is not None else "mean"
    loss = F.cross_entropy(rows, targets, ignore_index=ignore_index, reduction=reduction)
    if num_items_in_batch is not None:
        loss = loss / num_items_in_batch
    return loss, logits
