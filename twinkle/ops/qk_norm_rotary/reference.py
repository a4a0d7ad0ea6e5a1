"""Norms of the queries and the keys, then the rotary embedding of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinkle.ops.rms_norm.reference import RMSNormVariant, rms_norm
from twinkle.ops.rotary.reference import RotaryVariant, rotary

if TYPE_CHECKING:
    from typing import Literal

    from torch import Tensor

__all__ = ["QKNormRotaryVariant", "qk_norm_rotary"]


@dataclass(frozen=True)
class QKNormRotaryVariant:
    """Which norm, which rotation, and what lies between.

    Attributes:
        name: The names of the two variants.
        norm: The variant of both norms.
        rotary: The variant of the rotation.
        over: The norm is over the channels of one ``head``, or over ``all`` heads before they are split.
    """

    name: str
    norm: RMSNormVariant
    rotary: RotaryVariant
    over: Literal["head", "all"] = "head"


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_eps: float,
    k_eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    variant: QKNormRotaryVariant,
) -> tuple[Tensor, Tensor]:
    """The definition.

    Args:
        q: ``[batch, tokens, heads · head_dim]``, as the projection returns it.
        k: ``[batch, tokens, kv_heads · head_dim]``.
        q_weight: ``[head_dim]``, or ``[heads · head_dim]`` where the norm is over all heads.
        k_weight: As ``q_weight``.
        q_eps: Of the norm of the queries.
        k_eps: Of the norm of the keys.
        cos: ``[batch, tokens, head_dim]``.
        sin: As ``cos``.
        head_dim: Channels of a head.
        variant: Which norm and which rotation.

    Returns:
        ``[batch, heads, tokens, head_dim]`` and ``[batch, kv_heads, tokens, head_dim]``.
    """
    q = _heads(q, q_weight, q_eps, head_dim, variant)
    k = _heads(k, k_weight, k_eps, head_dim, variant)
    q_out, k_out = rotary(q, k, cos, sin, 1, variant=variant.rotary)
    return q_out, k_out


def _heads(
    x: Tensor, weight: Tensor | None, eps: float, head_dim: int, variant: QKNormRotaryVariant
) -> Tensor:
    if variant.over == "all":
        x = rms_norm(x, weight, eps, variant=variant.norm)
    x = x.view(*x.shape[:-1], -1, head_dim)
    if variant.over == "head":
        x = rms_norm(x, weight, eps, variant=variant.norm)
    return x.transpose(1, 2)
