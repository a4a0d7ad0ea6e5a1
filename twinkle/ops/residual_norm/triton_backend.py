"""Residual add and norm by Triton, as one function with the signature of its definition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.ops.launch import DEFINITION, STRAIGHT, apply_of, define, like, route, through_definition
from twinkle.ops.residual_norm import reference
from twinkle.ops.residual_norm.reference import ResidualNormForm
from twinkle.ops.rms_norm import triton_backend
from twinkle.ops.rms_norm.reference import FORMS, RMSNormForm, rms_norm

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor

__all__ = ["residual_norm", "run", "supports", "way_for"]

_FORMS = {form.name: form for form in FORMS}
_LLAMA = ResidualNormForm("rms_norm_llama", _FORMS["llama"])


def supports(
    form: ResidualNormForm, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why there is no kernel for a form, or None: there is one behind every RMSNorm that has one."""
    if isinstance(form.norm, RMSNormForm) and form.norm.name in _FORMS:
        return triton_backend.supports(form.norm, device)
    return f"there is no kernel for {form.name}"


def residual_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    form: ResidualNormForm = _LLAMA,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``h = residual + x`` and ``norm(h)``; see ``reference.residual_norm``.

    The sum equals the definition's bit for bit, the norm as ``rms_norm`` says; the gradient of the sum is
    rounded once, where autograd rounds the norm's part before it adds.

    Args:
        x: ``[..., hidden]``, what a sublayer returned.
        residual: ``[..., hidden]``.
        weight: ``[hidden]`` or None, of the norm.
        eps: Of the norm.
        form: Which norm.
        bias: ``[hidden]`` or None, of a layer norm (the definition runs).
        scale: Of a scaled form.

    Returns:
        The sum and the normalised sum.
    """
    way = way_for(x, residual, weight, form)
    if way != DEFINITION:
        return run(way, x, residual, weight, eps, form, scale)
    return reference.residual_norm(x, residual, weight, eps, form=form, bias=bias, scale=scale)


def way_for(x: Tensor, residual: Tensor, weight: Tensor | None, form: ResidualNormForm) -> int:
    """How to compute with these tensors; see :func:`twinkle.ops.launch.route`.

    Args:
        x: As for :func:`residual_norm`, with all that follows.
        residual: ``[..., hidden]``.
        weight: ``[hidden]`` or None.
        form: Which norm.
    """
    if x.dtype != residual.dtype or x.shape != residual.shape or supports(form) is not None:
        return DEFINITION
    way = route(x, residual, weight)
    if way != DEFINITION and triton_backend.accepts(x, weight, form.norm, None, x.shape[-1:]):  # type: ignore[arg-type]
        return way
    return DEFINITION


def run(
    way: int,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    form: ResidualNormForm,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The kernel, for what :func:`way_for` found (and not for `DEFINITION`)."""
    if form.norm.weight == "none":  # type: ignore[union-attr]
        weight = None
    factor = scale if form.scaled else None
    if way == STRAIGHT and not torch.is_grad_enabled():
        return _forward(x, residual, weight, eps, form.norm.name, factor)
    if way == STRAIGHT:
        return _straight(x, residual, weight, eps, form.norm.name, factor)  # type: ignore[no-any-return]
    return _op(x, residual, weight, eps, form.norm.name, factor)  # type: ignore[no-any-return]


def _forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, norm: str, scale: float | None
) -> tuple[Tensor, Tensor]:
    from twinkle.ops.residual_norm import triton as kernels

    y, total = kernels.forward(x, weight, eps, _FORMS[norm], residual, scale)
    assert total is not None
    return total, y


def _backward(
    dh: Tensor | None,
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    eps: float,
    norm: str,
    scale: float | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from twinkle.ops.residual_norm import triton as kernels

    dx, dr, dw = kernels.backward(dy, h, weight, eps, _FORMS[norm], dh, scale, weight_grad)
    return dx, h.new_empty(0) if dr is dx else dr, h.new_empty(0) if dw is None else dw


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        eps: float,
        norm: str,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        h, y = _forward(x, residual, weight, eps, norm, scale)
        ctx.save_for_backward(h, weight)
        ctx.rest = (eps, norm, scale)
        ctx.set_materialize_grads(False)
        return h, y

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            eps, norm, scale = ctx.rest
            form = _FORMS[norm]
            through = through_definition(
                lambda h, w: (
                    h * 1,
                    rms_norm(h, w, eps, form=form, normalized_shape=h.shape[-1:], with_weight=w is not None),
                ),
                (h, weight),
                (dh, dy),
            )
            dr = through[0]
            return dr if dr is None or scale is None else dr * scale, dr, through[1], None, None, None
        return _gradients(_backward, dh, dy, h, weight, ctx)


def _gradients(
    function: Any, dh: Tensor | None, dy: Tensor | None, h: Tensor, weight: Tensor | None, ctx: Any
) -> tuple[Tensor | None, ...]:
    scale = ctx.rest[2]
    if dy is None:
        dx = dh if dh is None or scale is None else dh * scale
        return dx, dh, None, None, None, None
    wanted = weight is not None and ctx.needs_input_grad[2]
    dx, dr, dw = function(dh, dy, h, weight, *ctx.rest, wanted)
    return dx, dx if scale is None else dr, dw if wanted else None, None, None, None


_straight = apply_of(_ResidualNorm)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, *ctx.rest = inputs
    ctx.save_for_backward(output[0], weight)


def _derivative(ctx: Any, dh: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
    h, weight = ctx.saved_tensors
    return _gradients(_backward_op, dh, dy, h, weight, ctx)


def _fake_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, norm: str, scale: float | None
) -> tuple[Tensor, Tensor]:
    y = like(x, triton_backend.result_dtype(x, weight, _FORMS[norm]))[0]
    return torch.empty_like(y, dtype=x.dtype), y


def _fake_backward(
    dh: Tensor | None,
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    eps: float,
    norm: str,
    scale: float | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = like(h)[0]
    dw = torch.empty_like(weight) if weight is not None and weight_grad else h.new_empty(0)
    return dx, h.new_empty(0) if scale is None else torch.empty_like(dx), dw


_backward_op = define(
    "residual_norm_backward(Tensor? dh, Tensor dy, Tensor h, Tensor? weight, float eps, str norm, "
    "float? scale, bool weight_grad) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_op = define(
    "residual_norm(Tensor x, Tensor residual, Tensor? weight, float eps, str norm, float? scale)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup=_setup,
    backward=_derivative,
)
