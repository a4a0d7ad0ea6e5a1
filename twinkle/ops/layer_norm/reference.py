"""LayerNorm: ``y = (x - mean(x)) / sqrt(var(x) + eps) · w + b`` (Ba et al. 2016).

torch's own function is one kernel already; recognised are the layers that call it and those that
write it out.
"""

# mypy: disable-error-code="union-attr, operator, misc, attr-defined, index"
# Which optional arguments are given follows from the variant: an assert would be a step of the computation.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from typing import Literal

    from torch import Tensor

__all__ = ["VARIANTS", "LayerNormVariant", "layer_norm"]


@dataclass(frozen=True)
class LayerNormVariant:
    """How a LayerNorm is written and where it rounds.

    Attributes:
        name: A short name.
        written: ``fused``: `F.layer_norm`; ``out``: mean and variance by hand.
        compute: ``input`` or ``float32`` (and the result cast back).
        affine: ``both``, ``weight`` or ``none``.
        variance: ``mean_square`` of the centred input, or ``var`` (biased), when written out; ``std``: the
            unbiased deviation, and eps on it.
        inverse: ``rsqrt`` or ``divide``, when written out.
        cast: Where a float32 result is rounded, when written out.
        weight_cast: Weight and bias are cast to float32 before use.
        affine_place: ``after`` the norm; ``first``: the weight is on the centred input; ``fused``:
            `F.layer_norm` is given both.
        one_plus: The weight is ``1 + w``.
        nullable: Weight and bias are cast unless they are None.
    """

    name: str
    written: Literal["fused", "out"] = "fused"
    compute: Literal["input", "float32"] = "input"
    affine: Literal["both", "weight", "none"] = "both"
    variance: Literal["mean_square", "var", "std"] = "mean_square"
    inverse: Literal["rsqrt", "divide"] = "divide"
    cast: Literal["before_weight", "after_weight"] = "after_weight"
    weight_cast: bool = False
    affine_place: Literal["fused", "after", "first"] = "fused"
    one_plus: bool = False
    nullable: bool = False


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    variant: LayerNormVariant,
    normalized_shape: tuple[int, ...] | None = None,
) -> Tensor:
    """The definition.

    Args:
        x: ``[..., hidden]``.
        weight: ``[hidden]`` or None.
        bias: ``[hidden]`` or None.
        eps: Added to the variance.
        variant: How it is written and where it rounds.
        normalized_shape: Of a ``fused`` variant; None is the last dimension.

    Returns:
        ``[..., hidden]``.
    """
    dtype = x.dtype
    h = x.float() if variant.compute == "float32" else x
    if variant.written == "fused":
        h = _fused(h, weight, bias, eps, variant, normalized_shape)
        return h.to(dtype) if variant.compute == "float32" else h
    mean = h.mean(-1, keepdim=True)
    if variant.variance == "std":
        divisor = h.std(-1, keepdim=True) + eps
        h = h - mean
        if variant.affine_place == "first":
            h = weight * h
        h = h / divisor
    else:
        if variant.variance == "var":
            variance = h.var(-1, unbiased=False, keepdim=True)
        else:
            variance = (h - mean).pow(2).mean(-1, keepdim=True)
        if variant.inverse == "divide":
            h = (h - mean) / torch.sqrt(variance + eps)
        else:
            h = (h - mean) * torch.rsqrt(variance + eps)
    if variant.compute == "float32" and variant.cast == "before_weight":
        h = h.to(dtype)
    if variant.affine != "none" and variant.affine_place != "first":
        h = weight.float() * h if variant.weight_cast else weight * h
    if variant.affine == "both":
        h = h + bias
    if variant.compute == "float32" and variant.cast == "after_weight":
        h = h.to(dtype)
    return h


def _fused(
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    variant: LayerNormVariant,
    normalized_shape: tuple[int, ...] | None,
) -> Tensor:
    if normalized_shape is None:
        normalized_shape = h.shape[-1:]
    if variant.affine_place == "after":
        h = F.layer_norm(h, normalized_shape, None, None, eps)
        h = h * weight
        return h + bias if variant.affine == "both" else h
    if variant.nullable:
        weight = weight.float() if weight is not None else None
        bias = bias.float() if bias is not None else None
    elif variant.weight_cast:
        weight = weight.float()
        bias = bias.float() if variant.affine == "both" else None
    if variant.one_plus:
        weight = weight + 1
    if variant.affine == "both":
        return F.layer_norm(h, normalized_shape, weight, bias, eps)
    if variant.affine == "weight":
        return F.layer_norm(h, normalized_shape, weight, None, eps)
    return F.layer_norm(h, normalized_shape, None, None, eps)


def _written_out() -> tuple[LayerNormVariant, ...]:
    made = []
    for compute in ("input", "float32"):
        for affine in ("both", "weight", "none"):
            for variance in ("mean_square", "var"):
                for inverse in ("divide", "rsqrt"):
                    for cast in ("after_weight", "before_weight"):
                        if cast == "before_weight" and (compute == "input" or affine == "none"):
                            continue
                        name = "_".join(("out", compute, affine, variance, inverse, cast))
                        made.append(LayerNormVariant(name, "out", compute, affine, variance, inverse, cast))
    return tuple(made)


def _of_deviations() -> tuple[LayerNormVariant, ...]:
    return tuple(
        LayerNormVariant(
            f"std_{compute}_{affine}{'_first' if place == 'first' else ''}",
            "out",
            compute,
            affine,
            "std",
            affine_place=place,
        )
        for compute in ("input", "float32")
        for affine in ("both", "weight", "none")
        for place in ("first", "after")
        if affine != "none" or place == "after"
    )


VARIANTS: tuple[LayerNormVariant, ...] = (
    LayerNormVariant("fused"),
    LayerNormVariant("fused_unweighted", affine="none"),
    LayerNormVariant("fused_no_bias", affine="weight"),
    LayerNormVariant("fused_float32", compute="float32"),
    LayerNormVariant("fused_float32_unweighted", compute="float32", affine="none"),
    LayerNormVariant("cohere", "out", "float32", "weight", inverse="rsqrt", weight_cast=True),
    *_written_out(),
    LayerNormVariant("fused_float32_cast", compute="float32", weight_cast=True),
    LayerNormVariant("fused_float32_no_bias", compute="float32", affine="weight"),
    LayerNormVariant("fused_float32_cast_no_bias", compute="float32", affine="weight", weight_cast=True),
    LayerNormVariant("fused_float32_nullable", compute="float32", nullable=True),
    LayerNormVariant("fused_one_plus", one_plus=True),
    LayerNormVariant("fused_one_plus_no_bias", affine="weight", one_plus=True),
    LayerNormVariant("fused_then_weight", affine="weight", affine_place="after"),
    LayerNormVariant("fused_then_both", affine_place="after"),
    *_of_deviations(),
)
"""Every variant that is recognised."""
