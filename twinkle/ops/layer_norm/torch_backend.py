"""LayerNorm for layers that write it out, where triton has no kernel: torch's own function.

Layers that call it already are left alone there, and so is ``nn.LayerNorm``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from twinkle.ops import machine
from twinkle.ops.affine import affine_layers
from twinkle.ops.guarded import are_numbers, are_tensors, function_with
from twinkle.ops.layer_norm import reference
from twinkle.ops.plain import pays

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor

    from twinkle.ops.layer_norm.reference import LayerNormVariant

__all__ = ["function_for", "layer_class", "layer_norm", "may_lack", "rounds_as", "supports"]

_LEAST = 1 << 15
"""Elements from which torch's elementwise ops use several threads."""


def supports(
    variant: LayerNormVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why torch's kernel is not for a variant, or None: one that is written out, with the biased variance."""
    if variant.written == "out" and variant.variance != "std":
        return None
    return f"torch's own kernel is what it calls, or measures otherwise ({variant.name})"


def rounds_as(variant: LayerNormVariant, dtype: torch.dtype) -> bool:
    """Whether a variant rounds but once, at its end, for inputs of a dtype: torch's kernels do."""
    if variant.variance == "std":
        return False
    if variant.written == "fused":
        once = variant.affine_place == "fused"
    else:
        once = variant.compute == "float32" and variant.cast == "after_weight"
    return once or dtype == torch.float32


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, variant: LayerNormVariant
) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) · w + b`` in float32, rounded once; see ``reference.layer_norm``.

    Args:
        x: ``[..., hidden]``.
        weight: ``[hidden]`` or None; one of other shape (a weight for each head) goes through the definition,
            as do other dtypes than that of ``x``, and everything under autocast.
            Half precision goes through the definition as well, where that rounds more than once.
        bias: As ``weight``.
        eps: Added to the variance.
        variant: One that :func:`supports` has nothing against.

    Returns:
        ``[..., hidden]``, of the dtype of ``x``.
    """
    made = _by_torch(x, weight, bias, eps, variant)
    return reference.layer_norm(x, weight, bias, eps, variant=variant) if made is None else made


def _by_torch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, variant: LayerNormVariant
) -> Tensor | None:
    """As `layer_norm` where torch's own function computes the same, else None."""
    weight = None if variant.affine == "none" else weight
    bias = bias if variant.affine == "both" else None
    last = x.shape[-1:]
    plain = all(p is None or (p.shape == last and p.dtype == x.dtype) for p in (weight, bias))
    # Autocast would give float32 where the definition gives the dtype of its input.
    plain = plain and rounds_as(variant, x.dtype) and x.dtype != torch.float64
    if plain and not _waits(x) and not torch.is_autocast_enabled(x.device.type):
        if x.dtype != torch.float32 and x.device.type == "cpu" and torch.is_grad_enabled():
            # On the CPU the sum over rows in its backward is in the dtype of the weight: on 96 rows in
            # bfloat16 it was off by 0.9 percent, the definition's by 0.3.
            w, b = (None if p is None else p.float() for p in (weight, bias))
            return F.layer_norm(x.float(), last, w, b, eps).to(x.dtype)
        return F.layer_norm(x, last, weight, bias, eps)
    return None


def may_lack(variant: LayerNormVariant, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a function that is a variant takes None for the weight or the bias that is None."""
    as_torch = variant.written == "fused" and variant.affine_place == "fused"
    if variant.nullable or (as_torch and not variant.weight_cast and not variant.one_plus):
        return True
    return (weight is not None or variant.affine == "none") and (bias is not None or variant.affine != "both")


def _attempt(
    x: Any, weight: Any = None, bias: Any = None, eps: Any = None, *, variant: LayerNormVariant
) -> Tensor | None:
    """What a call of a function gives here; None where the function is to run."""
    if not are_tensors(x, weight, bias) or not are_numbers(eps) or not may_lack(variant, weight, bias):
        return None
    return _by_torch(x, weight, bias, eps, variant)


def function_for(
    variant: LayerNormVariant, facts: Mapping[str, Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    """A function with the arguments of one that writes a LayerNorm out; see triton's for the arguments."""
    return function_with(original, _attempt, facts, {"variant": variant})


def _waits(x: Tensor) -> bool:
    """Its backward on the CPU waits for all threads however few the rows; the definition's then does not."""
    return (
        x.is_cpu
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not machine.one_thread()
        and not pays(x, _LEAST)
    )


layer_class = affine_layers("LayerNorm", layer_norm, "eps")
"""A layer for a variant whose attributes and arguments have the names that facts give."""
