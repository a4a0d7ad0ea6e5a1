"""RMSNorm: ``y = x / sqrt(mean(x²) + eps) · w``, in every rounding that models use.

The formula is one (Zhang and Sennrich 2019); where the result is rounded to the dtype of the input,
and in which dtype the weight is applied, differ between families and change bits in bfloat16.
"""

# mypy: disable-error-code="union-attr, operator, misc, attr-defined, index"
# Which optional arguments are given follows from the form: an assert would be a step of the computation.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final, Literal

    from torch import Tensor

__all__ = ["FORMS", "RMSNormForm", "rms_norm"]


@dataclass(frozen=True)
class RMSNormForm:
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
    form: RMSNormForm,
    gate: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = F.silu,
    group_size: int | None = None,
    with_weight: bool = True,
    normalized_shape: tuple[int, ...] = (),
) -> Tensor:
    """The definition.

    Args:
        x: ``[..., hidden]``.
        weight: ``[hidden]``, or None for a form without.
        eps: Added to the mean of squares.
        form: Where it rounds.
        gate: ``[..., hidden]``, for a gated form.
        activation: Of the gate.
        group_size: For a grouped form.
        with_weight: The flag of a form whose weight is optional.
        normalized_shape: Of a ``fused`` form.

    Returns:
        ``[..., hidden]``.
    """
    if form.compute == "fused":
        if form.weight == "none":
            return F.rms_norm(x, normalized_shape, None, eps)
        return F.rms_norm(x, normalized_shape, weight, eps)
    dtype = x.dtype
    h = x
    if form.compute == "float32":
        h = h.float()
    if form.weight_place == "input":
        h = (h * _scale(weight, form)).to(dtype).float()
    if form.gate == "before":
        if form.gate_optional:
            if gate is not None:
                h = h * activation(gate.float())
        else:
            h = h * activation(gate.float())
    if form.groups == "none":
        h = _normalise(h, weight, eps, form)
    elif form.groups == "optional":
        if group_size is not None:
            h = h.reshape(*h.shape[:-1], -1, group_size)
        h = _normalise(h, weight, eps, form)
        h = h.flatten(-2) if group_size is not None else h
    else:
        *prefix, last = h.shape
        h = h.view(*prefix, last // group_size, group_size)
        h = _normalise(h, weight, eps, form)
        h = h.view(*prefix, last // group_size * group_size)
    if form.cast == "before_weight":
        h = h.to(dtype)
    if form.cast == "half_weight" and weight.dtype in [torch.float16, torch.bfloat16]:
        h = h.to(weight.dtype)
    if form.weight != "none" and form.weight_place == "after":
        if form.optional_weight:
            if with_weight:
                h = h * _scale(weight, form)
        else:
            h = h * _scale(weight, form)
    if form.gate == "after":
        h = h * activation(gate.float())
        return h.to(dtype)
    if form.cast == "after_weight":
        h = h.to(dtype)
    return h


def _scale(weight: Tensor | None, form: RMSNormForm) -> Tensor:
    if form.weight == "one_plus":
        if form.weight_cast == "float32":
            return 1.0 + weight.float()
        if form.weight_cast == "float32_sum":
            return (1.0 + weight).float()
        return 1.0 + weight
    if form.weight_cast == "float32":
        return weight.float()
    return weight


def _normalise(h: Tensor, weight: Tensor | None, eps: float, form: RMSNormForm) -> Tensor:
    if form.compute == "promoted" or form.compute == "statistics":
        mean_square = h.float().pow(2).mean(-1, keepdim=True)
    else:
        mean_square = h.pow(2).mean(-1, keepdim=True)
    if form.weight_place == "first":
        h = weight * h
    if form.inverse == "divide":
        return h / torch.sqrt(mean_square + eps)
    scale = torch.rsqrt(mean_square + eps)
    if form.compute == "statistics":
        return h * scale.to(h.dtype)
    return h * scale


_F32: Final = "float32"
_AFTER: Final = "after_weight"
_BASE = (
    RMSNormForm("llama"),
    RMSNormForm("gemma", weight="one_plus", weight_cast=_F32, cast=_AFTER),
    RMSNormForm("olmo2", cast=_AFTER),
    RMSNormForm("t5", compute="promoted", cast="half_weight"),
    RMSNormForm("helium", weight_cast=_F32, cast=_AFTER),
    RMSNormForm("unweighted", weight="none", cast=_AFTER),
    RMSNormForm("gemma4", weight_cast=_F32, cast=_AFTER, optional_weight=True),
    RMSNormForm("one_plus_after_cast", weight="one_plus"),
    RMSNormForm("one_plus_sum_cast", weight="one_plus", weight_cast="float32_sum", cast=_AFTER),
    RMSNormForm("one_plus_plain", weight="one_plus", cast=_AFTER),
    RMSNormForm(
        "input_scaled", weight="one_plus", weight_cast="float32_sum", weight_place="input", cast=_AFTER
    ),
    RMSNormForm("scaled_first", compute="input", weight_place="first", weight="plain", cast="none"),
    RMSNormForm("statistics", compute="statistics", weight="none", cast="none"),
    RMSNormForm("statistics_weighted", compute="statistics", cast="none"),
    RMSNormForm("input", compute="input", cast="none"),
    RMSNormForm("input_unweighted", compute="input", weight="none", cast="none"),
    RMSNormForm("promoted", compute="promoted", cast="before_weight"),
    RMSNormForm("float32_out", cast="none"),
    RMSNormForm("fused", compute="fused"),
    RMSNormForm("fused_unweighted", compute="fused", weight="none"),
    RMSNormForm("gated_after", gate="after"),
    RMSNormForm("gated_after_float32", weight_cast=_F32, cast=_AFTER, gate="after"),
    RMSNormForm("gated_before", gate="before", gate_optional=True),
    RMSNormForm("gated_before_required", gate="before"),
    RMSNormForm("gated_before_grouped", gate="before", gate_optional=True, groups="always"),
    RMSNormForm("gemma_grouped", weight="one_plus", weight_cast=_F32, cast=_AFTER, groups="optional"),
)
_DIVIDED = tuple(
    RMSNormForm(
        f"{form.name}_divided",
        compute=form.compute,
        inverse="divide",
        weight=form.weight,
        weight_cast=form.weight_cast,
        cast=form.cast,
    )
    for form in _BASE
    if form.name in ("llama", "gemma", "olmo2", "helium", "unweighted", "input", "input_unweighted")
)
FORMS: tuple[RMSNormForm, ...] = _BASE + _DIVIDED
"""Every form that is recognised."""
