"""Adaptive norms by Triton, as one function with the signature of its definition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.ops.derivative import Derivative, define_op, through_definition
from twinkle.ops.launch import EAGER, REFERENCE, DispatchPath, dispatch_path, lazy_module
from twinkle.ops.layer_norm import triton_backend as layer_norm
from twinkle.ops.layer_norm.reference import VARIANTS as LAYER_NORMS
from twinkle.ops.layer_norm.reference import LayerNormVariant
from twinkle.ops.modulated_norm import reference
from twinkle.ops.modulated_norm.dtypes import dtypes_of
from twinkle.ops.modulated_norm.reference import ModulatedNormVariant
from twinkle.ops.plain import pays
from twinkle.ops.plans import Planned, Settled
from twinkle.ops.rms_norm import triton_backend as rms_norm
from twinkle.ops.rms_norm.reference import VARIANTS as RMS_NORMS
from twinkle.ops.rms_norm.reference import RMSNormVariant

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor

__all__ = ["least_for", "modulated_norm", "path_for", "run", "supports", "variant_of"]

_kernels = lazy_module("twinkle.ops.modulated_norm.triton")
LEAST = 1 << 23
"""Elements of the input below which torch's kernels run where one of them is the norm, as for a LayerNorm."""
WIDEST = 8192
_NORMS: dict[str, RMSNormVariant | LayerNormVariant] = {
    **{f"rms_norm_{variant.name}": variant for variant in RMS_NORMS},
    **{f"layer_norm_{variant.name}": variant for variant in LAYER_NORMS},
}


def variant_of(
    norm: RMSNormVariant | LayerNormVariant, *, upcast: bool = False, widened: bool = False
) -> ModulatedNormVariant:
    """The variant of a norm that is modulated.

    Args:
        norm: The variant of the norm.
        upcast: It is given its input in float32.
        widened: Its result is cast to float32; after ``upcast`` that is nothing new for a LayerNorm.
    """
    op = "layer_norm" if isinstance(norm, LayerNormVariant) else "rms_norm"
    name = f"{op}_{norm.name}{'_upcast' * upcast}{'_widened' * widened}"
    return ModulatedNormVariant(name, norm, upcast, widened)


_VARIANTS = {
    variant.name: variant
    for norm in _NORMS.values()
    for upcast in (False, True)
    for widened in (False, True)
    for variant in (variant_of(norm, upcast=upcast, widened=widened),)
}


def supports(
    variant: ModulatedNormVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why there is no kernel for a variant, or None: there is one for most norms that have one."""
    norm = variant.norm
    if _VARIANTS.get(variant.name) != variant:
        return f"{variant.name} is no variant of its definition"
    if isinstance(norm, LayerNormVariant):
        taken = layer_norm.takes_weight_and_eps(norm)
        reason = layer_norm.supports(norm, device)
    else:
        taken = rms_norm.takes_weight_and_eps(norm, nullable=True)
        reason = rms_norm.supports(norm, device)
    return reason if taken else f"there is no kernel for {norm.name} behind other steps"


def least_for(norm: RMSNormVariant | LayerNormVariant) -> int:
    """The elements of the input from which the kernel runs: all, for an RMSNorm that is written out.

    That is five kernels of torch, or one of ours, before there is a scale.
    """
    written = isinstance(norm, RMSNormVariant) and norm.compute not in ("fused", "fused_float32")
    return 0 if written else LEAST


def modulated_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor | None,
    *,
    variant: ModulatedNormVariant,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``norm(x) · (1 + scale) + shift``; see ``reference.modulated_norm`` for the arguments.

    The result is rounded where the definition rounds it; gradients are computed in float32 and rounded once.
    """
    path = path_for(x, weight, bias, scale, shift, variant)
    if path is not REFERENCE:
        return run(path, x, weight, bias, eps, scale, shift, variant, dtype)
    return reference.modulated_norm(x, weight, eps, scale, shift, variant=variant, bias=bias, dtype=dtype)


def path_for(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    variant: ModulatedNormVariant,
) -> DispatchPath:
    """What computes with these tensors; see :func:`twinkle.ops.launch.dispatch_path`.

    Args:
        x: ``[..., hidden]``, contiguous for an RMSNorm: the layout of its result is torch's to choose.
        weight: ``[hidden]`` or None.
        bias: ``[hidden]`` or None, of a layer norm.
        scale: ``[hidden]``, or as many dimensions as ``x`` has: first those of ``x``, then ones.
        shift: Of the same shape as ``scale``, or None.
        variant: Which norm.
    """
    if not pays(x, least_for(variant.norm)) or x.dim() < 2 or supports(variant) is not None:
        return REFERENCE
    return _path.call(x, weight, bias, scale, shift, variant)  # type: ignore[no-any-return]


def _path_for(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    variant: ModulatedNormVariant,
) -> DispatchPath:
    """The same for rows of enough elements and a variant that has a kernel."""
    if not _one_each(scale, x) or (shift is not None and shift.shape != scale.shape):
        return REFERENCE
    norm = variant.norm
    weight, bias = _used(weight, bias, norm)
    path = dispatch_path(x, weight, bias, scale, shift)
    if path is REFERENCE or x.shape[-1] > WIDEST:
        return REFERENCE
    last = x.shape[-1:]
    dtype = torch.float32 if variant.upcast else x.dtype
    if isinstance(norm, LayerNormVariant):
        return path if layer_norm.accepts(x, weight, bias, norm, last, dtype) else REFERENCE
    if not x.is_contiguous() or (variant.upcast and norm.compute in ("input", "statistics", "fused")):
        return REFERENCE
    return path if rms_norm.accepts(x, weight, norm, None, last) else REFERENCE


_path = Settled(
    _path_for,
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor scale, Tensor? shift, object variant) -> ",
)


def _one_each(scale: Tensor, x: Tensor) -> bool:
    """Whether a condition has one row for each run of rows of ``x``, in their order, and all channels."""
    if scale.shape[-1:] != x.shape[-1:]:
        return False
    if scale.dim() == 1:
        return True
    if scale.dim() != x.dim():
        return scale.dim() < x.dim() and bool(scale.numel() == x.shape[-1])
    done = False
    for own, given in zip(scale.shape[:-1], x.shape[:-1], strict=True):
        if own == given and (not done or own == 1):
            continue
        if own != 1:
            return False
        done = True
    return True


def _used(
    weight: Tensor | None, bias: Tensor | None, norm: RMSNormVariant | LayerNormVariant
) -> tuple[Tensor | None, Tensor | None]:
    """The weight and the bias that a norm applies, of those that its layer has."""
    if isinstance(norm, RMSNormVariant):
        return (None if norm.weight == "none" else weight), None
    return (None if norm.affine == "none" else weight), (bias if norm.affine == "both" else None)


def run(
    path: DispatchPath,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor | None,
    variant: ModulatedNormVariant,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The kernel, for what :func:`path_for` found (and not for `REFERENCE`).

    Args:
        path: What :func:`path_for` found.
        x: As for :func:`path_for`, with all that follows.
        weight: ``[hidden]`` or None.
        bias: ``[hidden]`` or None.
        eps: Of the norm.
        scale: What 1 is added to.
        shift: As ``scale``, or None.
        variant: Which norm.
        dtype: Of the result; None is what torch promotes to.
    """
    weight, bias = _used(weight, bias, variant.norm)
    if path is EAGER and not torch.is_grad_enabled():
        return _inference.call(x, weight, bias, scale, shift, eps, variant.name, dtype)
    if path is EAGER:
        return _eager(x, weight, bias, scale, shift, eps, variant.name, dtype)
    return _op(x, weight, bias, scale, shift, eps, variant.name, dtype)[0]


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    variant: str,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _kernels().forward(
        x, weight, bias, eps, scale, shift, _VARIANTS[variant], dtype
    )
    return found


def _fake_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    variant: str,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    if dtype is None:
        w, t = (None if p is None else p.dtype for p in (weight, shift))
        dtype = dtypes_of(_VARIANTS[variant], x.dtype, w, scale.dtype, t)[2]
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((2, rows), dtype=torch.float32)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    variant: str,
    shift: torch.dtype | None,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    dx, dw, db, ds, dt = wanted
    return _kernels().backward(  # type: ignore[no-any-return]
        dy,
        x,
        weight,
        bias,
        scale,
        stats,
        _VARIANTS[variant],
        shift_dtype=shift,
        input_grad=dx,
        weight_grad=dw,
        bias_grad=db,
        scale_grad=ds,
        shift_grad=dt,
    )


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    variant: str,
    shift: torch.dtype | None,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    dtypes = (x.dtype, *(None if p is None else p.dtype for p in (weight, bias)), scale.dtype, shift)
    return tuple(
        p.new_empty(p.shape, dtype=dtype) if p is not None and dtype is not None and is_wanted else None
        for p, dtype, is_wanted in zip((x, weight, bias, scale, scale), dtypes, wanted, strict=True)
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, scale, shift, eps, variant, dtype = inputs
    # Only where the second derivative wants it are the values of the shift of use: it keeps none of them.
    ctx.save_for_backward(x, weight, bias, scale, results[1])
    ctx.rest = eps, variant, dtype, None if shift is None else shift.dtype


def _gradients(ctx: Any, function: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, stats = ctx.saved_tensors
    _, variant, _, shift = ctx.rest
    dx, dw, db, ds, dt = ctx.needs_input_grad[:5]
    dw, db, dt = weight is not None and dw, bias is not None and db, shift is not None and dt
    # What arrives is the gradient of a shift of each element.
    whole = dt and shift == dy.dtype and scale.numel() == x.numel()
    wanted = [dx, dw, db, ds, dt and not whole]
    found = function(dy, x, weight, bias, scale, stats, variant, shift, wanted)
    gradients = [made if is_wanted else None for made, is_wanted in zip(found, wanted, strict=True)]
    if whole:
        gradients[4] = dy.reshape(scale.shape)
    return (*gradients, None, None, None)


def _again(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, _stats = ctx.saved_tensors
    eps, variant, dtype, shift = ctx.rest

    def definition(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor | None
    ) -> Tensor:
        return reference.modulated_norm(
            x, weight, eps, scale, shift, variant=_VARIANTS[variant], bias=bias, dtype=dtype
        )

    # The result is linear in the shift, so any values of it will do.
    given = None if shift is None else torch.zeros_like(scale, dtype=shift)
    if given is not None:
        given.requires_grad_(ctx.needs_input_grad[4])
    found = through_definition(definition, (x, weight, bias, scale, given), (dy,))
    return (*found, None, None, None)


def _without_stats(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    variant: str,
    dtype: torch.dtype | None,
) -> Tensor:
    return _kernels().forward(x, weight, bias, eps, scale, shift, _VARIANTS[variant], dtype, stats=False)[0]


_INPUTS = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor scale, Tensor? shift, float eps, str variant, "
    "ScalarType? dtype"
)
_inference = Planned(_without_stats, f"({_INPUTS}) -> Tensor")
_eager, _op, _ = define_op(
    "_ModulatedNorm",
    f"modulated_norm({_INPUTS}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    Derivative(
        "modulated_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor scale, "
        "Tensor stats, str variant, ScalarType? shift, bool[] wanted) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)",
        _backward,
        _fake_backward,
        auxiliary=True,
        keep=_keep,
        gradients=_gradients,
        again=_again,
    ),
)
