"""LayerNorm by Triton: a function with the signature of its definition, and layers that call it.

    >>> from twinkle.ops.layer_norm.triton_backend import layer_class
    >>> layer_class(variant, {"x": "input", "weight": "weight", "bias": "bias", "eps": 1e-5,
    ...                    "normalized_shape": (768,)})

A layer is an ``nn.Module`` with ``forward`` alone: it runs on the instance of the class it replaces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from twinkle.ops.affine import affine_layers, fake_backward, gradients, launched_backward
from twinkle.ops.derivative import Derivative, define_op
from twinkle.ops.guarded import are_numbers, are_tensors, function_with, is_row
from twinkle.ops.launch import EAGER, REFERENCE, DispatchPath, dispatch_path, lazy_module
from twinkle.ops.layer_norm import reference, torch_backend
from twinkle.ops.layer_norm.reference import VARIANTS, LayerNormVariant
from twinkle.ops.layer_norm.torch_backend import may_lack, rounds_as
from twinkle.ops.layout import channels_first
from twinkle.ops.plain import pays
from twinkle.ops.plans import Planned, Settled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor

__all__ = [
    "LEAST",
    "accepts",
    "across",
    "exactly",
    "function_for",
    "layer_class",
    "layer_norm",
    "supports",
    "takes_weight_and_eps",
]

WIDEST = 65536
_kernels = lazy_module("twinkle.ops.layer_norm.triton")
LEAST = 1 << 23
"""Elements of the input below which torch's kernel runs: ours takes longer to launch than it saves."""
_ACROSS = 2048  # Widest row of which the kernel holds several at once, to read what lies channels first.
_FUSED = next(variant for variant in VARIANTS if variant.name == "fused")


def supports(
    variant: LayerNormVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why there is no kernel for a variant and an instance, or None.

    It computes torch's own function, and a norm that is written out; in half precision one that is rounded
    at its end alone, in float32 all.
    """
    if variant.variance == "std":
        return f"no kernel for an unbiased deviation, with eps on it ({variant.name})"
    shape = None if facts is None else facts.get("normalized_shape")
    if isinstance(shape, tuple) and len(shape) != 1:
        return f"it normalises over {len(shape)} dimensions"
    return None


def takes_weight_and_eps(variant: LayerNormVariant) -> bool:
    """Whether a kernel for more than the norm computes a variant: plain weight and bias, one rounding."""
    plain = variant.affine_place == "fused" and not variant.one_plus
    return plain and supports(variant) is None and rounds_as(variant, torch.bfloat16)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    variant: LayerNormVariant,
    normalized_shape: tuple[int, ...] | None = None,
) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) · w + b`` in float32, rounded once; see ``reference.layer_norm``.

    Small inputs, several dimensions, other dtypes and everything that
    :func:`twinkle.ops.launch.dispatch_path` keeps from a kernel go to torch's own function.

    Args:
        x: ``[..., hidden]``, up to 65536 wide for the kernel.
        weight: ``[hidden]`` or None.
        bias: ``[hidden]`` or None.
        eps: Added to the variance.
        variant: One that :func:`supports` has nothing against.
        normalized_shape: Of a ``fused`` variant; the kernel needs the last dimension alone, which None is.

    Returns:
        ``[..., hidden]``, of the dtype of ``x``.
    """
    if variant.affine != "both":
        bias = None
        weight = None if variant.affine == "none" else weight
    made = _by_kernel(x, weight, bias, eps, variant, normalized_shape)
    if made is not None:
        return made
    if variant is _FUSED:  # what small inputs take, so straight
        return nn.functional.layer_norm(x, normalized_shape, weight, bias, eps)
    if variant.written == "out":
        return torch_backend.layer_norm(x, weight, bias, eps, variant=variant)
    return reference.layer_norm(x, weight, bias, eps, variant=variant, normalized_shape=normalized_shape)


def _by_kernel(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    variant: LayerNormVariant,
    normalized_shape: tuple[int, ...] | None,
) -> Tensor | None:
    """As `layer_norm` where the kernel computes it, else None."""
    if not pays(x, LEAST) or x.is_nested:
        return None
    path = _path.call(x, weight, bias, variant, normalized_shape)
    if path is REFERENCE:
        return None
    given = weight + 1 if variant.one_plus and weight is not None else weight
    if path is not EAGER:
        return _op(x, given, bias, eps)[0]
    if torch.is_grad_enabled():
        return _eager(x, given, bias, eps)
    return _inference.call(x, given, bias, eps)


def _attempt(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    eps: Any = None,
    *,
    variant: LayerNormVariant,
    normalized_shape: Any = None,
) -> Tensor | None:
    """What the kernel makes of a call of a function; None where the function is to run."""
    if not are_tensors(x, weight, bias) or not are_numbers(eps) or not is_row(normalized_shape, x):
        return None
    if not may_lack(variant, weight, bias):
        return None
    return _by_kernel(x, weight, bias, eps, variant, normalized_shape)


def function_for(
    variant: LayerNormVariant, facts: Mapping[str, Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    """A function with the arguments of one that is a LayerNorm, which runs where the kernel does not.

    Args:
        variant: One that :func:`supports` has nothing against.
        facts: From the argument of the definition to Python text over the parameters, or the number itself.
        original: The function.
    """
    return function_with(original, _attempt, facts, {"variant": variant})


def accepts(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    variant: LayerNormVariant,
    normalized_shape: tuple[int, ...] | None,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether the kernel takes tensors of these shapes and dtypes; ``dtype`` is that of a sum."""
    last = x.shape[-1:]
    if not last or not 0 < last[0] <= WIDEST or not rounds_as(variant, dtype or x.dtype):
        return False
    only = None
    if variant.written == "fused":
        if normalized_shape is not None and tuple(normalized_shape) != tuple(last):
            return False
        # Autocast makes float32 of everything, and mixed dtypes are torch's to refuse.
        computed = (dtype or x.dtype) if variant.compute == "input" else torch.float32
        if computed != torch.float32 and torch.is_autocast_enabled(x.device.type):
            return False
        if variant.affine_place == "fused" and not (variant.weight_cast or variant.nullable):
            only = computed
    for p in (weight, bias):
        if p is None:
            continue
        if p.shape != last or not p.is_contiguous() or (only is not None and p.dtype != only):
            return False
    return True


def _path_for(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    variant: LayerNormVariant,
    normalized_shape: tuple[int, ...] | None,
) -> DispatchPath:
    """What computes with these tensors."""
    path = dispatch_path(x, weight, bias)
    if path is REFERENCE or not accepts(x, weight, bias, variant, normalized_shape):
        return REFERENCE
    return path


_path = Settled(
    _path_for, "(Tensor x, Tensor? weight, Tensor? bias, object variant, int[]? normalized_shape) -> "
)


def across(x: Tensor) -> int | None:
    """The rows of a batch, for a tensor that lies channels first and is read so; else None.

    Args:
        x: ``[..., hidden]``.
    """
    return None if x.is_contiguous() or x.shape[-1] > _ACROSS else channels_first(x)


def exactly(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """What the kernel computes, whichever the variant: in float32, rounded once."""
    with torch.autocast(x.device.type, enabled=False):
        w, b = (None if p is None else p.float() for p in (weight, bias))
        h = nn.functional.layer_norm(x.float(), x.shape[-1:], w, b, eps)
        return h.to(x.dtype)


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return _kernels().forward(x, weight, bias, eps)  # type: ignore[no-any-return]


def _fake_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty((2, rows), dtype=torch.float32)


def _contiguous(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _without_stats(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _kernels().forward(x, weight, bias, eps, stats=False)[0]


_inference = Planned(_without_stats, "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor")
_eager, _op, _ = define_op(
    "_LayerNorm",
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    Derivative(
        "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, "
        "bool[] wanted) -> (Tensor, Tensor, Tensor)",
        launched_backward(_kernels),
        fake_backward(_contiguous),
        tensors=3,
        auxiliary=True,
        gradients=gradients(),
        reference=exactly,
    ),
)


layer_class = affine_layers("LayerNorm", layer_norm, "eps", "normalized_shape")
"""A layer for a variant whose attributes and arguments have the names that facts give."""
