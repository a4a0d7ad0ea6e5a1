"""The gated MLP by Triton: its activation and product in one kernel, its projections left to their layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from twinkle.ops.build import forward_class, once_for
from twinkle.ops.gated_mlp.activation import (
    ACTIVATIONS,
    by_kernel,
    fused_by_kernel,
    gated_activation,
    gated_activation_fused,
    gated_linear,
)
from twinkle.ops.gated_mlp.reference import VARIANTS, GatedMLPVariant
from twinkle.ops.guarded import are_tensors, function_with
from twinkle.ops.launch import EAGER, dispatch_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor

    Layer = Callable[[Tensor], Tensor]

__all__ = ["function_for", "gated_mlp", "layer_class", "supports"]

_VARIANTS = {variant.name: variant for variant in VARIANTS}
_SEPARATE = _VARIANTS["separate"]


def supports(
    variant: GatedMLPVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why there is no kernel for a variant and an instance, or None: any with an activation it knows."""
    if variant.name not in _VARIANTS:
        return f"{variant.name} is no variant of its definition"
    activation = None if facts is None else facts["activation"]
    if activation is None or activation in ACTIVATIONS:
        return None
    return f"no kernel for the activation {activation!r}; there are {', '.join(ACTIVATIONS)}"


def gated_mlp(
    x: Tensor,
    gate: Layer | None,
    up: Layer | None,
    down: Layer | None,
    activation: str,
    *,
    variant: GatedMLPVariant = _SEPARATE,
    gate_up: Layer | None = None,
    dropout: Layer | None = None,
    norm: Layer | None = None,
    limit: float | None = None,
    gate_scale: float = 1.0,
    output_scale: float = 1.0,
    factor: Tensor | float = 1.0,
    last_dropout: Layer | None = None,
    gate_last: bool = False,
    chunk_dim: int = -1,
    other: Tensor | None = None,
) -> Tensor:
    """``down(activation(gate(x)) · up(x))``; as ``reference.gated_mlp``, but for ``activation``.

    In half precision the product equals the definition's but where ``exp`` or ``erf`` lands on the other
    side of a rounding boundary: one unit in the last place. Gradients are rounded once, at the end.
    ``activation`` is one of ``triton.ACTIVATIONS``. Where ``down`` is a bare ``nn.Linear``, backward computes
    its input again instead of keeping it.

    Returns:
        ``[..., hidden]``.

    Raises:
        ValueError: The activation is not one of those.
    """
    scale = gate_scale if variant.scaled else None
    exact = variant.cast == "float32"
    keep = (variant.clamp, limit if variant.clamp != "none" else None, scale, exact)
    if variant.projections == "given":
        return gated_activation(x, other, activation, *keep)
    if variant.projections in ("fused", "none"):
        half = variant.gate_half if variant.gate_half != "flag" else int(gate_last)
        both = x if variant.projections == "none" else gate_up(x)  # type: ignore[misc]
        h = gated_activation_fused(both, activation, half, *keep)
    else:
        assert gate is not None
        assert up is not None
        g, u = gate(x), up(x)
        if (
            not (variant.norm or variant.dropout or variant.scaled or variant.last_dropout)
            and variant.down
            and _is_bare(down)
            and _may_recompute(g, u, down)
        ):
            return gated_linear(g, u, down.weight, down.bias, activation, *keep)  # type: ignore[union-attr]
        h = gated_activation(g, u, activation, *keep)
    if variant.factor:
        h = h * factor
    if variant.norm and norm is not None and variant.order == "norm_first":
        h = norm(h)
    if variant.dropout and dropout is not None:
        h = dropout(h)
    if variant.norm and norm is not None and variant.order == "dropout_first":
        h = norm(h)
    if variant.cast == "down_weight":
        weight = getattr(down, "weight", None)
        if isinstance(weight, torch.Tensor) and h.dtype != weight.dtype and weight.dtype != torch.int8:
            h = h.to(weight.dtype)
    if variant.down:
        h = down(h)  # type: ignore[misc]
    if variant.last_dropout and last_dropout is not None:
        h = last_dropout(h)
    return h * output_scale if variant.scaled else h


def _is_bare(layer: Any) -> bool:
    """A linear layer that nobody hooks into: its call is torch's `F.linear` and nothing else."""
    if type(layer) is not nn.Linear or nn.Linear.forward.__globals__ is not vars(torch.nn.modules.linear):
        return False
    own, everywhere = layer.__dict__, torch.nn.modules.module
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def _may_recompute(g: Tensor, u: Tensor, down: Any) -> bool:
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and (g.requires_grad or u.requires_grad)
        and down.weight.requires_grad  # a frozen layer keeps no input in the first place
        and not torch.is_autocast_enabled(g.device.type)
        and down.weight.dtype == g.dtype
        and dispatch_path(g, u, down.weight, down.bias) is EAGER
    )


def _attempt(x: Any, other: Any = None, *, activation: str, variant: GatedMLPVariant) -> Tensor | None:
    """What the kernel makes of a call of a function; None where the function is to run."""
    keep = ("none", None, None, variant.cast == "float32")
    if not are_tensors(x, other):
        return None
    if variant.projections != "given":
        return fused_by_kernel(x, activation, int(variant.gate_half), *keep)
    return None if other is None else by_kernel(x, other, activation, *keep)


def function_for(
    variant: GatedMLPVariant, facts: Mapping[str, Any], original: Callable[..., Any]
) -> Callable[..., Any] | None:
    """A function with the arguments of one that is a gated product, which runs where the kernel does not.

    Args:
        variant: One whose gate and up are given, as two tensors or as the halves of one.
        facts: ``x`` and ``other``: the names of parameters; ``activation``: its canonical name.
        original: The function.
    """
    if variant.projections not in ("none", "given") or supports(variant, facts=facts) is not None:
        return None
    names = {role: facts[role] for role in ("x", "other", "requires") if role in facts}
    return function_with(original, _attempt, names, {"variant": variant, "activation": facts["activation"]})


@once_for(
    "x",
    "other",
    "gate",
    "up",
    "down",
    "gate_up",
    "dropout",
    "norm",
    "limit",
    "gate_scale",
    "output_scale",
    "factor",
    "last_dropout",
    "gate_last",
    "activation",
)
def layer_class(variant: GatedMLPVariant, facts: Mapping[str, Any]) -> type[nn.Module]:
    """A layer for a variant whose attributes and arguments have the names that ``facts`` gives.

    Args:
        variant: What lies between the projections.
        facts: From the argument of the definition to the name of the attribute, or for ``x`` of the argument
            of ``forward``, or the number itself; ``activation`` is the canonical name of the instance's.

    Returns:
        An ``nn.Module`` with ``forward`` alone; the same class for the same arguments.

    Raises:
        ValueError: There is no kernel for the activation.
    """
    if (why := supports(variant, facts=facts)) is not None:
        raise ValueError(why)
    return forward_class(
        f"GatedMLP_{variant.name}",
        gated_mlp,
        {
            "gate": None,
            "up": None,
            "down": None,
            **{name: value for name, value in facts.items() if name != "activation"},
        },
        inputs=("x", "other"),
        constants={"variant": variant, "activation": facts["activation"]},
    )
