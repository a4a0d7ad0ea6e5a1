"""Rotary position embedding on the CPU in plain torch: no rotated copy, one node for the gradients.

``y = x · cos`` and two in-place products on its halves read and write a half of what the definition does.
In half precision these round once where the definition rounds the two products before it adds them.

Products of complex numbers and with matrices are computed in chunks of tokens, which stay in the cache from
the cast of the input to that of the result.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from twinkle.ops.failures import backward_survives
from twinkle.ops.plain import chunks, paying_from, pays, runs_eagerly
from twinkle.ops.rotary.call import (
    HALF,
    NAMED,
    compute_dtype,
    empty,
    gradients_with_graph,
    maker_of,
    or_definition,
    out_dtype,
    plan,
    real_tables,
    turn_each,
    unscaled,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor

    from twinkle.ops.rotary.reference import RotaryVariant

__all__ = ["LEAST", "LEAST_INFERENCE", "by_kernel", "function_for", "rotary", "supports"]

LEAST, LEAST_INFERENCE, _NEVER = 1 << 18, 1 << 19, 1 << 62
"""Elements of the query below which the definition is as fast, with and without gradients; in half precision
and without gradients it always is where only a part of the channels is turned (docs/decisions/0032)."""


def supports(
    variant: RotaryVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why a variant is not computed here, or None."""
    if variant.tables == "repeated" and variant.compute == "input":
        return "not faster than the definition in bfloat16"
    if variant.compute == "float64" and variant.cast == "none":
        return "nothing with results in float64"
    if variant.pairs == "complex" and variant.compute == "input":
        return "one product without a cast is as fast"
    if variant.pairs != "interleaved_to_half" and variant.part in ("all", "first", "last"):
        return None
    return f"nothing for {variant.pairs} pairs of {variant.part} channels"


_SUPPORTED = frozenset(name for name, variant in NAMED.items() if supports(variant) is None)


def by_kernel(
    q: Tensor,
    k: Tensor | None = None,
    cos: Any = None,
    sin: Any = None,
    unsqueeze_dim: int = 1,
    *,
    variant: RotaryVariant = HALF,
    v: Tensor | None = None,
    position_ids: Tensor | None = None,
    mrope_section: list[int] | None = None,
    rotary_dim: int | None = None,
    scale: Tensor | float = 1.0,
) -> Tensor | tuple[Tensor, ...] | None:
    """As `rotary` where it is computed here, else None."""
    variant = unscaled(variant, scale)
    if variant.scaled:
        return None
    grad = torch.is_grad_enabled()
    least = LEAST if grad else LEAST_INFERENCE
    if not grad and variant.part != "all" and q.dtype != torch.float32:
        least = _NEVER
    if variant.name not in _SUPPORTED or not isinstance(cos, torch.Tensor) or not pays(q, least):
        return None
    columns = real_tables(q, cos, sin, variant)
    if columns is None:
        return None
    cos, sin = columns
    wide = columns if variant.pairs == "complex" else ()
    if not runs_eagerly(q, k, v, *(() if wide else columns), wide=wide):
        return None
    if grad and (cos.requires_grad or sin.requires_grad):
        return None
    if variant.pairs in ("complex", "matrix") and not _is_faster(q.dtype, cos.dtype, variant, grad):
        return None
    found = plan(q, k, v, cos, sin, unsqueeze_dim, variant, position_ids, mrope_section, rotary_dim)
    if found is None:
        return None
    turned: Callable[..., Any] = _Rotary.apply if grad else _forward
    return turn_each(lambda x, other: turned(x, other, *found, variant, q.dtype), q, k, v, variant)


def _is_faster(x: torch.dtype, table: torch.dtype, variant: RotaryVariant, grad: bool) -> bool:
    """Whether a product of complex numbers or with matrices is faster here: where a cast is saved."""
    if variant.pairs == "complex":
        wide = compute_dtype(x, table, variant)
        return wide == torch.float64 or (grad and wide != x)
    return grad or variant.broadcast != "given" or x != torch.float32


rotary = or_definition(by_kernel)
"""``x · cos + rotate(x) · sin``; see ``reference.rotary`` for the arguments."""


def _halves(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _turn(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, compute: torch.dtype, variant: RotaryVariant, back: bool
) -> None:
    """Turn the channels of ``x`` that the tables are for into ``out``; copy the others."""
    if variant.pairs == "complex" or (variant.pairs == "matrix" and variant.broadcast == "given"):
        _multiply(x, out, cos, sin, compute, variant, back)
        return
    width = cos.shape[-1] * (2 if variant.tables in ("half", "repeated") else 1)
    part = width != x.shape[-1]
    if part:
        rest = x.shape[-1] - width
        if variant.part == "last":
            out[..., :rest] = x[..., :rest]
            x, out = x[..., rest:], out[..., rest:]
        else:
            out[..., width:] = x[..., width:]
            x, out = x[..., :width], out[..., :width]
    cos, sin = cos.to(compute), sin.to(compute)
    interleaved = variant.pairs != "half"
    if variant.tables == "full":
        sin1, sin2 = _halves(sin, interleaved)
    else:
        if variant.tables in ("first_half", "first_half_repeated"):
            cos, sin = cos[..., : width // 2], sin[..., : width // 2]
        cos = cos.repeat_interleave(2, dim=-1) if interleaved else torch.cat((cos, cos), dim=-1)
        sin1 = sin2 = sin
    x = x.to(compute)
    # In bfloat16 a product takes twice the time where its result is not laid out as its input is.
    straight_in = not part and out.dtype == compute and out.stride() == x.stride()
    y = torch.mul(x, cos, out=out) if straight_in else torch.mul(x, cos)
    (x1, x2), (y1, y2) = _halves(x, interleaved), _halves(y, interleaved)
    sign = 1.0 if variant.inverse else -1.0
    if back:
        sin1, sin2, sign = sin2, sin1, -sign
    y1.addcmul_(x2, sin1, value=sign)
    y2.addcmul_(x1, sin2, value=-sign)
    if y is not out:
        out.copy_(y)


def _multiply(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, compute: torch.dtype, variant: RotaryVariant, back: bool
) -> None:
    """The pairs of ``x`` times complex numbers or matrices into ``out``, in chunks of tokens."""
    if cos.shape[2] != 1 or cos.shape[1] != x.shape[1]:  # heads stand before tokens
        x, out, cos, sin = (tensor.transpose(1, 2) for tensor in (x, out, cos, sin))
    tokens, width = x.shape[1], x.shape[2] * x.shape[3]
    if variant.pairs == "complex":
        table = torch.complex(cos.to(compute), (-sin if back else sin).to(compute))
    else:
        table = _matrices(cos.to(compute), sin.to(compute), back)
    product = _complex_product if variant.pairs == "complex" else _matrix_product
    # Of a chunk there are two copies, and of complex128 each is twice as large.
    each = width * (4 if compute == torch.float64 else 2)
    for batch, (start, stop) in itertools.product(range(x.shape[0]), chunks(tokens, each)):
        factor = table[batch if table.shape[0] > 1 else 0, start:stop]
        product(x[batch, start:stop], factor, compute, out[batch, start:stop])


def _complex_product(x: Tensor, table: Tensor, compute: torch.dtype, out: Tensor) -> None:
    wide = torch.empty(x.shape, dtype=compute).copy_(x)
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(table)
    out.copy_(wide)


def _matrices(first: Tensor, second: Tensor, back: bool) -> Tensor:
    """``[..., channels / 2, 4]`` row by row, from the columns; transposed for gradients."""
    rows = torch.stack((first.unflatten(-1, (-1, 2)), second.unflatten(-1, (-1, 2))), -2 if back else -1)
    return rows.flatten(-2)


def _matrix_product(x: Tensor, table: Tensor, compute: torch.dtype, out: Tensor) -> None:
    x1, x2 = _halves(x.to(compute), True)
    y = torch.empty(x.shape, dtype=compute)
    y1, y2 = _halves(y, True)
    torch.mul(x1, table[..., 0], out=y1).addcmul_(x2, table[..., 1])
    torch.mul(x1, table[..., 2], out=y2).addcmul_(x2, table[..., 3])
    out.copy_(y)


def _wide(table: Tensor, rank: int, tokens_first: bool) -> Tensor:
    """A table of ``[batch, tokens, width]`` with the head dimension of a tensor of that rank."""
    table = table.unsqueeze(2 if tokens_first else 1)
    return table if rank == 4 else table[0]


def _forward(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    tokens_first: bool,
    variant: RotaryVariant,
    query: torch.dtype,
) -> tuple[Tensor, Tensor]:
    made = []
    for x in (q, k):
        if x is None:
            made.append(q.new_empty(0))
            continue
        wide = _wide(cos, x.dim(), tokens_first), _wide(sin, x.dim(), tokens_first)
        out = empty(x, out_dtype(x.dtype, cos.dtype, query, variant), variant)
        _turn(x, out, *wide, compute_dtype(x.dtype, cos.dtype, variant), variant, back=False)
        made.append(out)
    return made[0], made[1]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        tokens_first: bool,
        variant: RotaryVariant,
        query: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.rest = (variant.name, tokens_first, q.dtype)
        ctx.two = k is not None
        ctx.shapes = (q.shape, None if k is None else k.shape, query)
        ctx.set_materialize_grads(False)
        return _forward(q, k, cos, sin, tokens_first, variant, query)

    @staticmethod
    @backward_survives("rotary")
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dk = dk if ctx.two else None
        if torch.is_grad_enabled():
            return (*gradients_with_graph(ctx, cos, sin, dq, dk), None, None, None, None, None)
        name, tokens_first, dtype = ctx.rest
        variant = NAMED[name]
        found: list[Tensor | None] = []
        for dy in (dq, dk):
            if dy is None:
                found.append(None)
                continue
            dx = empty(dy, dtype)
            wide = _wide(cos, dy.dim(), tokens_first), _wide(sin, dy.dim(), tokens_first)
            _turn(dy, dx, *wide, compute_dtype(dtype, cos.dtype, variant), variant, back=True)
            found.append(dx)
        return (found[0], found[1], None, None, None, None, None)


_function_for = maker_of(rotary, by_kernel)


def function_for(
    variant: RotaryVariant, facts: Mapping[str, Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    """A function with the arguments of another; see :func:`twinkle.ops.rotary.call.maker_of`."""
    return paying_from(_function_for(variant, facts, original), facts.get("q"), LEAST, LEAST_INFERENCE)
