"""The loss as operators of torch: seen by compilers, with shapes and gradients of their own.

The gradients are computed along with the loss, as its logits are at hand only once; what autograd
does later is to multiply them by the gradient of the loss. Losses of single rows (``reduction="none"``)
get a gradient each that only backward knows, so their logits are computed again there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.ops.causal_lm_loss.chunks import Wanted, in_chunks, uses_triton
from twinkle.ops.causal_lm_loss.row_loss import RowLoss
from twinkle.ops.cuda_graphs import is_recorded_once

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from torch import Tensor

__all__ = ["gradients_of_each_row", "loss_of_all_rows", "loss_of_each_row", "scaled_gradients"]

_ROW_LOSS = "float pre, float post, bool tanh, int ignore_index, float label_smoothing"
_WANTED = "bool want_hidden, bool want_weight, bool want_bias"


@torch.library.custom_op(
    "twinkle::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? divisor, SymInt? most_rows, "
    f"{_ROW_LOSS}, {_WANTED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def loss_of_all_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    divisor: Tensor | None,
    most_rows: int | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``sum of losses / divisor``, its gradients, and what is left to multiply the gradients by.

    Args:
        hidden: ``[rows, hidden]``.
        weight: ``[vocab, hidden]``.
        bias: ``[vocab]`` or None.
        labels: ``[rows]``, shifted already.
        divisor: ``[]``, None for the number of labels that count.
        most_rows: No more labels than these count: the rows that do not are left out of the products.
            Where more do, the loss is no number.
        rest: The five numbers of a :class:`RowLoss`, then which gradients are :class:`Wanted`; those that
            are not come out empty.
    """
    row_loss, wanted = RowLoss(*rest[:5]), Wanted(*rest[5:])
    with torch.no_grad(), _no_autocast(hidden):
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        counts = labels != row_loss.ignore_index
        number = counts.sum()
        inverse = (number if divisor is None else divisor).to(precise).reciprocal()
        # The logits' gradient would vanish in float16 (a loss scaler comes after it): scaled last there.
        late = hidden.dtype == torch.float16
        # Leaving rows out costs copies of the others. How many count is known on a CPU; on a GPU asking
        # would wait for all work before it.
        most = most_rows if labels.is_cuda else int(number)
        if most is None or most >= 0.95 * labels.numel():
            rows = None
        elif labels.is_cuda:
            rows = torch.argsort(counts, descending=True, stable=True)[:most]
        else:
            rows = counts.nonzero().squeeze(1)
        few = hidden.contiguous() if rows is None else hidden.index_select(0, rows)
        losses, grad_hidden, grad_weight, grad_bias = in_chunks(
            few,
            weight.contiguous(),
            bias,
            (labels if rows is None else labels.index_select(0, rows)).contiguous(),
            None if late else inverse,
            row_loss,
            wanted,
        )
        if rows is not None and grad_hidden is not None:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, rows, grad_hidden)
        loss = losses.sum() * inverse
        if divisor is None:
            loss = loss.where(number > 0, torch.nan)
        if rows is not None and most_rows is not None:
            loss = loss.where(number <= most_rows, torch.nan)
        return (
            loss,
            inverse.clone() if late else torch.ones_like(inverse),
            grad_hidden if grad_hidden is not None else hidden.new_empty(0),
            grad_weight if grad_weight is not None else hidden.new_empty(0),
            grad_bias if grad_bias is not None else hidden.new_empty(0),
        )


@loss_of_all_rows.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    divisor: Tensor | None,
    most_rows: int | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty((), dtype=precise),
        hidden.new_empty((), dtype=precise),
        *_empty_gradients(hidden, weight, bias, Wanted(*rest[5:])),
    )


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if wanted.hidden else 0),
        weight.new_empty(weight.shape if wanted.weight else 0),
        (hidden if bias is None else bias).new_empty(weight.shape[0] if wanted.bias else 0),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.wanted = inputs[-3:]
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 14
    rest, *gradients = ctx.saved_tensors
    # The gradients are constants here: a second derivative would silently miss what they depend on.
    refuse = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    scaled = scaled_gradients(ctx.wanted, gradients, grad * rest)
    return (*(_once(scaled) if refuse else scaled), *(None,) * 11)


@torch.no_grad()
def scaled_gradients(
    wanted: Sequence[bool], gradients: Sequence[Tensor], factor: Tensor
) -> list[Tensor | None]:
    """Gradients that were computed along with a loss, times a factor; in a backward.

    Args:
        wanted: Which of them there are.
        gradients: Changed in place, unless the graph is kept for another backward.
        factor: ``[]``.
    """
    return [_scaled(g, factor) if want else None for want, g in zip(wanted, gradients, strict=True)]


def _once(gradients: list[Tensor | None]) -> list[Tensor | None]:
    present = [gradient.detach().requires_grad_() for gradient in gradients if gradient is not None]
    text = b"linear_cross_entropy has no second derivative: its gradients come from the forward"
    guarded = torch._C._functions.DelayedError(text, len(present))(*present)
    rest = iter(guarded if isinstance(guarded, tuple) else (guarded,))
    return [None if gradient is None else next(rest) for gradient in gradients]


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    if _is_last_use(gradient, factor):
        if gradient.is_cuda and uses_triton(gradient):
            from twinkle.ops.causal_lm_loss.triton import scale_

            return scale_(gradient, factor)
        if gradient.is_cpu and gradient.dtype != torch.float16:
            return gradient if factor == 1 else gradient.mul_(factor)
    if gradient.dtype == torch.float16:
        return (gradient * factor.to(torch.float32)).to(gradient.dtype)
    return gradient * factor.to(gradient.dtype)


def _is_last_use(gradient: Tensor, factor: Tensor) -> bool:
    """Whether a gradient may be changed: nobody else has it, and no other backward will want it."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_legacy_batchedtensor(factor):
        return False
    if type(gradient) is not torch.Tensor:
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph() or is_recorded_once()


loss_of_all_rows.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@torch.library.custom_op(
    "twinkle::linear_cross_entropy_rows",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, {_ROW_LOSS}) -> Tensor",
)
def loss_of_each_row(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *row_loss: Any,
) -> Tensor:
    """Losses ``[rows]``; the arguments are those of :func:`loss_of_all_rows`."""
    with torch.no_grad(), _no_autocast(hidden):
        return in_chunks(
            hidden.contiguous(),
            weight.contiguous(),
            bias,
            labels.contiguous(),
            None,
            RowLoss(*row_loss),
            Wanted(),
        )[0]


@loss_of_each_row.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *row_loss: Any,
) -> Tensor:
    precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(hidden.shape[0], dtype=precise)


@torch.library.custom_op(
    "twinkle::linear_cross_entropy_rows_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    f"{_ROW_LOSS}, {_WANTED}) -> (Tensor, Tensor, Tensor)",
)
def gradients_of_each_row(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias of ``sum(grad * losses)``; as :func:`loss_of_all_rows`."""
    with torch.no_grad(), _no_autocast(hidden):
        gradients = in_chunks(
            hidden.contiguous(),
            weight.contiguous(),
            bias,
            labels.contiguous(),
            grad.contiguous(),
            RowLoss(*rest[:5]),
            Wanted(*rest[5:]),
        )[1:]
    first, second, third = (g if g is not None else hidden.new_empty(0) for g in gradients)
    return first, second, third


@gradients_of_each_row.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(hidden, weight, bias, Wanted(*rest[5:]))


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.row_loss = inputs[4:]


def _backward_of_rows(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    hidden, weight, bias, labels = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    gradients = gradients_of_each_row(grad, hidden, weight, bias, labels, *ctx.row_loss, *wanted)
    given = [gradient if want else None for want, gradient in zip(wanted, gradients, strict=True)]
    return (*given, *(None,) * 6)


loss_of_each_row.register_autograd(_backward_of_rows, setup_context=_keep_rows)


def _no_autocast(tensor: Tensor) -> Any:
    return torch.autocast(tensor.device.type, enabled=False)
