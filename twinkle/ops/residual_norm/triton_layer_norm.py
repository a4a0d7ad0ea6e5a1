"""Residual add and LayerNorm by Triton: the kernels of ``twinkle.ops.layer_norm`` with an addend.

Bytes a row of ``n`` elements: forward reads two and writes two (one where nothing is to be differentiated and
nobody wants the sum), backward reads two, or three where something reaches the sum directly, and writes one.
The gradient of both addends is one tensor (two, with a scale).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.ops.derivative import Derivative, define_op, through_definition
from twinkle.ops.launch import EAGER, REFERENCE, DispatchPath, dispatch_path, lazy_module
from twinkle.ops.layer_norm.reference import VARIANTS
from twinkle.ops.layer_norm.triton_backend import LEAST, accepts, across, exactly, takes_weight_and_eps
from twinkle.ops.layer_norm.triton_backend import supports as supports_norm
from twinkle.ops.plain import pays
from twinkle.ops.plans import Planned, Settled

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from twinkle.ops.layer_norm.reference import LayerNormVariant

__all__ = ["LEAST", "path_for", "run", "supports"]

_kernels = lazy_module("twinkle.ops.layer_norm.triton")
_NAMES = frozenset(variant.name for variant in VARIANTS)


def supports(norm: LayerNormVariant, device: str | None = None) -> str | None:
    """Why there is no kernel for a sum and that norm, or None."""
    if norm.name not in _NAMES:
        return f"{norm.name} is no variant of its definition"
    if not takes_weight_and_eps(norm):
        return f"there is no kernel for {norm.name} behind other steps"
    return supports_norm(norm, device)


def path_for(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, norm: LayerNormVariant
) -> DispatchPath:
    """What computes with these tensors; see :func:`twinkle.ops.launch.dispatch_path`.

    Contiguous addends, or a residual that is channels first, whose layout the sum has as torch's: the layout
    of other sums is torch's to choose. The dtypes of the two may differ, as they do under autocast, where a
    sublayer gives half precision and the norm before it gave float32.

    Args:
        x: ``[..., hidden]``, what a sublayer returned.
        residual: As ``x``.
        weight: ``[hidden]`` or None.
        bias: ``[hidden]`` or None.
        norm: Which norm.
    """
    if x.shape != residual.shape or not pays(x, LEAST):
        return REFERENCE
    if norm.affine != "both":
        bias = None
        weight = None if norm.affine == "none" else weight
    return _path.call(x, residual, weight, bias, norm)  # type: ignore[no-any-return]


def _path_for(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, norm: LayerNormVariant
) -> DispatchPath:
    """The same for what the norm applies, whatever the size."""
    path = dispatch_path(x, residual, weight, bias)
    dtype = x.dtype if x.dtype is residual.dtype else torch.promote_types(x.dtype, residual.dtype)
    if path is REFERENCE or not accepts(x, weight, bias, norm, x.shape[-1:], dtype):
        return REFERENCE
    if not x.is_contiguous():
        return REFERENCE
    return path if residual.is_contiguous() or across(residual) is not None else REFERENCE


_path = Settled(_path_for, "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, object norm) -> ")


def run(
    path: DispatchPath,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: LayerNormVariant,
    scale: float | None,
    wanted: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """The kernel, for what :func:`path_for` found (and not for `REFERENCE`).

    Args:
        path: What :func:`path_for` found.
        x: As for :func:`path_for`, with all that follows.
        residual: As ``x``.
        weight: ``[hidden]`` or None.
        bias: ``[hidden]`` or None.
        eps: Added to the variance.
        norm: Which norm.
        scale: On ``x``, or None.
        wanted: Whether somebody wants the sum.

    Returns:
        The sum and the normalised sum; None for a sum that was not written.
    """
    if norm.affine != "both":
        bias = None
        weight = None if norm.affine == "none" else weight
    if path is EAGER and not torch.is_grad_enabled():
        return _inference.call(x, residual, weight, bias, eps, scale, wanted)  # type: ignore[no-any-return]
    function = _eager if path is EAGER else _op
    h, y, _ = function(x, residual, weight, bias, eps, scale)
    return h, y


def _empty_sum(x: Tensor, residual: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    if residual.is_contiguous():
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    return torch.empty_like(residual, dtype=dtype)


def _forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    total = _empty_sum(x, residual)
    y, stats = _kernels().forward(x, weight, bias, eps, residual=residual, scale=scale, total=total)
    return total, y, stats


def _fake_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    total = _empty_sum(x, residual)
    y = torch.empty(x.shape, dtype=total.dtype, device=x.device)
    return total, y, x.new_empty((2, rows), dtype=torch.float32)


def _backward(
    dh: Tensor | None,
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    of_x: torch.dtype,
    of_residual: torch.dtype,
    scale: float | None,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    dx_wanted, dw_wanted, db_wanted = wanted
    split = dx_wanted and (scale is not None or of_x != of_residual)
    dr = torch.empty(h.shape, dtype=of_residual, device=h.device) if split else None
    dx, dw, db = _kernels().backward(
        dy,
        h,
        weight,
        bias,
        stats,
        input_grad=dx_wanted,
        weight_grad=dw_wanted,
        bias_grad=db_wanted,
        dh=dh if dx_wanted else None,
        scale=scale,
        dx_dtype=of_x,
        dr=dr,
    )
    return dx, dr, dw, db


def _fake_backward(
    dh: Tensor | None,
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    of_x: torch.dtype,
    of_residual: torch.dtype,
    scale: float | None,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    split = wanted[0] and (scale is not None or of_x != of_residual)
    given = (
        (h, wanted[0], of_x),
        (h, split, of_residual),
        (weight, wanted[1], None),
        (bias, wanted[2], None),
    )
    return tuple(
        p.new_empty(p.shape, dtype=dtype or p.dtype) if p is not None and is_wanted else None
        for p, is_wanted, dtype in given
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor, Tensor]) -> None:
    h, _, stats = results
    x, residual, weight, bias, eps, scale = inputs
    ctx.save_for_backward(h, weight, bias, stats)
    ctx.rest = eps, scale, (x.dtype, residual.dtype)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, function: Any, dh: Tensor | None, dy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    h, weight, bias, stats = ctx.saved_tensors
    _, scale, dtypes = ctx.rest
    if dy is None:
        return *_of_addends(dh, scale, dtypes), None, None, None, None
    x, residual, w, b, _, _ = ctx.needs_input_grad
    wanted = [x or residual, weight is not None and w, bias is not None and b]
    dx, dr, dw, db = function(dh, dy, h, weight, bias, stats, *dtypes, scale, wanted)
    if not wanted[0]:
        dx = dr = None
    elif scale is None and dtypes[0] == dtypes[1]:
        dr = dx
    return dx, dr, dw if wanted[1] else None, db if wanted[2] else None, None, None


def _again(ctx: Any, dh: Tensor | None, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    eps, scale, dtypes = ctx.rest

    def definition(h: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
        return h * 1, exactly(h, w, b, eps)

    dr, dw, db = through_definition(definition, ctx.saved_tensors[:3], (dh, dy))
    return *_of_addends(dr, scale, dtypes), dw, db, None, None


def _of_addends(
    dh: Tensor | None, scale: float | None, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the addend and the residual, of that of their sum."""
    if dh is None:
        return None, None
    return (dh if scale is None else dh * scale).to(dtypes[0]), dh.to(dtypes[1])


def _without_stats(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float | None,
    wanted: bool,
) -> tuple[Tensor | None, Tensor]:
    total = _empty_sum(x, residual) if wanted else None
    y, _ = _kernels().forward(x, weight, bias, eps, stats=False, residual=residual, scale=scale, total=total)
    return total, y


_INPUTS = "Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float? scale"
_inference = Planned(_without_stats, f"({_INPUTS}, bool wanted) -> (Tensor, Tensor)")
_eager, _op, _ = define_op(
    "_ResidualLayerNorm",
    f"residual_layer_norm({_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    Derivative(
        "residual_layer_norm_backward(Tensor? dh, Tensor dy, Tensor h, Tensor? weight, Tensor? bias, "
        "Tensor stats, ScalarType of_x, ScalarType of_residual, float? scale, bool[] wanted)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _backward,
        _fake_backward,
        keep=_keep,
        gradients=_gradients,
        again=_again,
    ),
)
