"""``activation(gate) · up`` as functions and ops: of two tensors, of the halves of one, before a linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from twinkle.ops.derivative import Derivative, apply_of, define_op, through_definition
from twinkle.ops.failures import backward_survives
from twinkle.ops.launch import EAGER, REFERENCE, DispatchPath, dispatch_path, lazy_module
from twinkle.ops.layout import fresh, rows_of
from twinkle.ops.plans import Planned, Settled

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "by_kernel",
    "fused_by_kernel",
    "gated_activation",
    "gated_activation_fused",
    "gated_linear",
]

_kernels = lazy_module("twinkle.ops.gated_mlp.triton")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: torch.square(F.relu(x)),
    "sigmoid": torch.sigmoid,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "identity": lambda x: x,
    "swish": lambda x: x * torch.sigmoid(x),
}
"""What the kernel knows, by the canonical names of the matcher."""


def gated_activation(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    clamp: str = "none",
    limit: float | None = None,
    scale: float | None = None,
    exact: bool = False,
) -> Tensor:
    """``activation(gate) · up`` in one kernel.

    Args:
        gate: ``[..., intermediate]``.
        up: As ``gate``.
        activation: One of `ACTIVATIONS`.
        clamp: ``inputs``: the gate from above and up from both sides before; ``activated``: the
            activated gate instead.
        limit: Of the clamp.
        scale: On the gate before the activation.
        exact: In float32 throughout, rounded once.

    Returns:
        ``[..., intermediate]``, of the dtype of the gate.

    Raises:
        ValueError: The activation is not one of `ACTIVATIONS`.
    """
    _check(activation)
    made = by_kernel(gate, up, activation, clamp, limit, scale, exact)
    return definition(gate, up, activation, clamp, limit, scale, exact) if made is None else made


def by_kernel(
    gate: Tensor,
    up: Tensor,
    activation: str,
    clamp: str,
    limit: float | None,
    scale: float | None,
    exact: bool,
) -> Tensor | None:
    """As `gated_activation` where the kernel computes it: two tensors of one shape and dtype; else None."""
    path = _path.call(gate, up)
    if path is REFERENCE:
        return None
    if path is EAGER and not torch.is_grad_enabled():
        return _gated_bare(gate, up, activation, clamp, limit, scale, exact)
    if path is EAGER:
        return _gated(gate, up, activation, clamp, limit, scale, exact)
    return _op(gate, up, activation, clamp, limit, scale, exact)


def _path_for(gate: Tensor, up: Tensor) -> DispatchPath:
    """What computes with these tensors."""
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.dim() == 0:
        return REFERENCE
    return dispatch_path(gate, up)


_path = Settled(_path_for, "(Tensor gate, Tensor up) -> ")


def gated_activation_fused(
    gate_up: Tensor,
    activation: str = "silu",
    gate_half: int = 0,
    clamp: str = "none",
    limit: float | None = None,
    scale: float | None = None,
    exact: bool = False,
) -> Tensor:
    """As `gated_activation`, from the two halves of the last dimension; their gradient is one tensor.

    Args:
        gate_up: ``[..., 2 · intermediate]``.
        activation: One of `ACTIVATIONS`.
        gate_half: Which half is the gate.
        clamp: See `gated_activation`.
        limit: See `gated_activation`.
        scale: See `gated_activation`.
        exact: See `gated_activation`.

    Returns:
        ``[..., intermediate]``.
    """
    _check(activation)
    made = fused_by_kernel(gate_up, activation, gate_half, clamp, limit, scale, exact)
    if made is None:
        halves = gate_up.chunk(2, dim=-1)
        return definition(halves[gate_half], halves[1 - gate_half], activation, clamp, limit, scale, exact)
    return made


def fused_by_kernel(
    gate_up: Tensor,
    activation: str,
    gate_half: int,
    clamp: str,
    limit: float | None,
    scale: float | None,
    exact: bool,
) -> Tensor | None:
    """As `gated_activation_fused` where the kernel computes it: an even width; else None."""
    path = dispatch_path(gate_up)
    if path is REFERENCE or gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        return None
    if path is EAGER and not torch.is_grad_enabled():
        return _fused_bare(gate_up, activation, gate_half, clamp, limit, scale, exact)
    if path is EAGER:
        return _fused(gate_up, activation, gate_half, clamp, limit, scale, exact)
    return _fused_op(gate_up, activation, gate_half, clamp, limit, scale, exact)


def gated_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "silu",
    clamp: str = "none",
    limit: float | None = None,
    scale: float | None = None,
    exact: bool = False,
) -> Tensor:
    """``linear(activation(gate) · up)`` that keeps gate and up alone for backward, and not the product.

    Backward has gate and up at hand and writes the product again on its way: one more write of it
    instead of holding it from forward to backward in every layer.

    Args:
        gate: ``[..., intermediate]``, on the path `EAGER` (see ``launch.dispatch_path``).
        up: As ``gate``.
        weight: ``[hidden, intermediate]``.
        bias: ``[hidden]`` or None.
        activation: One of `ACTIVATIONS`.
        clamp: See `gated_activation`.
        limit: See `gated_activation`.
        scale: See `gated_activation`.
        exact: See `gated_activation`.

    Returns:
        ``[..., hidden]``.
    """
    _check(activation)
    return _gated_linear(gate, up, weight, bias, activation, clamp, limit, scale, exact)


def _check(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"no kernel for the activation {activation!r}; there are {', '.join(ACTIVATIONS)}")


def definition(
    gate: Tensor,
    up: Tensor,
    activation: str,
    clamp: str,
    limit: float | None,
    scale: float | None,
    exact: bool,
) -> Tensor:
    """The same in plain torch."""
    act = ACTIVATIONS[activation]
    if clamp == "inputs":
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)  # type: ignore[operator]
    if clamp == "activated":
        return act(gate).clamp(max=limit) * up.clamp(min=-limit, max=limit)  # type: ignore[operator]
    if exact:
        return (act(gate.float()) * up.float()).to(gate.dtype)
    return act(gate if scale is None else gate * scale) * up


# In these ``how`` is the activation, the clamp, its limit, the scale and whether it is exact.


def _forward(gate: Tensor, up: Tensor, *how: Any) -> Tensor:
    out, order = fresh(gate)
    tensors = (gate, up, out)
    if not (gate.is_contiguous() and up.is_contiguous()):
        tensors = (rows_of(gate, order), rows_of(up, order), rows_of(out, order))
    _kernels().forward(*tensors, *how)
    return out


def _backward(dout: Tensor, gate: Tensor, up: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    dgate, order = fresh(gate)
    dup = torch.empty_like(dgate)
    dout, gate, up, gate_rows, up_rows = (rows_of(x, order) for x in (dout, gate, up, dgate, dup))
    _kernels().backward(dout, gate, up, gate_rows, up_rows, *how)
    return dgate, dup


def _halves(gate_up: Tensor, gate_half: int) -> tuple[Tensor, Tensor]:
    halves = gate_up.chunk(2, dim=-1)
    return halves[gate_half], halves[1 - gate_half]


def _fused_forward(gate_up: Tensor, activation: str, gate_half: int, *how: Any) -> Tensor:
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    gate, up = _halves(rows_of(gate_up), gate_half)
    _kernels().forward(gate, up, rows_of(out), activation, *how)
    return out


def _fused_backward(dout: Tensor, gate_up: Tensor, activation: str, gate_half: int, *how: Any) -> Tensor:
    gradient = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    gate, up = _halves(rows_of(gate_up), gate_half)
    dgate, dup = _halves(rows_of(gradient), gate_half)
    _kernels().backward(rows_of(dout), gate, up, dgate, dup, activation, *how)
    return gradient


def _with_product(dout: Tensor, gate: Tensor, up: Tensor, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, and the result of forward again as ``[rows, intermediate]``."""
    product = torch.empty(dout.shape, dtype=gate.dtype, device=gate.device)
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    rows = (rows_of(x) for x in (gate, up, dgate, dup))
    _kernels().backward(dout, *rows, *how, out=product)
    return dgate, dup, product


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.rest = rest
        return F.linear(_gated_bare(gate, up, *rest), weight, bias)

    @staticmethod
    @backward_survives("gated_mlp")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            through = through_definition(
                lambda g, u, w: F.linear(definition(g, u, *ctx.rest), w), (gate, up, weight), (dy,)
            )
            dbias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
            return (*through, dbias, None, None, None, None, None)
        dy_rows = dy.reshape(-1, dy.shape[-1])
        dgate, dup, product = _backward_again.call(dy_rows @ weight, gate, up, *ctx.rest)
        dweight = dy_rows.t() @ product if ctx.needs_input_grad[2] else None
        dbias = dy_rows.sum(0) if ctx.needs_input_grad[3] else None
        return (dgate, dup, dweight, dbias, None, None, None, None, None)


_gated_linear = apply_of(_GatedLinear)


def _fused_definition(gate_up: Tensor, activation: str, gate_half: int, *rest: Any) -> Tensor:
    return definition(*_halves(gate_up, gate_half), activation, *rest)


_REST = "str clamp, float? limit, float? scale, bool exact"
_backward_again = Planned(
    _with_product,
    f"(Tensor dout, Tensor gate, Tensor up, str activation, {_REST}) -> (Tensor, Tensor, Tensor)",
)
_gated, _op, _gated_bare = define_op(
    "_Gated",
    f"gated_activation(Tensor gate, Tensor up, str activation, {_REST}) -> Tensor",
    _forward,
    lambda gate, up, *rest: fresh(gate)[0],
    Derivative(
        "gated_activation_backward(Tensor dout, Tensor gate, Tensor up, str activation, "
        f"{_REST}) -> (Tensor, Tensor)",
        _backward,
        lambda dout, gate, up, *rest: (fresh(gate)[0], fresh(gate)[0]),
        tensors=2,
        reference=definition,
    ),
)
_fused, _fused_op, _fused_bare = define_op(
    "_Fused",
    f"gated_activation_fused(Tensor gate_up, str activation, int gate_half, {_REST}) -> Tensor",
    _fused_forward,
    lambda gate_up, *rest: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
    Derivative(
        "gated_activation_fused_backward(Tensor dout, Tensor gate_up, str activation, "
        f"int gate_half, {_REST}) -> Tensor",
        _fused_backward,
        lambda dout, gate_up, *rest: gate_up.new_empty(gate_up.shape),
        tensors=1,
        reference=_fused_definition,
    ),
)
