"""Cross entropy of ``hidden @ weight.T`` without the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from twinkle.ops.causal_lm_loss.op import loss_of_all_rows, loss_of_each_row

if TYPE_CHECKING:
    from typing import Literal

    from torch import Tensor

__all__ = ["as_autocast", "linear_cross_entropy", "of_rows"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items_in_batch: Tensor | int | None = None,
    label_smoothing: float = 0.0,
    shift: bool = False,
    most_rows: int | None = None,
) -> Tensor:
    """The loss of a head and a cross entropy, computed in chunks of rows.

    Equal to ``F.cross_entropy(z.float(), labels)`` with ``z = scale * (hidden @ weight.T + bias)`` and,
    with a softcap, ``softcap * tanh(z / softcap)`` in the place of ``z``. Logits are rounded to the dtype
    of ``hidden``, everything behind them is float32, as is the sum of the weight's gradient. The memory
    it takes is that of one chunk's logits and of the gradients. No second derivative.

    Args:
        hidden: ``[..., hidden]``.
        weight: ``[vocab, hidden]``.
        labels: ``[...]``, whole numbers; moved to the device of ``hidden``.
        bias: ``[vocab]`` or None.
        scale: Factor on the logits.
        softcap: Bound on the logits.
        ignore_index: Labels of this value do not count.
        reduction: ``"none"`` gives ``[...]`` and computes the logits again in backward.
        num_items_in_batch: Divide the sum by this, whatever ``reduction`` says.
        label_smoothing: Between 0 and 1.
        shift: The loss at a position is about the label of the next one.
        most_rows: At most so many labels count. Where that is less than 95 % of them the other rows are
            left out of the products, on a CPU without being told; a loss where more count is NaN.

    Returns:
        The loss in float32 (float64 for float64): ``[]``, or ``[...]`` for ``"none"``.

    Raises:
        ValueError: Shapes do not go together, or ``reduction`` is another.
        RuntimeError: dtypes differ outside autocast; or a second derivative is asked for.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: expected "mean", "sum" or "none", found {reduction!r}')
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels: expected {tuple(hidden.shape[:-1])} as hidden has, found {tuple(labels.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: expected [vocab, {hidden.shape[-1]}], found {tuple(weight.shape)}")
    labels = labels.to(hidden.device)
    if shift:
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    pre, post, tanh = 1.0 if scale is None else float(scale), 1.0, False
    if softcap is not None:
        pre, post, tanh = pre / softcap, float(softcap), True
    loss = of_rows(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1),
        pre=pre,
        post=post,
        tanh=tanh,
        ignore_index=ignore_index,
        reduction="sum" if num_items_in_batch is not None else reduction,
        divisor=num_items_in_batch,
        label_smoothing=label_smoothing,
        most_rows=most_rows,
    )
    return loss.view(labels.shape) if loss.dim() else loss


def of_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    pre: float,
    post: float,
    tanh: bool,
    ignore_index: int,
    reduction: str,
    divisor: Tensor | int | None = None,
    label_smoothing: float = 0.0,
    most_rows: int | None = None,
) -> Tensor:
    """As :func:`linear_cross_entropy`, for ``[rows, hidden]`` and ``post * tanh(pre * logits)``."""
    hidden, weight, bias = as_autocast(hidden, weight, bias)
    if reduction == "none":
        return loss_of_each_row(hidden, weight, bias, labels, pre, post, tanh, ignore_index, label_smoothing)
    if divisor is not None and not isinstance(divisor, torch.Tensor):
        divisor = torch.full((), divisor, dtype=torch.float32, device=hidden.device)
    elif divisor is not None:
        divisor = divisor.detach().to(hidden.device).reshape(())
    elif reduction == "sum":
        divisor = torch.ones((), dtype=torch.float32, device=hidden.device)
    grad = torch.is_grad_enabled()
    loss: Tensor = loss_of_all_rows(
        hidden,
        weight,
        bias,
        labels,
        divisor,
        most_rows,
        pre,
        post,
        tanh,
        ignore_index,
        label_smoothing,
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )[0]
    return loss


def as_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What ``F.linear`` would make of its arguments under autocast."""
    if not torch.is_autocast_enabled(hidden.device.type) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
