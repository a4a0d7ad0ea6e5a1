"""RMSNorm on the CPU in plain torch: the definition's steps in chunks of rows that stay in the cache.

The result is that of the definition bit for bit. The gradients are computed in float32 and rounded once, from
the input and one number a row: nothing else is kept for them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from twinkle.ops import machine
from twinkle.ops.build import forward_class, once_for
from twinkle.ops.derivative import through_definition
from twinkle.ops.failures import backward_survives
from twinkle.ops.guarded import are_numbers, are_tensors, function_with
from twinkle.ops.layout import like, rows_of
from twinkle.ops.plain import chunk_rows, chunks, paying_from, pays, runs_eagerly
from twinkle.ops.rms_norm import reference
from twinkle.ops.rms_norm.dtypes import roundings
from twinkle.ops.rms_norm.reference import VARIANTS, RMSNormVariant, may_lack_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor, nn

__all__ = [
    "LEAST",
    "LEAST_INFERENCE",
    "function_for",
    "layer_class",
    "normalise",
    "rms_norm",
    "supports",
]

LEAST, LEAST_INFERENCE = 1 << 18, 1 << 22
"""Elements below which the definition is as fast: everything is in the cache, and its nodes cost less.
Without gradients it is as fast at any size where several threads share the rows, and for one thread it was
1.8 times as fast at 2^20 in float32, where at 2^22 the chunks were 3.5 times as fast
(docs/decisions/0032)."""
_NAMES = {variant.name: variant for variant in VARIANTS}


def supports(
    variant: RMSNormVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why a variant is not computed here, or None: all of it is to be in float32."""
    if facts is not None and facts.get("bias") is not None:
        return "nothing for an RMSNorm with a bias"
    if variant.compute not in ("float32", "promoted"):
        return f"not faster than the definition where it computes in {variant.compute}"
    if variant.statistic != "mean" or variant.eps_place != "mean":
        return f"nothing for what is not divided by the root of a mean and eps ({variant.name})"
    if variant.gate == "none" and variant.groups != "always" and variant.weight_place == "after":
        return None
    return f"nothing for gates, groups, or a weight before the norm ({variant.name})"


_SUPPORTED = frozenset(name for name, variant in _NAMES.items() if supports(variant) is None)


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
    normalized_shape: tuple[int, ...] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · w``, rounded as ``variant`` says.

    The arguments are those of ``reference.rms_norm``. With a gate, groups or a normalized shape the
    definition runs.

    Returns:
        ``[..., hidden]``, equal to the definition's.
    """
    if group_size is None and bias is None:
        made = _in_chunks(x, weight if with_weight else None, eps, variant)
        if made is not None:
            return made
    return reference.rms_norm(
        x,
        weight,
        eps,
        variant=variant,
        gate=gate,
        activation=activation,
        group_size=group_size,
        with_weight=with_weight,
        normalized_shape=normalized_shape,
        bias=bias,
    )


def _in_chunks(x: Tensor, weight: Tensor | None, eps: float, variant: RMSNormVariant) -> Tensor | None:
    """As `rms_norm` where chunks are faster than the definition, else None."""
    if not pays(x, LEAST) or variant.name not in _SUPPORTED or not runs_eagerly(x, weight):
        return None
    if weight is not None and weight.shape != x.shape[-1:]:
        return None
    if variant.weight == "none":
        weight = None
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        made: Tensor = _RMSNorm.apply(x, weight, eps, variant)
        return made
    if pays(x, LEAST_INFERENCE) and machine.one_thread():
        return normalise(x, weight, eps, variant)[0]
    return None


def _attempt(x: Any, weight: Any = None, eps: Any = None, *, variant: RMSNormVariant) -> Tensor | None:
    """What a call of a function gives here; None where the function is to run."""
    if not are_tensors(x, weight) or not are_numbers(eps):
        return None
    if weight is None and not may_lack_weight(variant):
        return None  # the function has no path for that, and raises
    return _in_chunks(x, weight, eps, variant)


def function_for(
    variant: RMSNormVariant, facts: Mapping[str, Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    """A function with the arguments of one that is an RMSNorm; the arguments are those of triton's."""
    made = function_with(original, _attempt, facts, {"variant": variant})
    return paying_from(made, facts.get("x"), LEAST, LEAST_INFERENCE)


def normalise(x: Tensor, weight: Tensor | None, eps: float, variant: RMSNormVariant) -> tuple[Tensor, Tensor]:
    """The result, and the factor (or divisor) of each row as ``[rows, 1]`` in float32."""
    scale = None if weight is None else reference._scale(weight, variant)
    normal, _, _, out = roundings(variant, x.dtype, None if weight is None else weight.dtype)
    y, y_rows, order = like(x, out)
    x_rows = rows_of(x, order)
    rows, width = x_rows.shape
    roots = torch.empty(rows, 1, dtype=torch.float32)
    buffer = torch.empty(chunk_rows(rows, width), width, dtype=torch.float32)
    divide = variant.inverse == "divide"
    wide = torch.empty_like(buffer) if x.dtype != torch.float32 else None
    rounded = (
        torch.empty_like(buffer, dtype=normal) if scale is not None and normal != torch.float32 else None
    )
    for start, stop in chunks(rows, width):
        h, free, to = x_rows[start:stop], buffer[: stop - start], y_rows[start:stop]
        if wide is not None:
            h = wide[: stop - start].copy_(h)
        root = torch.mul(h, h, out=free).mean(-1, keepdim=True).add_(eps)
        root = root.sqrt_() if divide else root.rsqrt_()
        roots[start:stop] = root
        n = torch.div(h, root, out=free) if divide else torch.mul(h, root, out=free)
        if scale is None:
            to.copy_(n)
        elif rounded is not None:
            torch.mul(rounded[: stop - start].copy_(n), scale, out=to)
        elif to.dtype == torch.float32:
            torch.mul(n, scale, out=to)
        else:
            to.copy_(n.mul_(scale))
    return y, roots


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, roots: Tensor, variant: RMSNormVariant, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    dx, dx_rows, order = like(x)
    x_rows, dy_rows = rows_of(x, order), rows_of(dy, order)
    rows, width = x_rows.shape
    scale = None if weight is None else reference._scale(weight, variant).float()
    # A float32 sum over very many chunks would lose digits that the definition's own sum keeps.
    dw = torch.zeros(width, dtype=torch.float64) if weight is not None and weight_grad else None
    first, second, third = torch.empty(3, chunk_rows(rows, width), width, dtype=torch.float32)
    for start, stop in chunks(rows, width):
        n, g, free = first[: stop - start], second[: stop - start], third[: stop - start]
        root = roots[start:stop]
        if variant.inverse == "divide":
            root = root.reciprocal()
        if x.dtype == torch.float32:
            torch.mul(x_rows[start:stop], root, out=n)
        else:
            n.copy_(x_rows[start:stop]).mul_(root)
        given = dy_rows[start:stop]
        if given.dtype != torch.float32:
            given = g.copy_(given)
        product = torch.mul(given, n, out=free)
        if dw is not None:
            dw += product.sum(0)
        if scale is not None:
            dot = torch.mv(product, scale).unsqueeze_(1)
            scaled = torch.mul(given, scale, out=g)
        else:
            dot = product.sum(-1, keepdim=True)
            scaled = given
        torch.addcmul(scaled, n, dot, value=-1.0 / width, out=g)
        if dx.dtype == torch.float32:
            torch.mul(g, root, out=dx_rows[start:stop])
        else:
            dx_rows[start:stop] = g.mul_(root)
    return dx, None if dw is None or weight is None else dw.to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, variant: RMSNormVariant) -> Tensor:
        y, roots = normalise(x, weight, eps, variant)
        ctx.save_for_backward(x, weight, roots)
        ctx.eps, ctx.variant = eps, variant
        return y

    @staticmethod
    @backward_survives("rms_norm")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, roots = ctx.saved_tensors
        if torch.is_grad_enabled():
            definition = functools.partial(
                reference.rms_norm, eps=ctx.eps, variant=ctx.variant, with_weight=weight is not None
            )
            return (*through_definition(definition, (x, weight), (dy,)), None, None)
        with torch.autocast("cpu", enabled=False):
            return (*_backward(dy, x, weight, roots, ctx.variant, ctx.needs_input_grad[1]), None, None)


@once_for("x", "weight", "eps", "group_size", "with_weight", "bias")
def layer_class(variant: RMSNormVariant, facts: Mapping[str, Any]) -> type[nn.Module]:
    """A layer for a variant whose attributes and arguments have the names that ``facts`` gives.

    Args:
        variant: Where it rounds.
        facts: As for ``twinkle.ops.rms_norm.triton_backend.layer_class``.

    Returns:
        An ``nn.Module`` with ``forward`` alone; the same class for the same arguments.
    """
    made = forward_class(
        f"RMSNorm_{variant.name}",
        rms_norm,
        {"weight": None, **facts},
        inputs=("x",),
        constants={"variant": variant},
        absent_ok=("weight",) if variant.optional_weight else (),
    )
    paying_from(made.forward, facts.get("x"), LEAST, LEAST_INFERENCE)
    return made
