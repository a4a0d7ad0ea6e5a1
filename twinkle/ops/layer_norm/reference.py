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
        variance: ``mean_square`` of the centred input, or ``var`` (biased), when written out.
        inverse: ``rsqrt`` or ``divide``, when written out.
        cast: Where a float32 result is rounded, when written out.
        weight_cast: The weight is cast to float32 before use.
    """

    name: str
    written: Literal["fused", "out"] = "fused"
    compute: Literal["input", "float32"] = "input"
    affine: Literal["both", "weight", "none"] = "both"
    variance: Literal["mean_square", "var"] = "mean_square"
    inverse: Literal["rsqrt", "divide"] = "divide"
    cast: Literal["before_weight", "after_weight"] = "after_weight"
    weight_cast: bool = False


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    variant: LayerNormVariant,
    normalized_shape: tuple[int, ...] = (),
) -> Tensor:
    """The definition.

    Args:
        x: ``[..., hidden]``.
        weight: ``[hidden]`` or None.
        bias: ``[hidden]`` or None.
        eps: Added to the variance.
        variant: How it is written and where it rounds.
        normalized_shape: Of a ``fused`` variant.

    Returns:
        ``[..., hidden]``.
    """
    dtype = x.dtype
    h = x.float() if variant.compute == "float32" else x
    if variant.written == "fused":
        if variant.affine == "both":
            h = F.layer_norm(h, normalized_shape, weight, bias, eps)
        elif variant.affine == "weight":
            h = F.layer_norm(h, normalized_shape, weight, None, eps)
        else:
            h = F.layer_norm(h, normalized_shape, None, None, eps)
        return h.to(dtype) if variant.compute == "float32" else h
    mean = h.mean(-1, keepdim=True)
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
    if variant.affine != "none":
        h = weight.float() * h if variant.weight_cast else weight * h
    if variant.affine == "both":
        h = h + bias
    if variant.compute == "float32" and variant.cast == "after_weight":
        h = h.to(dtype)
    return h


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


VARIANTS: tuple[LayerNormVariant, ...] = (
    LayerNormVariant("fused"),
    LayerNormVariant("fused_unweighted", affine="none"),
    LayerNormVariant("fused_no_bias", affine="weight"),
    LayerNormVariant("fused_float32", compute="float32"),
    LayerNormVariant("fused_float32_unweighted", compute="float32", affine="none"),
    LayerNormVariant("cohere", "out", "float32", "weight", inverse="rsqrt", weight_cast=True),
    *_written_out(),
)
"""Every variant that is recognised."""
