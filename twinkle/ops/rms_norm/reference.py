"""RMSNorm: ``y = x / sqrt(mean(x²) + eps) · w``, in every rounding that models use.

The formula is one (Zhang and Sennrich 2019); where the result is rounded to the dtype of the input,
and in which dtype the weight is applied, differ between families and change bits in bfloat16.
"""

# mypy: disable-error-code="union-attr, operator, misc, attr-defined, index"
# Which optional arguments are given follows from the variant: an assert would be a step of the computation.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final, Literal

    from torch import Tensor

__all__ = ["VARIANTS", "RMSNormVariant", "may_lack_weight", "number", "rms_norm"]


@dataclass(frozen=True)
class RMSNormVariant:
    """Where an RMSNorm rounds.

    Attributes:
        name: A short name, the family that is best known for it.
        compute: ``float32``: all of the norm in float32; ``promoted``: only the statistics, the
            product of ``x`` with them is promoted; ``statistics``: these are rounded to the dtype of
            ``x`` before the product; ``input``: all in the dtype of ``x``; ``fused``: `F.rms_norm`;
            ``fused_float32``: that function, of ``x`` in float32.
        inverse: ``rsqrt`` multiplies, ``divide`` divides by the square root.
        weight: ``none``, ``plain`` (``w``), ``one_plus`` (``1 + w``) or ``offset`` (``w`` and a number of the
            instance).
        weight_cast: ``none``; ``float32``: the weight is cast before use; ``float32_sum``: ``1 + w``
            is computed in the weight's dtype, then cast.
        cast: ``before_weight`` rounds the normalised input to the dtype of ``x`` and then applies
            the weight; ``after_weight`` rounds once at the end; ``half_weight`` rounds to the
            weight's dtype before, if that is float16 or bfloat16; ``none`` never rounds.
        optional_weight: A flag of the instance says whether there is a weight.
        weight_place: ``after`` the norm, or on its ``input`` (rounded there), or ``first``:
            ``(w · x) · rsqrt``; ``fused``: `F.rms_norm` is given it.
        gate: A second input, through an activation in float32, multiplies ``before`` or ``after``
            the norm, or not at all (``none``).
        gate_optional: The gate may be None.
        groups: The last dimension is normalised in groups: ``none``, ``always``, or ``optional``
            where the instance's group size may be None.
        statistic: What the row is measured by: the ``mean`` of squares, their ``sum`` divided by the width,
            or its Euclidean ``norm``.
        eps_place: eps is added to the ``mean`` (or to the sum over the width), to the ``root``, or is the
            ``least`` that the root may be.
        scale: A number beside the weight: ``norm_multiplied``, ``norm_divided`` and ``norm_inverse`` make a
            mean of the Euclidean norm, before eps (by ``width ** -0.5``, by ``width ** 0.5``, by
            ``1 / width ** 0.5``); ``result`` is on the normalised input, ``rounded`` on that behind its cast,
            ``weighted`` on its product with the weight.
        nullable: The weight may be None, and is then left out; ``cast``: the result is then rounded to the
            dtype of ``x``.
        bias: One is added, where there is a weight, unless it is None.
    """

    name: str
    compute: Literal["float32", "promoted", "statistics", "input", "fused", "fused_float32"] = "float32"
    inverse: Literal["rsqrt", "divide"] = "rsqrt"
    weight: Literal["none", "plain", "one_plus", "offset"] = "plain"
    weight_cast: Literal["none", "float32", "float32_sum"] = "none"
    cast: Literal["before_weight", "after_weight", "half_weight", "none"] = "before_weight"
    optional_weight: bool = False
    weight_place: Literal["after", "input", "first", "fused"] = "after"
    gate: Literal["none", "before", "after"] = "none"
    gate_optional: bool = False
    groups: Literal["none", "always", "optional"] = "none"
    statistic: Literal["mean", "sum", "norm"] = "mean"
    eps_place: Literal["mean", "root", "least"] = "mean"
    scale: Literal[
        "none", "norm_multiplied", "norm_divided", "norm_inverse", "result", "rounded", "weighted"
    ] = "none"
    nullable: Literal["no", "yes", "cast"] = "no"
    bias: bool = False


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    variant: RMSNormVariant,
    gate: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = F.silu,
    group_size: int | None = None,
    with_weight: bool = True,
    normalized_shape: tuple[int, ...] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    width: int | None = None,
    math_root: bool = False,
    offset: float = 0.0,
) -> Tensor:
    """The definition.

    Args:
        x: ``[..., hidden]``.
        weight: ``[hidden]``, or None for a variant without.
        eps: Added to the mean of squares.
        variant: Where it rounds.
        gate: ``[..., hidden]``, for a gated variant.
        activation: Of the gate.
        group_size: For a grouped variant.
        with_weight: The flag of a variant whose weight is optional.
        normalized_shape: Of a ``fused`` variant; None is the last dimension.
        bias: ``[hidden]`` or None, for a variant that may have one.
        scale: Of a variant with one; None is the power of the width that makes a root mean square of it.
        width: What stands for ``hidden`` in that power and under a sum; None is ``hidden`` itself.
        math_root: The power is taken by ``math.sqrt``, which differs in the last bit for some widths.
        offset: Of a variant with one.

    Returns:
        ``[..., hidden]``.
    """
    dtype = x.dtype
    h = x
    if variant.weight == "offset":
        weight = weight + offset
    if variant.compute == "float32" or variant.compute == "fused_float32":
        h = h.float()
    if variant.compute == "fused" or variant.compute == "fused_float32":
        return _fused(h, weight, eps, dtype, variant, normalized_shape)
    if variant.scale != "none":
        scale = number(x, scale, width, variant, math_root)
    if variant.weight_place == "input":
        h = (h * _scale(weight, variant)).to(dtype).float()
    if variant.gate == "before":
        if variant.gate_optional:
            if gate is not None:
                h = h * activation(gate.float())
        else:
            h = h * activation(gate.float())
    h = _in_groups(h, weight, eps, variant, scale, width, group_size)
    if variant.scale == "result":
        h = h * scale
    if variant.cast == "before_weight":
        h = h.to(dtype)
    if variant.scale == "rounded":
        h = h * scale
    if variant.nullable != "no":
        h = _weighted_unless_none(h, weight, bias, dtype, variant)
    elif variant.weight != "none" and variant.weight_place == "after":
        if variant.optional_weight:
            if with_weight:
                h = _weighted(h, weight, variant)
        else:
            h = _weighted(h, weight, variant)
    if variant.scale == "weighted":
        h = h * scale
    if variant.gate == "after":
        h = h * activation(gate.float())
        return h.to(dtype)
    if variant.cast == "after_weight":
        h = h.to(dtype)
    return h


def _in_groups(
    h: Tensor,
    weight: Tensor | None,
    eps: float,
    variant: RMSNormVariant,
    scale: float | None,
    width: int | None,
    group_size: int | None,
) -> Tensor:
    if variant.groups == "none":
        return _normalise(h, weight, eps, variant, scale, width)
    if variant.groups == "optional":
        if group_size is not None:
            h = h.reshape(*h.shape[:-1], -1, group_size)
        h = _normalise(h, weight, eps, variant)
        return h.flatten(-2) if group_size is not None else h
    *prefix, last = h.shape
    h = h.view(*prefix, last // group_size, group_size)
    h = _normalise(h, weight, eps, variant)
    return h.view(*prefix, last // group_size * group_size)


def _weighted_unless_none(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype, variant: RMSNormVariant
) -> Tensor:
    if weight is not None:
        h = _weighted(h, weight, variant)
        if variant.bias and bias is not None:
            h = h + bias
    elif variant.nullable == "cast":
        h = h.to(dtype)
    return h


def _scale(weight: Tensor | None, variant: RMSNormVariant) -> Tensor:
    if variant.weight == "one_plus":
        if variant.weight_cast == "float32":
            return 1.0 + weight.float()
        if variant.weight_cast == "float32_sum":
            return (1.0 + weight).float()
        return 1.0 + weight
    if variant.weight_cast == "float32":
        return weight.float()
    return weight


def _weighted(h: Tensor, weight: Tensor, variant: RMSNormVariant) -> Tensor:
    if variant.cast == "half_weight" and weight.dtype in [torch.float16, torch.bfloat16]:
        h = h.to(weight.dtype)
    return h * _scale(weight, variant)


def _fused(
    h: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    variant: RMSNormVariant,
    normalized_shape: tuple[int, ...] | None,
) -> Tensor:
    if normalized_shape is None:
        normalized_shape = h.shape[-1:]
    if variant.weight_place == "fused" and variant.weight != "none":
        if variant.nullable != "no":
            weight = _scale(weight, variant) if weight is not None else None
        else:
            weight = _scale(weight, variant)
        h = F.rms_norm(h, normalized_shape, weight, eps)
    else:
        h = F.rms_norm(h, normalized_shape, None, eps)
    if variant.compute == "fused_float32" and variant.cast == "before_weight":
        h = h.to(dtype)
    if variant.weight_place == "after" and variant.weight != "none":
        h = h * _scale(weight, variant)
    if variant.compute == "fused_float32" and variant.cast == "after_weight":
        h = h.to(dtype)
    return h


def may_lack_weight(variant: RMSNormVariant) -> bool:
    """Whether code that is a variant takes None for its weight."""
    as_torch = variant.weight == "plain" and variant.weight_place == "fused" and variant.weight_cast == "none"
    return as_torch or variant.weight == "none" or variant.nullable != "no"


def number(
    x: Tensor, scale: float | None, width: int | None, variant: RMSNormVariant, math_root: bool = False
) -> float:
    """The scale of a variant with one: as given, or a power of the width."""
    if scale is not None:
        return scale
    if width is None:
        width = x.shape[-1]
    power: float
    if variant.scale == "norm_multiplied":
        power = width**-0.5
        return power
    power = math.sqrt(width) if math_root else width**0.5
    return 1.0 / power if variant.scale == "norm_inverse" else power


def _root(h: Tensor, eps: float, variant: RMSNormVariant, scale: float | None, width: int | None) -> Tensor:
    """What a row is divided by, where that is not the root of a mean and eps."""
    if variant.statistic == "norm":
        root = h.norm(2, -1, keepdim=True)
    elif variant.statistic == "sum":
        if width is None:
            width = h.shape[-1]
        root = h.pow(2).sum(-1, keepdim=True) / width
        if variant.eps_place == "mean":
            root = root + eps
        root = torch.sqrt(root)
    else:
        root = torch.sqrt(h.pow(2).mean(-1, keepdim=True))
    if variant.scale == "norm_multiplied" or variant.scale == "norm_inverse":
        root = root * scale
    if variant.scale == "norm_divided":
        root = root / scale
    if variant.eps_place == "root":
        root = root + eps
    if variant.eps_place == "least":
        root = root.clamp(min=eps)
    return root


def _normalise(
    h: Tensor,
    weight: Tensor | None,
    eps: float,
    variant: RMSNormVariant,
    scale: float | None = None,
    width: int | None = None,
) -> Tensor:
    if variant.inverse == "divide" and (variant.statistic != "mean" or variant.eps_place != "mean"):
        root = _root(h, eps, variant, scale, width)
        if variant.weight_place == "first":
            h = weight * h
        return h / root
    if variant.compute == "promoted" or variant.compute == "statistics":
        mean_square = h.float().pow(2).mean(-1, keepdim=True)
    elif variant.statistic == "sum":
        if width is None:
            width = h.shape[-1]
        mean_square = h.pow(2).sum(-1, keepdim=True) / width
    else:
        mean_square = h.pow(2).mean(-1, keepdim=True)
    if variant.weight_place == "first":
        h = weight * h
    if variant.inverse == "divide":
        return h / torch.sqrt(mean_square + eps)
    scale = torch.rsqrt(mean_square + eps)
    if variant.compute == "statistics":
        return h * scale.to(h.dtype)
    return h * scale


_F32: Final = "float32"
_AFTER: Final = "after_weight"
_BASE = (
    RMSNormVariant("llama"),
    RMSNormVariant("gemma", weight="one_plus", weight_cast=_F32, cast=_AFTER),
    RMSNormVariant("olmo2", cast=_AFTER),
    RMSNormVariant("t5", compute="promoted", cast="half_weight"),
    RMSNormVariant("helium", weight_cast=_F32, cast=_AFTER),
    RMSNormVariant("unweighted", weight="none", cast=_AFTER),
    RMSNormVariant("gemma4", weight_cast=_F32, cast=_AFTER, optional_weight=True),
    RMSNormVariant("one_plus_after_cast", weight="one_plus"),
    RMSNormVariant("one_plus_sum_cast", weight="one_plus", weight_cast="float32_sum", cast=_AFTER),
    RMSNormVariant("one_plus_plain", weight="one_plus", cast=_AFTER),
    RMSNormVariant(
        "input_scaled", weight="one_plus", weight_cast="float32_sum", weight_place="input", cast=_AFTER
    ),
    RMSNormVariant("scaled_first", compute="input", weight_place="first", weight="plain", cast="none"),
    RMSNormVariant("statistics", compute="statistics", weight="none", cast="none"),
    RMSNormVariant("statistics_weighted", compute="statistics", cast="none"),
    RMSNormVariant("input", compute="input", cast="none"),
    RMSNormVariant("input_unweighted", compute="input", weight="none", cast="none"),
    RMSNormVariant("promoted", compute="promoted", cast="before_weight"),
    RMSNormVariant("float32_out", cast="none"),
    RMSNormVariant("fused", compute="fused", weight_place="fused"),
    RMSNormVariant("fused_unweighted", compute="fused", weight="none"),
    RMSNormVariant("gated_after", gate="after"),
    RMSNormVariant("gated_after_float32", weight_cast=_F32, cast=_AFTER, gate="after"),
    RMSNormVariant("gated_before", gate="before", gate_optional=True),
    RMSNormVariant("gated_before_required", gate="before"),
    RMSNormVariant("gated_before_grouped", gate="before", gate_optional=True, groups="always"),
    RMSNormVariant("gemma_grouped", weight="one_plus", weight_cast=_F32, cast=_AFTER, groups="optional"),
)
_DIVIDED = tuple(
    RMSNormVariant(
        f"{variant.name}_divided",
        compute=variant.compute,
        inverse="divide",
        weight=variant.weight,
        weight_cast=variant.weight_cast,
        cast=variant.cast,
    )
    for variant in _BASE
    if variant.name in ("llama", "gemma", "olmo2", "helium", "unweighted", "input", "input_unweighted")
)
_NULLABLE = (
    RMSNormVariant("diffusers", compute="promoted", cast="half_weight", nullable="cast", bias=True),
    RMSNormVariant("t5_nullable", compute="promoted", cast="half_weight", nullable="cast"),
    RMSNormVariant("promoted_nullable", compute="promoted", cast=_AFTER, nullable="yes"),
    RMSNormVariant("llama_nullable", nullable="yes"),
    RMSNormVariant("olmo2_nullable", cast=_AFTER, nullable="yes"),
    RMSNormVariant("input_nullable", compute="input", cast="none", nullable="yes"),
    RMSNormVariant("promoted_after", compute="promoted", cast=_AFTER),
)
_FUSED = (
    RMSNormVariant("fused_one_plus", compute="fused", weight="one_plus", weight_place="fused"),
    RMSNormVariant("fused_then_weight", compute="fused"),
    RMSNormVariant("fused_float32", compute="fused_float32", weight_place="fused", cast=_AFTER),
    RMSNormVariant(
        "fused_float32_cast", compute="fused_float32", weight_cast=_F32, weight_place="fused", cast=_AFTER
    ),
    RMSNormVariant(
        "fused_float32_nullable",
        compute="fused_float32",
        weight_cast=_F32,
        weight_place="fused",
        cast=_AFTER,
        nullable="yes",
    ),
    RMSNormVariant("fused_float32_unweighted", compute="fused_float32", weight="none", cast=_AFTER),
    RMSNormVariant("fused_float32_then_weight", compute="fused_float32"),
    RMSNormVariant("fused_float32_weight_then_cast", compute="fused_float32", cast=_AFTER),
)


_NORM: Final[dict[str, Any]] = {"statistic": "norm", "inverse": "divide", "eps_place": "root"}
_LEAST: Final[dict[str, Any]] = {**_NORM, "eps_place": "least"}
_SUM: Final[dict[str, Any]] = {"statistic": "sum"}
_MEASURES: Final[tuple[tuple[str, dict[str, Any], str], ...]] = (
    ("normalize", {**_LEAST, "scale": "result"}, "plain one_plus none offset"),
    ("normalize_unscaled", _LEAST, "plain"),
    ("normalize_scaled_last", {**_LEAST, "scale": "weighted"}, "plain one_plus"),
    ("norm", {**_NORM, "scale": "norm_multiplied"}, "plain none first"),
    ("norm_divided", {**_NORM, "scale": "norm_divided"}, "plain none first"),
    ("norm_inverse", {**_NORM, "scale": "norm_inverse"}, "plain none first"),
    ("norm_least", {**_LEAST, "scale": "norm_multiplied"}, "plain none"),
    ("norm_divided_least", {**_LEAST, "scale": "norm_divided"}, "plain none"),
    ("root", {"inverse": "divide", "eps_place": "root"}, "plain none first"),
    ("root_least", {"inverse": "divide", "eps_place": "least"}, "plain none"),
    ("sum_divided", {**_SUM, "inverse": "divide"}, "plain none"),
    ("sum", _SUM, "plain none"),
)
"""What is divided by something else than the root of a mean and eps, and the weights it is written with."""
_WEIGHTS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "plain": ("", {}),
    "one_plus": ("_one_plus", {"weight": "one_plus"}),
    "offset": ("_offset", {"weight": "offset"}),
    "none": ("_unweighted", {"weight": "none"}),
    "first": ("_first", {"weight_place": "first"}),
}


def _measured() -> tuple[RMSNormVariant, ...]:
    made = []
    for measure, how, weights in _MEASURES:
        for weight in weights.split():
            suffix, applied = _WEIGHTS[weight]
            name, fields = f"{measure}{suffix}", {**how, **applied}
            made.append(RMSNormVariant(name, compute="input", cast="none", **fields))
            if weight != "first":
                made.append(RMSNormVariant(f"{name}_float32_late", cast=_AFTER, **fields))
            if weight in ("plain", "one_plus"):
                made.append(RMSNormVariant(f"{name}_float32", **fields))
    return tuple(made)


_ROUNDED = tuple(
    RMSNormVariant(f"normalize_rounded{suffix}", scale="rounded", **_LEAST, **applied)
    for suffix, applied in (_WEIGHTS[weight] for weight in ("plain", "one_plus", "none", "offset"))
)
VARIANTS: tuple[RMSNormVariant, ...] = (*_BASE, *_DIVIDED, *_NULLABLE, *_FUSED, *_measured(), *_ROUNDED)
"""Every variant that is recognised."""
