"""RMSNorm: ``y = x / sqrt(mean(x²) + eps) · w``, in every rounding that models use.

The formula is one (Zhang and Sennrich 2019); where the result is rounded to the dtype of the input,
and in which dtype the weight is applied, differ between families and change bits in bfloat16.
"""

# mypy: disable-error-code="union-attr, operator, misc, attr-defined, index"
# Which optional arguments are given follows from the variant: an assert would be a step of the computation.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final, Literal

    from torch import Tensor

__all__ = ["VARIANTS", "RMSNormVariant", "rms_norm"]


@dataclass(frozen=True)
class RMSNormVariant:
    """Where an RMSNorm rounds.

    Attributes:
        name: A short name, the family that is best known for it.
        compute: ``float32``: all of the norm in float32; ``promoted``: only the statistics, the
            product of ``x`` with them is promoted; ``statistics``: these are rounded to the dtype of
            ``x`` before the product; ``input``: all in the dtype of ``x``; ``fused``: `F.rms_norm`.
        inverse: ``rsqrt`` multiplies, ``divide`` divides by the square root.
        weight: ``none``, ``plain`` (``w``) or ``one_plus`` (``1 + w``).
        weight_cast: ``none``; ``float32``: the weight is cast before use; ``float32_sum``: ``1 + w``
            is computed in the weight's dtype, then cast.
        cast: ``before_weight`` rounds the normalised input to the dtype of ``x`` and then applies
            the weight; ``after_weight`` rounds once at the end; ``half_weight`` rounds to the
            weight's dtype before, if that is float16 or bfloat16; ``none`` never rounds.
        optional_weight: A flag of the instance says whether there is a weight.
        weight_place: ``after`` the norm, or on its ``input`` (rounded there), or ``first``:
            ``(w · x) · rsqrt``.
        gate: A second input, through an activation in float32, multiplies ``before`` or ``after``
            the norm, or not at all (``none``).
        gate_optional: The gate may be None.
        groups: The last dimension is normalised in groups: ``none``, ``always``, or ``optional``
            where the instance's group size may be None.
    """

    name: str
    compute: Literal["float32", "promoted", "statistics", "input", "fused"] = "float32"
    inverse: Literal["rsqrt", "divide"] = "rsqrt"
    weight: Literal["none", "plain", "one_plus"] = "plain"
    weight_cast: Literal["none", "float32", "float32_sum"] = "none"
    cast: Literal["before_weight", "after_weight", "half_weight", "none"] = "before_weight"
    optional_weight: bool = False
    weight_place: Literal["after", "input", "first"] = "after"
    gate: Literal["none", "before", "after"] = "none"
    gate_optional: bool = False
    groups: Literal["none", "always", "optional"] = "none"


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
    normalized_shape: tuple[int, ...] = (),
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
        normalized_shape: Of a ``fused`` variant.

    Returns:
        ``[..., hidden]``.
    """
    if variant.compute == "fused":
        if variant.weight == "none":
            return F.rms_norm(x, normalized_shape, None, eps)
        return F.rms_norm(x, normalized_shape, weight, eps)
    dtype = x.dtype
    h = x
    if variant.compute == "float32":
        h = h.float()
    if variant.weight_place == "input":
        h = (h * _scale(weight, variant)).to(dtype).float()
    if variant.gate == "before":
        if variant.gate_optional:
            if gate is not None:
                h = h * activation(gate.float())
        else:
            h = h * activation(gate.float())
    if variant.groups == "none":
        h = _normalise(h, weight, eps, variant)
    elif variant.groups == "optional":
        if group_size is not None:
            h = h.reshape(*h.shape[:-1], -1, group_size)
        h = _normalise(h, weight, eps, variant)
        h = h.flatten(-2) if group_size is not None else h
    else:
        *prefix, last = h.shape
        h = h.view(*prefix, last // group_size, group_size)
        h = _normalise(h, weight, eps, variant)
        h = h.view(*prefix, last // group_size * group_size)
    if variant.cast == "before_weight":
        h = h.to(dtype)
    if variant.cast == "half_weight" and weight.dtype in [torch.float16, torch.bfloat16]:
        h = h.to(weight.dtype)
    if variant.weight != "none" and variant.weight_place == "after":
        if variant.optional_weight:
            if with_weight:
                h = h * _scale(weight, variant)
        else:
            h = h * _scale(weight, variant)
    if variant.gate == "after":
        h = h * activation(gate.float())
        return h.to(dtype)
    if variant.cast == "after_weight":
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


def _normalise(h: Tensor, weight: Tensor | None, eps: float, variant: RMSNormVariant) -> Tensor:
    if variant.compute == "promoted" or variant.compute == "statistics":
        mean_square = h.float().pow(2).mean(-1, keepdim=True)
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
    RMSNormVariant("fused", compute="fused"),
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
VARIANTS: tuple[RMSNormVariant, ...] = _BASE + _DIVIDED
"""Every variant that is recognised."""
