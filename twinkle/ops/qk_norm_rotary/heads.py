"""The same op on queries and keys that are split into heads already, as they are inside an attention.

>>> path = path_for(q, k, q_weight, k_weight, cos, sin, variant)
>>> q, k = run(path, q, k, q_weight, k_weight, q_eps, k_eps, cos, sin, variant)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.ops.derivative import apply_of
from twinkle.ops.failures import backward_survives
from twinkle.ops.launch import EAGER, REFERENCE, DispatchPath, dispatch_path
from twinkle.ops.plans import Planned
from twinkle.ops.qk_norm_rotary import triton_backend

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from twinkle.ops.qk_norm_rotary.reference import QKNormRotaryVariant

__all__ = ["joined", "path_for", "run", "split"]


def joined(x: Tensor) -> Tensor:
    """``[batch, heads, tokens, head_dim]`` as ``[batch, tokens, heads · head_dim]``; a view if it can be."""
    return x.transpose(1, 2).flatten(2)


def split(x: Tensor, head_dim: int) -> Tensor:
    """``[batch, tokens, heads · head_dim]`` as ``[batch, heads, tokens, head_dim]``, a view."""
    return x.view(x.shape[0], x.shape[1], -1, head_dim).transpose(1, 2)


def path_for(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    variant: QKNormRotaryVariant,
) -> DispatchPath:
    """What computes with these tensors; see :func:`twinkle.ops.launch.dispatch_path`.

    Args:
        q: ``[batch, heads, tokens, head_dim]``.
        k: ``[batch, kv_heads, tokens, head_dim]``.
        q_weight: ``[head_dim]``, or ``[heads · head_dim]`` where the norm is over all heads.
        k_weight: As ``q_weight``.
        cos: ``[batch, tokens, head_dim]``.
        sin: As ``cos``.
        variant: Which norm and which rotation; one that ``triton_backend.supports``.
    """
    if q.dim() != 4 or k.dim() != 4 or q.dtype != k.dtype:
        return REFERENCE
    path = dispatch_path(q, k, q_weight, k_weight, cos, sin)
    if path is REFERENCE or not _fits(q, k, q_weight, k_weight, cos, sin, variant):
        return REFERENCE
    return path


def _fits(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    variant: QKNormRotaryVariant,
) -> bool:
    batch, heads, tokens, head_dim = q.shape
    k_batch, k_heads, k_tokens, k_head_dim = k.shape
    if (k_batch, k_tokens, k_head_dim) != (batch, tokens, head_dim) or head_dim % 2:
        return False
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return False
    width = head_dim // 2 if variant.rotary.tables == "half" else head_dim
    table = cos.shape
    if len(table) != 3 or table != sin.shape or cos.dtype != sin.dtype:
        return False
    if table[2] != width or table[1] != tokens or table[0] not in (1, batch):
        return False
    # What one program holds; the same limit as for the op on joined heads.
    if heads * head_dim > triton_backend.MOST or (q_weight is None) != (k_weight is None):
        return False
    if q_weight is None or k_weight is None:
        return variant.norm.weight == "none"
    over = variant.over == "all"
    return bool(
        q_weight.shape == (heads * head_dim if over else head_dim,)
        and k_weight.shape == (k_heads * head_dim if over else head_dim,)
        and q_weight.dtype == q.dtype == k_weight.dtype
        and q_weight.is_contiguous()
        and k_weight.is_contiguous()
    )


def run(
    path: DispatchPath,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_eps: float,
    k_eps: float,
    cos: Tensor,
    sin: Tensor,
    variant: QKNormRotaryVariant,
) -> tuple[Tensor, Tensor]:
    """The kernel, for what :func:`path_for` found (and not for `REFERENCE`).

    Args:
        path: As found.
        q: ``[batch, heads, tokens, head_dim]``.
        k: ``[batch, kv_heads, tokens, head_dim]``.
        q_weight: ``[head_dim]``, or ``[heads · head_dim]`` where the norm is over all heads; or None.
        k_weight: As ``q_weight``.
        q_eps: Of the norm of the queries.
        k_eps: Of the norm of the keys.
        cos: ``[batch, tokens, head_dim]``, or half as wide where the variant says so.
        sin: As ``cos``.
        variant: Which norm and which rotation.

    Returns:
        The shapes of ``q`` and ``k``; in memory tokens come before heads.
    """
    if variant.norm.weight == "none":
        q_weight = k_weight = None
    rest = (q.shape[3], variant.norm.name, variant.rotary.name, variant.over == "all")
    if path is EAGER and torch.is_grad_enabled():
        return _eager(q, k, q_weight, k_weight, q_eps, k_eps, cos, sin, *rest)  # type: ignore[no-any-return]
    function: Any = triton_backend._bare if path is EAGER else triton_backend._op
    return function(joined(q), joined(k), q_weight, k_weight, q_eps, k_eps, cos, sin, *rest)  # type: ignore[no-any-return]


class _Heads(torch.autograd.Function):
    """Autograd sees one step from heads to heads: the changes of shape are no nodes of the graph."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        triton_backend._keep(ctx, inputs, None)
        q, k, *rest = inputs
        return triton_backend._bare(joined(q), joined(k), *rest)  # type: ignore[no-any-return]

    @staticmethod
    @backward_survives("qk_norm_rotary")
    def backward(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return triton_backend._again(ctx, dq_out, dk_out, laid_out=joined)
        return triton_backend._gradients(ctx, _backward, dq_out, dk_out)


def _backward(dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    dq, dk, dqw, dkw = _ready.call(dq_out, dk_out, joined(q), joined(k), *rest)
    return split(dq, q.shape[3]), split(dk, q.shape[3]), dqw, dkw


_ready = Planned(triton_backend._backward, triton_backend.BACKWARD)
_eager = apply_of(_Heads)
