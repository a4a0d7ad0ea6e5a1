"""Function kernels: cheaper forms of functions, with the same arguments under the same names."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

__all__ = ["apply_rotary_pos_emb"]


def _turn(x: torch.Tensor, cos: torch.Tensor, sin_low: torch.Tensor, sin_high: torch.Tensor) -> torch.Tensor:
    """``[x1 * cos1 - x2 * sin_low, x2 * cos2 + x1 * sin_high]`` for the two halves of the last dimension.

    One full-size tensor and one of half the size are written, where the textbook form (slice, negate,
    concatenate, multiply, multiply, add) writes five. Each product is rounded before it is added, as there.
    """
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    out = x * cos
    product = high * sin_low
    out[..., :half].sub_(product)
    torch.mul(low, sin_high, out=product)
    out[..., half:].add_(product)
    return out


class _Rotary(torch.autograd.Function):
    """The rotation of queries and keys; its gradient is the rotation by the opposite angles."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        low, high = sin.chunk(2, dim=-1)
        return _turn(q, cos, low, high), _turn(k, cos, low, high)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        low, high = sin.chunk(2, dim=-1)
        needs_q, needs_k, *_ = ctx.needs_input_grad
        return (
            _turn(grad_q, cos, -high, -low) if needs_q else None,
            _turn(grad_k, cos, -high, -low) if needs_k else None,
            None,
            None,
        )


def _textbook(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _fits(x: torch.Tensor, cos: torch.Tensor) -> bool:
    """Whether the angles are spread over ``x`` and not ``x`` over the angles: its gradient is then no sum."""
    return (
        x.dtype == cos.dtype
        and x.dim() == cos.dim()
        and x.shape[-1] == cos.shape[-1]
        and x.shape[-1] % 2 == 0
        and all(angles in (1, size) for size, angles in zip(x.shape, cos.shape, strict=True))
    )


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their positions (half-split form, RoFormer, arXiv:2104.09864).

    Results and gradients are those of transformers' function, bit for bit, in float32 and in bfloat16.
    Where only the textbook form is right (a gradient for ``cos`` or ``sin``, mixed dtypes, shapes that spread
    ``q`` over the angles) or where a compiler fuses better, that form runs. Second derivatives are refused.

    Args:
        q: Queries, ``[batch, heads, tokens, head_dim]`` (or with heads and tokens swapped, see below).
        k: Keys, as ``q`` with their own number of heads.
        cos: Cosines of the angles, ``[batch or 1, tokens, head_dim]``.
        sin: Sines, as ``cos``.
        unsqueeze_dim: Where ``cos`` and ``sin`` get the dimension of the heads.

    Returns:
        The rotated queries and keys, with the shapes and dtypes of ``q`` and ``k``.
    """
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    constant = (
        not (cos.requires_grad or sin.requires_grad) and sin.shape == cos.shape and sin.dtype == cos.dtype
    )
    if torch.compiler.is_compiling() or not constant or not _fits(q, cos) or not _fits(k, cos):
        return _textbook(q, cos, sin), _textbook(k, cos, sin)
    return _Rotary.apply(q, k, cos, sin)
