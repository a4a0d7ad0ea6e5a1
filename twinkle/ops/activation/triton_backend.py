"""Elementwise activations by Triton: a function with the signature of its definition, and its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.ops.activation import reference
from twinkle.ops.activation.reference import VARIANTS, ActivationVariant
from twinkle.ops.build import forward_class, once_for
from twinkle.ops.derivative import Derivative, define_op
from twinkle.ops.guarded import function_with
from twinkle.ops.launch import EAGER, REFERENCE, dispatch_path, lazy_module
from twinkle.ops.plain import pays

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor, nn

__all__ = ["LEAST", "activation", "function_for", "layer_class", "supports"]

LEAST = {"relu2": 1 << 24, "quick_gelu": 1 << 20}
"""Elements below which torch's operators run: there they take less of the host than one launch of ours.

On the host of an H200, forward and backward: two operators 0.8 times as long as the kernel at 2^23 elements,
three about as long at 2^18. A GELU by ``tanh`` takes twice as long at every size.
"""

_kernels = lazy_module("twinkle.ops.activation.triton")
_VARIANTS = {variant.name: variant for variant in VARIANTS}


def supports(
    variant: ActivationVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why there is no kernel for a variant, or None: there is one for each."""
    return None if variant.name in _VARIANTS else f"{variant.name} is no variant of its definition"


def activation(x: Tensor, *, variant: ActivationVariant) -> Tensor:
    """The activation in one kernel; see ``reference.activation``.

    The result is rounded where torch's operators round it: it equals the definition's but where ``exp`` or
    ``erf`` lands on the other side of a rounding boundary. Gradients are float32, rounded once.
    Small tensors and those that are not contiguous go through the definition, and so does everything that
    :func:`twinkle.ops.launch.dispatch_path` keeps from a kernel.

    Args:
        x: Of any shape.
        variant: Which one.

    Returns:
        Of the shape and dtype of ``x``.
    """
    made = _by_kernel(x, variant)
    return reference.activation(x, variant=variant) if made is None else made


def _by_kernel(x: Tensor, variant: ActivationVariant) -> Tensor | None:
    """As `activation` where the kernel computes it, else None."""
    least = LEAST.get(variant.name)
    path = REFERENCE if least is not None and not pays(x, least) else dispatch_path(x)
    if path is REFERENCE or not x.is_contiguous():
        return None
    if path is not EAGER:
        return _op(x, variant.name)
    if torch.is_grad_enabled():
        return _eager(x, variant.name)
    return _bare(x, variant.name)


def _attempt(x: Any, *, variant: ActivationVariant, root: float | None = None) -> Tensor | None:
    """What the kernel makes of a call of a function; None where the function is to run."""
    return _by_kernel(x, variant) if isinstance(x, torch.Tensor) else None


def function_for(
    variant: ActivationVariant, facts: Mapping[str, Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    """A function with the arguments of one that is an activation, which runs where the kernel does not.

    Args:
        variant: Which one.
        facts: ``x``: the name of the parameter.
        original: The function.
    """
    return function_with(original, _attempt, facts, {"variant": variant})


def _forward(x: Tensor, kind: str) -> Tensor:
    y = torch.empty_like(x)
    _kernels().forward(x, y, kind)
    return y


def _backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    dx = torch.empty_like(x)
    _kernels().backward(dy.contiguous(), x, dx, kind)
    return dx


def _definition(x: Tensor, kind: str) -> Tensor:
    return reference.activation(x, variant=_VARIANTS[kind])


_eager, _op, _bare = define_op(
    "_Activation",
    "activation(Tensor x, str kind) -> Tensor",
    _forward,
    lambda x, kind: torch.empty_like(x),
    Derivative(
        "activation_backward(Tensor dy, Tensor x, str kind) -> Tensor",
        _backward,
        lambda dy, x, kind: torch.empty_like(x),
        tensors=1,
        reference=_definition,
    ),
)


@once_for("x")
def layer_class(variant: ActivationVariant, facts: Mapping[str, Any]) -> type[nn.Module]:
    """A layer for a variant.

    Args:
        variant: Which one.
        facts: ``x``: the name of the argument of ``forward``.

    Returns:
        An ``nn.Module`` with ``forward`` alone; the same class for the same arguments.
    """
    return forward_class(
        f"Activation_{variant.name}", activation, facts, inputs=("x",), constants={"variant": variant}
    )
