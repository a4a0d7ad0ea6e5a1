"""Residual add and norm in one: ``h = residual + x``, ``y = norm(h)``; both are needed afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinkle.ops.layer_norm.reference import LayerNormForm, layer_norm
from twinkle.ops.rms_norm.reference import RMSNormForm, rms_norm

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ResidualNormForm", "residual_norm"]


@dataclass(frozen=True)
class ResidualNormForm:
    """Which norm follows the sum.

    Attributes:
        name: The op and the form of the norm.
        norm: The form of the norm.
        scaled: The addend is multiplied by a number first.
    """

    name: str
    norm: RMSNormForm | LayerNormForm
    scaled: bool = False


def residual_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    form: ResidualNormForm,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The definition.

    Args:
        x: ``[..., hidden]``, what a sublayer returned.
        residual: ``[..., hidden]``.
        weight: ``[hidden]`` or None, of the norm.
        eps: Of the norm.
        form: Which norm.
        bias: ``[hidden]`` or None, of a layer norm.
        scale: Of a scaled form.

    Returns:
        The sum and the normalised sum.
    """
    h = residual + (x * scale if form.scaled else x)
    if isinstance(form.norm, LayerNormForm):
        return h, layer_norm(h, weight, bias, eps, form=form.norm, normalized_shape=(h.shape[-1],))
    return h, rms_norm(h, weight, eps, form=form.norm, normalized_shape=(h.shape[-1],))
