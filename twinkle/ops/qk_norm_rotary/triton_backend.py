"""Norms of queries and keys and their rotation by Triton, with the signature of their definition."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from twinkle.ops.derivative import Derivative, define_op, through_definition
from twinkle.ops.launch import EAGER, REFERENCE, DispatchPath, dispatch_path, lazy_module
from twinkle.ops.layout import rows_of
from twinkle.ops.plans import Settled
from twinkle.ops.qk_norm_rotary import reference
from twinkle.ops.qk_norm_rotary.reference import QKNormRotaryVariant
from twinkle.ops.rms_norm import reference as norms
from twinkle.ops.rms_norm import triton_backend
from twinkle.ops.rms_norm.dtypes import result_dtype
from twinkle.ops.rotary import reference as rotations

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor

__all__ = ["qk_norm_rotary", "supports"]

_kernels = lazy_module("twinkle.ops.qk_norm_rotary.triton")
_NORMS = {variant.name: variant for variant in norms.VARIANTS}
_ROTATIONS = {variant.name: variant for variant in rotations.VARIANTS}
_LLAMA = QKNormRotaryVariant("llama_half_head", _NORMS["llama"], _ROTATIONS["half"])
MOST = 16384
"""Elements of one token's heads that a program holds."""


def supports(
    variant: QKNormRotaryVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why there is no kernel for a variant, or None: half-split pairs of all channels."""
    return None if _is_supported(variant) else f"there is no kernel for {variant.name}"


@functools.cache
def _is_supported(variant: QKNormRotaryVariant) -> bool:
    rotation = variant.rotary
    return (
        variant.norm.name in _NORMS
        and triton_backend.takes_weight_and_eps(variant.norm)
        and variant.norm.compute not in ("input", "fused", "fused_float32")
        and rotation.name in _ROTATIONS
        and rotation.pairs == "half"
        and rotation.part == "all"
        and rotation.tensors == 2
        and not rotation.inverse
        and not rotation.indexed
        and not rotation.sections
        and rotation.broadcast in ("argument", "1")
    )


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
    variant: QKNormRotaryVariant = _LLAMA,
) -> tuple[Tensor, Tensor]:
    """``rotary(norm(q), norm(k))`` by head; see ``reference.qk_norm_rotary`` for the arguments.

    Equal to the definition but where the order of the sum of squares moves the normalised value across a
    rounding boundary: one unit in the last place of that value. Tables that want a gradient go through the
    definition.

    Returns:
        ``[batch, heads, tokens, head_dim]`` and ``[batch, kv_heads, tokens, head_dim]``; in memory tokens
        come before heads, as after the definition's transpose.
    """
    path = REFERENCE
    if not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)):
        path = _path.call(q, k, q_weight, k_weight, cos, sin, head_dim, variant)
    if path is not REFERENCE:
        if variant.norm.weight == "none":
            q_weight = k_weight = None
        names = (variant.norm.name, variant.rotary.name, variant.over == "all")
        function = _eager if path is EAGER else _op
        if path is EAGER and not torch.is_grad_enabled():
            function = _bare
        return function(q, k, q_weight, k_weight, q_eps, k_eps, cos, sin, head_dim, *names)  # type: ignore[no-any-return]
    return reference.qk_norm_rotary(
        q, k, q_weight, k_weight, q_eps, k_eps, cos, sin, head_dim=head_dim, variant=variant
    )


def _accepts(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    variant: QKNormRotaryVariant,
) -> bool:
    width = cos.shape[-1] * (2 if variant.rotary.tables == "half" else 1)
    if q.dim() != 3 or k.dim() != 3 or cos.dim() != 3 or cos.shape != sin.shape or width != head_dim:
        return False
    if head_dim % 2 or q.dtype != k.dtype or cos.dtype != sin.dtype or q.shape[:2] != k.shape[:2]:
        return False
    if cos.shape[1] != q.shape[1] or cos.shape[0] not in (1, q.shape[0]) or q.shape[-1] > MOST:
        return False
    if (q_weight is None) != (k_weight is None):
        return False
    for x, w in ((q, q_weight), (k, k_weight)):
        if x.shape[-1] % head_dim:
            return False
        wanted = x.shape[-1] if variant.over == "all" else head_dim
        if w is not None and (w.shape != (wanted,) or not w.is_contiguous() or w.dtype != x.dtype):
            return False
    return True


def _path_for(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    variant: QKNormRotaryVariant,
) -> DispatchPath:
    """What computes with these tensors."""
    path = dispatch_path(q, k, q_weight, k_weight, cos, sin) if _is_supported(variant) else REFERENCE
    if path is REFERENCE or not _accepts(q, k, q_weight, k_weight, cos, sin, head_dim, variant):
        return REFERENCE
    return path


_path = Settled(
    _path_for,
    "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, int head_dim, "
    "object variant) -> ",
)


def _dtypes(
    q: Tensor, weight: Tensor | None, cos: Tensor, norm: str, rotation: str
) -> tuple[torch.dtype, ...]:
    """Of the norm's result, of the products of the rotation, of the result."""
    between = result_dtype(q, weight, _NORMS[norm])
    variant = _ROTATIONS[rotation]
    compute = torch.promote_types(between, cos.dtype) if variant.compute == "input" else torch.float32
    return between, compute, between if variant.cast != "none" else compute


def _empty(x: Tensor, head_dim: int, dtype: torch.dtype, rotation: str) -> Tensor:
    batch, tokens, channels = x.shape
    if _ROTATIONS[rotation].tables == "half":  # The definition ends in a concatenation.
        return torch.empty((batch, channels // head_dim, tokens, head_dim), dtype=dtype, device=x.device)
    made = torch.empty((batch, tokens, channels // head_dim, head_dim), dtype=dtype, device=x.device)
    return made.transpose(1, 2)


def _tables(cos: Tensor, sin: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    if cos.stride(-1) != 1 or sin.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return (cos, sin) if cos.shape[0] == batch else (cos.expand(batch, -1, -1), sin.expand(batch, -1, -1))


def _forward(
    q: Tensor,
    k: Tensor,
    qw: Tensor | None,
    kw: Tensor | None,
    q_eps: float,
    k_eps: float,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    norm: str,
    rotation: str,
    over_all: bool,
) -> tuple[Tensor, Tensor]:
    between, compute, out = _dtypes(q, qw, cos, norm, rotation)
    q_out, k_out = _empty(q, head_dim, out, rotation), _empty(k, head_dim, out, rotation)
    _kernels().forward(
        rows_of(q),
        rows_of(k),
        qw,
        kw,
        q_eps,
        k_eps,
        *_tables(cos, sin, q.shape[0]),
        q_out,
        k_out,
        over_all=over_all,
        norm=_NORMS[norm],
        between=between,
        compute=compute,
        one=_ROTATIONS[rotation].tables == "half",
    )
    return q_out, k_out


def _backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    qw: Tensor | None,
    kw: Tensor | None,
    q_eps: float,
    k_eps: float,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    norm: str,
    rotation: str,
    over_all: bool,
    weight_grad: bool,
) -> tuple[Tensor | None, ...]:
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    dq_out, dk_out = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq_out, dk_out))
    dqw, dkw = _kernels().backward(
        dq_out,
        dk_out,
        rows_of(q),
        rows_of(k),
        qw,
        kw,
        q_eps,
        k_eps,
        *_tables(cos, sin, q.shape[0]),
        rows_of(dq),
        rows_of(dk),
        over_all=over_all,
        norm=_NORMS[norm],
        one=_ROTATIONS[rotation].tables == "half",
        weight_grad=weight_grad,
    )
    return dq, dk, dqw, dkw


def _backward_apart(*inputs: Any) -> tuple[Tensor | None, ...]:
    """The same with the gradients of the weights in memory of their own: results of an op share none."""
    dq, dk, dqw, dkw = _backward(*inputs)
    return dq, dk, dqw, None if dkw is None else dkw.clone()


def _keep(ctx: Any, inputs: tuple[Any, ...], results: Any) -> None:
    q, k, qw, kw, q_eps, k_eps, cos, sin, *rest = inputs
    ctx.save_for_backward(q, k, qw, kw, cos, sin)
    ctx.eps, ctx.rest = (q_eps, k_eps), rest


def _gradients(ctx: Any, function: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    q, k, qw, kw, cos, sin = ctx.saved_tensors
    wanted = qw is not None and (ctx.needs_input_grad[2] or ctx.needs_input_grad[3])
    dq, dk, dqw, dkw = function(dq_out, dk_out, q, k, qw, kw, *ctx.eps, cos, sin, *ctx.rest, wanted)
    if not wanted:
        dqw = dkw = None
    return (dq, dk, dqw, dkw, *(None,) * 8)


def _again(
    ctx: Any, dq_out: Tensor, dk_out: Tensor, laid_out: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Tensor | None, ...]:
    *inputs, cos, sin = ctx.saved_tensors
    q_eps, k_eps = ctx.eps
    head_dim, norm, rotation, over_all = ctx.rest
    variant = QKNormRotaryVariant("", _NORMS[norm], _ROTATIONS[rotation], "all" if over_all else "head")

    def definition(q: Tensor, k: Tensor, qw: Tensor | None, kw: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k = laid_out(q), laid_out(k)
        return reference.qk_norm_rotary(
            q, k, qw, kw, q_eps, k_eps, cos, sin, head_dim=head_dim, variant=variant
        )

    return (*through_definition(definition, tuple(inputs), (dq_out, dk_out)), *(None,) * 8)


def _fake_forward(q: Tensor, k: Tensor, qw: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, _, cos, _, head_dim, norm, rotation, _ = rest
    out = _dtypes(q, qw, cos, norm, rotation)[-1]
    return _empty(q, head_dim, out, rotation), _empty(k, head_dim, out, rotation)


def _fake_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    qw: Tensor | None,
    kw: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    wanted = rest[-1] and qw is not None and kw is not None
    dqw, dkw = (torch.empty_like(w) if wanted and w is not None else None for w in (qw, kw))
    return q.new_empty(q.shape), k.new_empty(k.shape), dqw, dkw


BACKWARD = (
    "qk_norm_rotary_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor? qw, "
    "Tensor? kw, float q_eps, float k_eps, Tensor cos, Tensor sin, int head_dim, str norm, str rotation, "
    "bool over_all, bool weight_grad) -> (Tensor, Tensor, Tensor, Tensor)"
)
_eager, _op, _bare = define_op(
    "_QKNormRotary",
    "qk_norm_rotary(Tensor q, Tensor k, Tensor? qw, Tensor? kw, float q_eps, float k_eps, Tensor cos, "
    "Tensor sin, int head_dim, str norm, str rotation, bool over_all) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    Derivative(
        BACKWARD,
        _backward,
        _fake_backward,
        op_backward=_backward_apart,
        keep=_keep,
        gradients=_gradients,
        again=_again,
    ),
)
