"""The routed gated MLP as a function and as an op: sorted by expert, two grouped products, a weighted sum.

Between forward and backward only the fused projection is kept, besides the inputs: the rows gathered for
each expert, their activation and what the experts gave are computed or gathered again. The gradient of a
routing weight is taken where the rows are ``intermediate`` wide: ``<dy, down a> = <downᵀ dy, a>``.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from twinkle.ops.derivative import Derivative, define_op, through_definition
from twinkle.ops.experts import products, reference
from twinkle.ops.experts.gating import Gating
from twinkle.ops.gated_mlp.activation import ACTIVATIONS

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from twinkle.ops.experts.reference import ExpertsVariant

__all__ = ["experts"]

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_VARIANTS = {variant.name: variant for variant in reference.VARIANTS}


def experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    variant: ExpertsVariant,
    gating: Gating,
) -> Tensor:
    """As ``reference.experts``, for tensors of one dtype.

    Args:
        x: ``[tokens, hidden]``.
        indices: ``[tokens, k]``.
        weights: ``[tokens, k]``, of any dtype.
        gate_up: ``[experts, 2 · intermediate, hidden]``, or with the last two exchanged, as ``variant`` says.
        down: ``[experts, hidden, intermediate]``, or with the last two exchanged.
        gate_up_bias: ``[experts, 2 · intermediate]`` or None.
        down_bias: ``[experts, hidden]`` or None.
        variant: How they are laid out.
        gating: ``gating.gating_of`` the variant.

    Returns:
        ``[tokens, hidden]``.
    """
    tensors = (x, indices, weights, gate_up, down, gate_up_bias, down_bias)
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    rest = (variant.name, *gating)
    if traced:
        return _op(*tensors, *rest)[0]
    if torch.is_grad_enabled():
        return _eager(*tensors, *rest)
    return _forward(*tensors, *rest)[0]


def runs(indices: Tensor, *tensors: Tensor | None) -> bool:
    """Whether :func:`experts` takes these indices and other tensors.

    Not those of other devices and dtypes, tensor subclasses, nor under a transform of ``torch.func``.
    """
    compiling = torch.compiler.is_compiling()
    traced = compiling or torch._C._len_torch_dispatch_stack() > 0
    if not compiling and torch._C._are_functorch_transforms_active():
        return False
    device = indices.device
    if device.type not in ("cuda", "cpu") or not (traced or type(indices) in _PLAIN):
        return False
    return all(
        x is None or (x.device == device and x.dtype in _DTYPES and (traced or type(x) in _PLAIN))
        for x in tensors
    )


def _layout(gate_up: Tensor, down: Tensor, variant: ExpertsVariant) -> tuple[Tensor, Tensor]:
    """Both as ``[experts, in, out]``."""
    return (gate_up, down) if variant.transposed else (gate_up.transpose(1, 2), down.transpose(1, 2))


def _forward(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    variant: str,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, the fused projection ``[rows, 2 · intermediate]``, ``[3, rows]`` and ``[experts + 1]``."""
    first, second = _layout(gate_up, down, _VARIANTS[variant])
    number, k = first.shape[0], indices.shape[1]
    ids = _flat(indices)
    count = ids.numel()
    if count == 0 or x.numel() == 0 or first.numel() == 0:
        return _nothing(x, indices, gate_up, variant)
    step = products.steps(x.device)
    # Radix sort goes by the bytes of the key.
    small = ids.to(torch.int16 if number < 32767 else torch.int32)
    ordered, order = torch.sort(small, stable=True)
    bounds = torch.arange(number + 1, dtype=small.dtype, device=x.device)
    offsets = torch.searchsorted(ordered, bounds, out_int32=True)
    rows = step.invert(order, k)
    h = products.rows(_adjacent(x), first, offsets, count, rows[1])
    a = step.gate(h, gate_up_bias, ids, rows, offsets, Gating(*rest))
    y = products.rows(a, second, offsets, count)
    del a
    out = step.combine(y, _flat(weights), down_bias, ids, rows, offsets, k)
    return out, h, rows, offsets


def _nothing(x: Tensor, indices: Tensor, gate_up: Tensor, variant: str) -> tuple[Tensor, ...]:
    first = gate_up if _VARIANTS[variant].transposed else gate_up.transpose(1, 2)
    count = indices.numel()
    return (
        torch.zeros_like(x, memory_format=torch.contiguous_format),
        x.new_zeros((count, first.shape[2])),
        torch.zeros((3, count), dtype=torch.int32, device=x.device),
        torch.zeros(first.shape[0] + 1, dtype=torch.int32, device=x.device),
    )


def _fake_forward(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    first = gate_up if _VARIANTS[rest[3]].transposed else gate_up.transpose(1, 2)
    count = indices.numel()
    return (
        x.new_empty(x.shape),
        x.new_empty((count, first.shape[2])),
        x.new_empty((3, count), dtype=torch.int32),
        x.new_empty(first.shape[0] + 1, dtype=torch.int32),
    )


def _backward(
    dout: Tensor,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    h: Tensor,
    rows: Tensor,
    offsets: Tensor,
    want_x: bool,
    want_weights: bool,
    want_gate_up: bool,
    want_down: bool,
    variant: str,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weights, gate_up, down and the biases; None where none is wanted."""
    transposed = _VARIANTS[variant].transposed
    first, second = _layout(gate_up, down, _VARIANTS[variant])
    count, token = rows.shape[1], rows[1]
    ids, k = _flat(indices), indices.shape[1]
    if count == 0 or x.numel() == 0 or first.numel() == 0:
        biases = (None if b is None else torch.zeros_like(b) for b in (gate_up_bias, down_bias))
        given = ((x, want_x), (weights, want_weights), (gate_up, want_gate_up), (down, want_down))
        return (*(torch.zeros_like(t) if want else None for t, want in given), *biases)
    step = products.steps(x.device)
    flat = _flat(weights)
    dout, x = _adjacent(dout), _adjacent(x)
    dp = products.rows(dout, second.transpose(1, 2), offsets, count, token)
    dh, a, dweights = step.gate_backward(dp, h, gate_up_bias, ids, flat, rows, offsets, Gating(*rest))
    del dp
    dx = dgate_up = ddown = dgate_up_bias = ddown_bias = None
    if want_down:
        pair = (a, dout, offsets, None, token) if transposed else (dout, a, offsets, token, None)
        ddown = products.outer(*pair)
    del a
    if want_gate_up:
        pair = (x, dh, offsets, token, None) if transposed else (dh, x, offsets, None, token)
        dgate_up = products.outer(*pair)
    if want_x:
        dx = step.combine(
            products.rows(dh, first.transpose(1, 2), offsets, count), None, None, ids, rows, offsets, k
        )
    if gate_up_bias is not None:
        dgate_up_bias = step.sum_groups(dh, offsets, rows)
    if down_bias is not None:
        ddown_bias = step.sum_groups(dout, offsets, rows, token, flat)
        if want_weights:
            # What the bias adds to <dy, y>: the products with every expert's bias, those of the routed ones.
            each = dout.to(dweights.dtype) @ down_bias.to(dweights.dtype).t()
            chosen = each.gather(1, indices.clamp(max=each.shape[1] - 1))
            dweights = dweights + chosen.where(indices < each.shape[1], 0).reshape(-1)
    dweights = dweights.to(weights.dtype).view(weights.shape) if want_weights else None
    return dx, dweights, dgate_up, ddown, dgate_up_bias, ddown_bias


def _fake_backward(dout: Tensor, x: Tensor, indices: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    weights, gate_up, down, gate_up_bias, down_bias, _, _, _, *wanted = rest
    tensors = (x, weights, gate_up, down, gate_up_bias, down_bias)
    return tuple(
        t.new_empty(t.shape) if t is not None and want else None
        for t, want in zip(tensors, (*wanted[:4], True, True), strict=True)
    )


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous()  # columns of a wider tensor have a view with gaps


def _gradients(ctx: Any, function: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    found = function(dout, *ctx.saved_tensors, needs[0], *needs[2:5], *ctx.rest)
    dx, dweights, dgate_up, ddown, dgate_up_bias, ddown_bias = (
        gradient if want else None for gradient, want in zip(found, (needs[0], *needs[2:7]), strict=True)
    )
    return dx, None, dweights, dgate_up, ddown, dgate_up_bias, ddown_bias, *[None] * len(ctx.rest)


def _again(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, indices, *tensors = ctx.saved_tensors[:7]
    definition = functools.partial(_definition, indices=indices, rest=ctx.rest)
    return *through_definition(definition, (x, None, *tensors), (dout,)), *[None] * len(ctx.rest)


def _definition(
    x: Tensor,
    _: None,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    indices: Tensor,
    rest: tuple[Any, ...],
) -> Tensor:
    gating = Gating(*rest[1:])
    return reference.experts(
        x,
        indices,
        weights,
        gate_up,
        down,
        gate_up.shape[0],
        ACTIVATIONS[gating.activation],
        variant=_VARIANTS[rest[0]],
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        limit=gating.limit,
        alpha=0.0 if gating.alpha is None else gating.alpha,
    )


_INPUTS = (
    "Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, "
    "Tensor? down_bias"
)
_REST = "str variant, str activation, str clamp, float? limit, float? alpha, bool exact, bool interleaved"
_eager, _op, _ = define_op(
    "_Experts",
    f"experts({_INPUTS}, {_REST}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    Derivative(
        f"experts_backward(Tensor dout, {_INPUTS}, Tensor h, Tensor rows, Tensor offsets, "
        f"bool want_x, bool want_weights, bool want_gate_up, bool want_down, {_REST}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _backward,
        _fake_backward,
        tensors=7,
        auxiliary=True,
        gradients=_gradients,
        again=_again,
    ),
    planned=False,  # sorts and products are between its launches
)
