"""Rotary position embedding by Triton: with the signature of its definition, and with any other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.ops.derivative import Derivative, define_op
from twinkle.ops.launch import EAGER, REFERENCE, dispatch_path, lazy_module
from twinkle.ops.rotary import given
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
    sums_dtype,
    turn_each,
    unscaled,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor

    from twinkle.ops.rotary.reference import RotaryVariant

__all__ = ["by_kernel", "function_for", "rotary", "supports"]

_kernels = lazy_module("twinkle.ops.rotary.triton")
_ONE = ("half", "first_half", "first_half_repeated", "repeated")
_PAIRS = {"half": 0, "interleaved": 1, "interleaved_to_half": 2, "complex": 3, "matrix": 4}


def supports(
    variant: RotaryVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why there is no kernel for a variant, or None."""
    if variant.compute == "float64" and variant.cast == "none":
        return "no kernel with results in float64"
    if variant.part in ("all", "first", "last"):
        return None
    return f"no kernel for {variant.pairs} pairs of {variant.part} channels"


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
    """As `rotary` where the kernel computes it, else None."""
    if variant.name not in _SUPPORTED or not isinstance(cos, torch.Tensor):
        return None
    variant = unscaled(variant, scale)
    columns = real_tables(q, cos, sin, variant)
    if columns is None:
        return None
    cos, sin = columns
    # No other kernel computes in float64.
    wide = columns if variant.pairs == "complex" else ()
    path = dispatch_path(q, k, v, *(() if wide else columns), wide=wide)
    if path is REFERENCE or (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)):
        return None
    found = plan(q, k, v, cos, sin, unsqueeze_dim, variant, position_ids, mrope_section, rotary_dim)
    if found is None:
        return None
    cos, sin, tokens_first = found
    factor = given.scale_of(scale, q, found, rotary_dim, variant) if variant.scaled else None
    if variant.scaled and factor is None:
        return None
    turned: Callable[..., Any] = _eager if path is EAGER else _op
    return turn_each(
        lambda x, other: turned(x, other, cos, sin, variant.name, tokens_first, q.dtype, factor),
        q,
        k,
        v,
        variant,
    )


rotary = or_definition(by_kernel)
"""``x · cos + rotate(x) · sin``; see ``reference.rotary`` for the arguments.

Equal to it bit for bit, gradients too; a complex product but for fused multiply-adds.
"""


def _eager(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    variant: str,
    tokens_first: bool,
    dtype: torch.dtype,
    scale: Tensor | None,
) -> tuple[Tensor, ...]:
    if not torch.is_grad_enabled():
        return _bare(q, k, cos, sin, variant, tokens_first, dtype, scale)  # type: ignore[no-any-return]
    return _differentiable(q, k, cos, sin, variant, tokens_first, dtype, scale)  # type: ignore[no-any-return]


def _four(x: Tensor, tokens_first: bool) -> Tensor:
    """``[batch, heads, tokens, channels]`` with adjacent channels."""
    if x.dim() == 3:
        x = x.unsqueeze(0)
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    return x.transpose(1, 2) if tokens_first else x


def _launch(
    x: tuple[Tensor, Tensor | None],
    outs: tuple[Tensor, Tensor | None],
    cos: Tensor,
    sin: Tensor,
    variant: RotaryVariant,
    tokens_first: bool,
    inputs: torch.dtype,
    scale: Tensor | None,
    back: bool,
) -> None:
    # Matrices of two tables hold the same numbers as the pairs that they turn.
    of_pairs = variant.pairs == "matrix" and variant.broadcast != "given"
    half = cos.shape[-1] if variant.tables in ("half", "repeated") else cos.shape[-1] // 2
    if cos.stride(-1) != sin.stride(-1) or cos.stride(-1) not in (1, 2):
        cos, sin = cos.contiguous(), sin.contiguous()
    first, second = (None if y is None else _four(y, tokens_first) for y in x)
    first_out, second_out = (None if y is None else _four(y, tokens_first) for y in outs)
    assert first is not None
    assert first_out is not None
    repeat = cos.shape[0] == 1 and first.shape[0] != 1
    _kernels().turn(
        first,
        second,
        first_out,
        second_out,
        cos.expand(first.shape[0], -1, -1) if repeat else cos,
        sin.expand(first.shape[0], -1, -1) if repeat else sin,
        pairs=_PAIRS["interleaved" if of_pairs else variant.pairs],
        one=variant.tables in _ONE,
        inverse=variant.inverse,
        half=half,
        start=x[0].shape[-1] - 2 * half if variant.part == "last" else 0,
        compute=compute_dtype(inputs, cos.dtype, variant),
        sums=sums_dtype(inputs, cos.dtype, variant),
        scale=None if scale is None else scale.expand(first.shape[0], -1, -1),
        back=back,
    )


def _forward(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    variant: str,
    tokens_first: bool,
    query: torch.dtype,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    q_out, k_out = _fake_forward(q, k, cos, sin, variant, tokens_first, query)
    outs = (q_out, None if k is None else k_out)
    _launch((q, k), outs, cos, sin, NAMED[variant], tokens_first, q.dtype, scale, False)
    return q_out, k_out


def _backward(
    dq: Tensor,
    dk: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    variant: str,
    tokens_first: bool,
    inputs: torch.dtype,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    outs = _fake_backward(dq, dk, cos, sin, variant, tokens_first, inputs)
    _launch((dq, dk), outs, cos, sin, NAMED[variant], tokens_first, inputs, scale, True)
    return outs


def _keep(ctx: Any, inputs: tuple[Any, ...], results: Any) -> None:
    q, k, cos, sin, variant, tokens_first, query, scale = inputs
    ctx.save_for_backward(cos, sin, scale)
    ctx.rest = (variant, tokens_first, q.dtype)
    ctx.two = k is not None
    ctx.shapes = (q.shape, None if k is None else k.shape, query)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, function: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
    cos, sin, scale = ctx.saved_tensors
    none = (None,) * 6
    dk = dk if ctx.two else None
    if dq is None:
        return (None, None if dk is None else function(dk, None, cos, sin, *ctx.rest, scale)[0], *none)
    found = function(dq, dk, cos, sin, *ctx.rest, scale)
    return (found[0], None if dk is None else found[1], *none)


def _again(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
    cos, sin, scale = ctx.saved_tensors
    found = gradients_with_graph(ctx, cos, sin, dq, dk if ctx.two else None, scale=scale)
    return (*found, *(None,) * 6)


def _fake_forward(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    variant: str,
    tokens_first: bool,
    query: torch.dtype,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Room for the results: an empty tensor where there is no ``k``."""
    kind = NAMED[variant]

    def room(x: Tensor) -> Tensor:
        return empty(x, out_dtype(x.dtype, cos.dtype, query, kind), kind)

    return room(q), q.new_empty(0) if k is None else room(k)


def _fake_backward(
    dq: Tensor,
    dk: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    variant: str,
    tokens_first: bool,
    inputs: torch.dtype,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    return empty(dq, inputs), None if dk is None else empty(dk, inputs)


_differentiable, _op, _bare = define_op(
    "_Rotary",
    "rotary(Tensor q, Tensor? k, Tensor cos, Tensor sin, str variant, bool tokens_first, ScalarType query, "
    "Tensor? scale=None) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    Derivative(
        "rotary_backward(Tensor dq, Tensor? dk, Tensor cos, Tensor sin, str variant, "
        "bool tokens_first, ScalarType inputs, Tensor? scale=None) -> (Tensor, Tensor)",
        _backward,
        _fake_backward,
        keep=_keep,
        gradients=_gradients,
        again=_again,
    ),
)


function_for = maker_of(rotary, by_kernel)
"""See :func:`twinkle.ops.rotary.call.maker_of`."""
