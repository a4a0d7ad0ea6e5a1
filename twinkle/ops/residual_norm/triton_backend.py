"""Residual add and norm by Triton, as one function with the signature of its definition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.ops.derivative import Derivative, define_op, through_definition
from twinkle.ops.launch import EAGER, REFERENCE, DispatchPath, dispatch_path, lazy_module
from twinkle.ops.layer_norm.reference import LayerNormVariant
from twinkle.ops.layout import like
from twinkle.ops.plans import Settled
from twinkle.ops.residual_norm import reference, triton_layer_norm
from twinkle.ops.residual_norm.reference import ResidualNormVariant
from twinkle.ops.rms_norm import triton_backend
from twinkle.ops.rms_norm.dtypes import result_dtype
from twinkle.ops.rms_norm.reference import VARIANTS, RMSNormVariant, rms_norm
from twinkle.ops.rms_norm.triton_backend import takes_weight_and_eps

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor

__all__ = ["LLAMA", "path_for", "residual_norm", "run", "supports"]

_kernels = lazy_module("twinkle.ops.residual_norm.triton")
_VARIANTS = {variant.name: variant for variant in VARIANTS}
LLAMA = ResidualNormVariant("rms_norm_llama", _VARIANTS["llama"])


def supports(
    variant: ResidualNormVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why there is no kernel for a variant, or None: there is one behind most norms that have one."""
    norm = variant.norm
    if isinstance(norm, LayerNormVariant):
        return triton_layer_norm.supports(norm, device)
    if isinstance(norm, RMSNormVariant) and norm.name in _VARIANTS and takes_weight_and_eps(norm):
        return triton_backend.supports(norm, device)
    return f"there is no kernel for {variant.name}"


def residual_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    variant: ResidualNormVariant = LLAMA,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``h = residual + x`` and ``norm(h)``; see ``reference.residual_norm`` for the arguments.

    The sum equals the definition's bit for bit, the norm as ``rms_norm`` says; the gradient of the sum is
    rounded once, where autograd rounds the norm's part before it adds.

    Returns:
        The sum and the normalised sum.
    """
    path = path_for(x, residual, weight, variant, bias)
    if path is not REFERENCE:
        return run(path, x, residual, weight, eps, variant, scale, bias)
    return reference.residual_norm(x, residual, weight, eps, variant=variant, bias=bias, scale=scale)


def path_for(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    variant: ResidualNormVariant,
    bias: Tensor | None = None,
) -> DispatchPath:
    """What computes with these tensors; see :func:`twinkle.ops.launch.dispatch_path`.

    Args:
        x: As for :func:`residual_norm`, with all that follows.
        residual: ``[..., hidden]``.
        weight: ``[hidden]`` or None.
        variant: Which norm.
        bias: ``[hidden]`` or None, of a layer norm.
    """
    if isinstance(variant.norm, LayerNormVariant):
        return triton_layer_norm.path_for(x, residual, weight, bias, variant.norm)
    return _path.call(x, residual, weight, variant)  # type: ignore[no-any-return]


def _path_for(
    x: Tensor, residual: Tensor, weight: Tensor | None, variant: ResidualNormVariant
) -> DispatchPath:
    """The same for an RMSNorm."""
    assert isinstance(variant.norm, RMSNormVariant)
    if x.dtype != residual.dtype or x.shape != residual.shape or supports(variant) is not None:
        return REFERENCE
    path = dispatch_path(x, residual, weight)
    if path is not REFERENCE and triton_backend.accepts(x, weight, variant.norm, None, x.shape[-1:]):
        return path
    return REFERENCE


_path = Settled(_path_for, "(Tensor x, Tensor residual, Tensor? weight, object variant) -> ")


def run(
    path: DispatchPath,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    variant: ResidualNormVariant,
    scale: float = 1.0,
    bias: Tensor | None = None,
    wanted: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """The kernel, for what :func:`path_for` found (and not for `REFERENCE`).

    Args:
        path: What :func:`path_for` found.
        x: As for :func:`residual_norm`, with all that follows.
        residual: ``[..., hidden]``.
        weight: ``[hidden]`` or None.
        eps: Of the norm.
        variant: Which norm.
        scale: Of a scaled variant.
        bias: Of a layer norm.
        wanted: Whether somebody wants the sum.

    Returns:
        The sum and the normalised sum; None for a sum that nobody wants and that was not written.
    """
    factor = scale if variant.scaled else None
    if isinstance(variant.norm, LayerNormVariant):
        return triton_layer_norm.run(path, x, residual, weight, bias, eps, variant.norm, factor, wanted)
    if variant.norm.weight == "none":
        weight = None
    if path is EAGER and not torch.is_grad_enabled():
        return _bare(x, residual, weight, eps, variant.norm.name, factor)  # type: ignore[no-any-return]
    if path is EAGER:
        return _eager(x, residual, weight, eps, variant.norm.name, factor)  # type: ignore[no-any-return]
    return _op(x, residual, weight, eps, variant.norm.name, factor)  # type: ignore[no-any-return]


def _forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, norm: str, scale: float | None
) -> tuple[Tensor, Tensor]:
    y, total = _kernels().forward(x, weight, eps, _VARIANTS[norm], residual, scale)
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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dx, dr, dw = _kernels().backward(dy, h, weight, eps, _VARIANTS[norm], dh, scale, weight_grad)
    return dx, None if dr is dx else dr, dw


def _keep(ctx: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(results[0], inputs[2])
    ctx.rest = inputs[3:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, function: Any, dh: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    h, weight = ctx.saved_tensors
    scale = ctx.rest[2]
    if dy is None:
        dx = dh if dh is None or scale is None else dh * scale
        return dx, dh, None, None, None, None
    wanted = weight is not None and ctx.needs_input_grad[2]
    dx, dr, dw = function(dh, dy, h, weight, *ctx.rest, wanted)
    return dx, dx if scale is None else dr, dw if wanted else None, None, None, None


def _again(ctx: Any, dh: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    eps, norm, scale = ctx.rest

    def definition(h: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
        y = rms_norm(
            h, w, eps, variant=_VARIANTS[norm], normalized_shape=h.shape[-1:], with_weight=w is not None
        )
        return h * 1, y

    dr, dw = through_definition(definition, ctx.saved_tensors, (dh, dy))
    return dr if dr is None or scale is None else dr * scale, dr, dw, None, None, None


def _fake_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, norm: str, scale: float | None
) -> tuple[Tensor, Tensor]:
    y = like(x, result_dtype(x, weight, _VARIANTS[norm]))[0]
    return torch.empty_like(y, dtype=x.dtype), y


def _fake_backward(
    dh: Tensor | None, dy: Tensor, h: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    _, _, scale, weight_grad = rest
    dx = like(h)[0]
    dw = torch.empty_like(weight) if weight is not None and weight_grad else None
    return dx, None if scale is None else torch.empty_like(dx), dw


_eager, _op, _bare = define_op(
    "_ResidualNorm",
    "residual_norm(Tensor x, Tensor residual, Tensor? weight, float eps, str norm, float? scale)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    Derivative(
        "residual_norm_backward(Tensor? dh, Tensor dy, Tensor h, Tensor? weight, float eps, "
        "str norm, float? scale, bool weight_grad) -> (Tensor, Tensor, Tensor)",
        _backward,
        _fake_backward,
        keep=_keep,
        gradients=_gradients,
        again=_again,
    ),
)
