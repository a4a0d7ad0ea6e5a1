"""Mixture of experts as a layer, with the signature of its definition."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import nn

from twinkle.ops.backends import layer_for
from twinkle.ops.build import forward_class, once_for
from twinkle.ops.experts import op, reference
from twinkle.ops.experts.gating import gating_of
from twinkle.ops.experts.reference import VARIANTS, ExpertsVariant
from twinkle.ops.gated_mlp.activation import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor

__all__ = ["Experts", "experts", "layer_class", "supports"]

_VARIANTS = {variant.name: variant for variant in VARIANTS}
# What a caller may have asked transformers for; the others are kernels of their own, chosen on purpose.
_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")


def supports(
    variant: ExpertsVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why there is no kernel for a variant and an instance, or None."""
    if variant.name not in _VARIANTS or variant.norm or variant.float32:
        return f"no kernel for a norm behind the experts, nor for arithmetic all in float32 ({variant.name})"
    facts = facts or {}
    activation, implementation = facts.get("activation", "silu"), facts.get("implementation")
    if activation not in ACTIVATIONS:
        return _unknown(activation)
    if implementation not in _IMPLEMENTATIONS:
        return f"the model was told to use {implementation!r} for its experts"
    return None


_SUPPORTED = frozenset(name for name, variant in _VARIANTS.items() if supports(variant) is None)


def _unknown(activation: str) -> str:
    return f"no kernel for the activation {activation!r}; there are {', '.join(ACTIVATIONS)}"


def experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    num_experts: int,
    activation: str = "silu",
    *,
    variant: ExpertsVariant = VARIANTS[0],
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float | None = None,
    alpha: float = 1.702,
    implementation: str | None = None,
) -> Tensor:
    """As ``reference.experts``, but for ``activation``: no host synchronisation, the sum in float32.

    The experts' results are rounded where the definition rounds; their weighted sum is computed in float32 in
    the order of ``indices`` and rounded once. The result is the same in every run.

    Args:
        x: ``[tokens, hidden]``.
        indices: ``[tokens, k]``; ``num_experts`` for a slot without expert.
        weights: ``[tokens, k]``.
        gate_up: ``[experts, 2 · intermediate, hidden]``, or with the last two exchanged.
        down: ``[experts, hidden, intermediate]``, or with the last two exchanged.
        num_experts: How many there are; those in ``gate_up`` count, which may have been spread since.
        activation: One of ``ACTIVATIONS`` of the gated activation.
        variant: How they are laid out.
        gate_up_bias: ``[experts, 2 · intermediate]`` of a variant with biases.
        down_bias: ``[experts, hidden]`` of a variant with biases.
        limit: Of a clamped variant.
        alpha: Of the ``swish`` gating.
        implementation: What transformers would run; its ``grouped_mm`` goes by the dtype of the weights, all
            others by autocast.

    Returns:
        ``[tokens, hidden]``.

    Raises:
        ValueError: The activation is not one of those.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(_unknown(activation))
    tensors = (indices, x, weights, gate_up, down, gate_up_bias, down_bias)
    usual = variant.name in _SUPPORTED and x.dim() == 2 and indices.dim() == 2 and gate_up.dtype == down.dtype
    if not usual or not op.runs(*tensors):
        return reference.experts(
            x,
            indices,
            weights,
            gate_up,
            down,
            gate_up.shape[0],
            ACTIVATIONS[activation],
            variant=variant,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            limit=limit,
            alpha=alpha,
        )
    kind, gating = x.device.type, gating_of(variant, activation, limit, alpha)
    autocast = torch.is_autocast_enabled(kind)
    follows = autocast and implementation != "grouped_mm"
    dtype = torch.get_autocast_dtype(kind) if follows else gate_up.dtype

    def cast(t: Tensor | None) -> Any:
        return None if t is None else t.to(dtype)

    with torch.autocast(kind, enabled=False) if autocast else contextlib.nullcontext():
        result = op.experts(
            cast(x),
            indices,
            weights,
            cast(gate_up),
            cast(down),
            cast(gate_up_bias),
            cast(down_bias),
            variant,
            gating,
        )
    return result.to(x.dtype)


class Experts(nn.Module):
    """For experts with ``gate_up_proj``, ``down_proj`` and a silu, as Mixtral's."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[tokens, hidden]`` and ``[tokens, k]`` twice to ``[tokens, hidden]``."""
        return experts(
            hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, self.num_experts
        )

    @staticmethod
    def for_variant(variant: ExpertsVariant, facts: Mapping[str, Any]) -> type[nn.Module] | str | None:
        """The layer for another variant and other names, or why there is none."""
        return layer_for("experts", variant, facts)


@once_for(
    "x",
    "indices",
    "weights",
    "gate_up",
    "down",
    "gate_up_bias",
    "down_bias",
    "num_experts",
    "limit",
    "alpha",
    "activation",
    "implementation",
)
def layer_class(variant: ExpertsVariant, facts: Mapping[str, Any]) -> type[nn.Module]:
    """A layer for a variant whose attributes and arguments have the names that ``facts`` gives.

    Args:
        variant: How the experts are laid out.
        facts: From the argument of the definition to the name of the attribute, or for ``x``, ``indices`` and
            ``weights`` of the argument of ``forward``, or the number itself; ``activation`` is the canonical
            name of the instance's, ``implementation`` what transformers would run.

    Returns:
        An ``nn.Module`` with ``forward`` alone; the same class for the same arguments.

    Raises:
        ValueError: There is no kernel for the activation, or another one was asked for by name.
    """
    if (why := supports(variant, facts=facts)) is not None:
        raise ValueError(why)
    objects = {"variant": variant, "activation": facts.get("activation", "silu")}
    objects["implementation"] = facts.get("implementation")
    return forward_class(
        f"Experts_{variant.name}",
        experts,
        {name: value for name, value in facts.items() if name not in objects},
        inputs=("x", "indices", "weights"),
        optional=("indices", "weights"),  # gpt_oss gives them the default None
        constants=objects,
    )
