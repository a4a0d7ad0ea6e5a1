"""RMSNorm by Triton: a function with the signature of its definition, and layers that call it.

    >>> from twinkle.ops.rms_norm.triton_backend import layer_class
    >>> layer_class(variant, {"x": "hidden_states", "weight": "weight", "eps": "variance_epsilon"})

A layer is an ``nn.Module`` with ``forward`` alone: it runs on the instance of the class it replaces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from twinkle.ops.build import forward_class, once_for
from twinkle.ops.derivative import Derivative, define_op
from twinkle.ops.guarded import are_numbers, are_tensors, function_with, is_row
from twinkle.ops.launch import EAGER, REFERENCE, DispatchPath, dispatch_path, lazy_module
from twinkle.ops.layout import like
from twinkle.ops.plain import pays
from twinkle.ops.plans import Settled
from twinkle.ops.rms_norm import reference
from twinkle.ops.rms_norm.dtypes import result_dtype
from twinkle.ops.rms_norm.reference import VARIANTS, RMSNormVariant, may_lack_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor, nn

__all__ = ["LEAST", "accepts", "function_for", "layer_class", "rms_norm", "supports", "takes_weight_and_eps"]

WIDEST = 65536
LEAST = 1 << 23
"""Elements below which a function that is a call of `F.rms_norm` runs, where torch has one kernel for that.

On an H200, forward and backward of 64 Mi elements: 0.18 ms instead of 0.32; on its host, at any size, 500 us
instead of 231.
"""
_TORCH_FUSES = hasattr(torch.ops.aten, "_fused_rms_norm")
_ONE_CALL = ("fused", "fused_unweighted")
_EPS = torch.finfo(torch.float32).eps
_kernels = lazy_module("twinkle.ops.rms_norm.triton")
_VARIANTS = {variant.name: variant for variant in VARIANTS}
_LLAMA = _VARIANTS["llama"]


def supports(
    variant: RMSNormVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why there is no kernel for a variant and an instance, or None (an ``optional`` group must be None)."""
    if facts is not None and facts.get("bias") is not None:
        return "no kernel for an RMSNorm with a bias"
    if facts is not None and facts.get("offset", 0.0) not in (0.0, 1.0):
        return f"no kernel for a weight and {facts['offset']}"
    if variant.gate == "none" and variant.groups != "always" and variant.weight_place in ("after", "fused"):
        return None
    return f"no kernel for gates, groups, or a weight before the norm ({variant.name})"


def takes_weight_and_eps(variant: RMSNormVariant, *, nullable: bool = False) -> bool:
    """Whether a kernel for more than the norm computes a variant: a root of a mean and eps, a weight.

    Args:
        variant: The variant.
        nullable: The kernel does without a weight that is None, also where the result is then rounded.
    """
    plain = variant.statistic == "mean" and variant.eps_place == "mean" and variant.scale == "none"
    return plain and supports(variant) is None and (nullable or variant.nullable != "cast")


_WITH_OFFSET = {
    (name, offset): _VARIANTS[name.replace("_offset", suffix)]
    for name, variant in _VARIANTS.items()
    if variant.weight == "offset"
    for offset, suffix in ((0.0, ""), (1.0, "_one_plus"))
}
_SUPPORTED = frozenset(name for name, variant in _VARIANTS.items() if supports(variant) is None)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float | None,
    *,
    variant: RMSNormVariant = _LLAMA,
    gate: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = F.silu,
    group_size: int | None = None,
    with_weight: bool = True,
    normalized_shape: tuple[int, ...] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    width: int | None = None,
    math_root: bool = False,
    offset: float = 0.0,
) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · w``, rounded as ``variant`` says.

    The arguments are those of ``reference.rms_norm``. In half precision the result is that of the definition
    except where the order of the sum of squares moves a value across a rounding boundary: at most one unit in
    the last place. Gradients are computed in float32 and rounded once, so they are nearer to the exact ones
    than autograd's.

    The kernel takes rows up to 65536 wide, and the last dimension alone as normalized shape. With a gate,
    groups or a bias the definition runs.

    Returns:
        ``[..., hidden]``.
    """
    if variant.weight == "offset" and offset in (0.0, 1.0):
        variant = _WITH_OFFSET[variant.name, float(offset)]
    if bias is None:
        made = _by_kernel(
            x, weight, eps, variant, group_size, with_weight, normalized_shape, scale, width, math_root
        )
        if made is not None:
            return made
    return reference.rms_norm(
        x,
        weight,
        eps,  # type: ignore[arg-type]  # None where torch's function takes it
        variant=variant,
        gate=gate,
        activation=activation,
        group_size=group_size,
        with_weight=with_weight,
        normalized_shape=normalized_shape,
        bias=bias,
        scale=scale,
        width=width,
        math_root=math_root,
        offset=offset,
    )


def _by_kernel(
    x: Tensor,
    weight: Tensor | None,
    eps: float | None,
    variant: RMSNormVariant,
    group_size: int | None,
    with_weight: bool,
    normalized_shape: tuple[int, ...] | None,
    scale: float | None,
    width: int | None,
    math_root: bool,
) -> Tensor | None:
    """As `rms_norm` where the kernel computes it, else None."""
    path = _path.call(x, weight, variant, group_size, normalized_shape)
    if path is REFERENCE:
        return None
    if variant.weight == "none" or not with_weight:
        weight = None
    if eps is None:
        eps = _EPS  # what torch's function takes where it computes in float32
    number = 1.0
    if variant.scale != "none":
        number = reference.number(x, scale, width, variant, math_root)
    elif variant.statistic == "sum":
        number = float(x.shape[-1] if width is None else width)
    if path is EAGER and not torch.is_grad_enabled():
        return _bare(x, weight, eps, variant.name, number)
    if path is EAGER:
        return _eager(x, weight, eps, variant.name, number)
    return _op(x, weight, eps, variant.name, number)


def _attempt(
    x: Any,
    weight: Any = None,
    eps: Any = None,
    *,
    variant: RMSNormVariant,
    normalized_shape: Any = None,
    scale: float | None = None,
    width: int | None = None,
    math_root: bool = False,
    offset: float = 0.0,
) -> Tensor | None:
    """What the kernel makes of a call of a function; None where the function is to run."""
    if not are_tensors(x, weight) or not is_row(normalized_shape, x):
        return None
    if not (are_numbers(eps) or (eps is None and variant.compute in ("fused", "fused_float32"))):
        return None
    if weight is None and not may_lack_weight(variant):
        return None  # the function has no path for that, and raises
    if variant.name in _ONE_CALL and _TORCH_FUSES and not pays(x, LEAST):
        return None
    if variant.weight == "offset":
        variant = _WITH_OFFSET[variant.name, float(offset)]
    return _by_kernel(x, weight, eps, variant, None, True, normalized_shape, scale, width, math_root)


def function_for(
    variant: RMSNormVariant, facts: Mapping[str, Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    """A function with the arguments of one that is an RMSNorm, which runs where the kernel does not.

    Args:
        variant: Where it rounds.
        facts: From the argument of the definition to Python text over the parameters, or the number itself.
        original: The function.
    """
    return function_with(original, _attempt, facts, {"variant": variant})


def accepts(
    x: Tensor,
    weight: Tensor | None,
    variant: RMSNormVariant,
    group_size: int | None,
    normalized_shape: tuple[int, ...] | None,
) -> bool:
    """Whether the kernel takes tensors of these shapes and dtypes."""
    if (
        variant.name not in _SUPPORTED
        or variant.weight == "offset"
        or group_size is not None
        or not 0 < x.shape[-1] <= WIDEST
    ):
        return False
    if weight is not None and (weight.shape != x.shape[-1:] or not weight.is_contiguous()):
        return False
    if variant.compute in ("fused", "fused_float32"):
        if normalized_shape is not None and len(normalized_shape) != 1:
            return False
        # Mixed dtypes: torch itself takes another way there, with other roundings.
        given = weight is not None and variant.weight_place == "fused" and variant.weight_cast == "none"
        return not given or weight.dtype == (x.dtype if variant.compute == "fused" else torch.float32)  # type: ignore[union-attr]
    # Autocast computes powers and roots in float32; the other variants have cast by themselves before.
    return variant.compute != "input" or not torch.is_autocast_enabled(x.device.type)


def _path_for(
    x: Tensor,
    weight: Tensor | None,
    variant: RMSNormVariant,
    group_size: int | None,
    normalized_shape: tuple[int, ...] | None,
) -> DispatchPath:
    """What computes with these tensors."""
    path = dispatch_path(x, weight)
    if path is REFERENCE or not accepts(x, weight, variant, group_size, normalized_shape):
        return REFERENCE
    return path


_path = Settled(
    _path_for, "(Tensor x, Tensor? weight, object variant, int? group_size, int[]? normalized_shape) -> "
)


def _forward(x: Tensor, weight: Tensor | None, eps: float, variant: str, number: float) -> Tensor:
    return _kernels().forward(x, weight, eps, _VARIANTS[variant], number=number)[0]


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, variant: str, number: float, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    dx, _, dw = _kernels().backward(
        dy, x, weight, eps, _VARIANTS[variant], weight_grad=weight_grad, number=number
    )
    return dx, dw


def _fake_forward(x: Tensor, weight: Tensor | None, eps: float, variant: str, number: float) -> Tensor:
    return like(x, result_dtype(x, weight, _VARIANTS[variant]))[0]


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, variant: str, number: float, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    wanted = weight is not None and weight_grad
    return like(x)[0], torch.empty_like(weight) if wanted else None


def _gradients(ctx: Any, function: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted = weight is not None and ctx.needs_input_grad[1]
    dx, dw = function(dy, x, weight, *ctx.rest, wanted)
    return dx, dw if wanted else None, None, None, None


def _reference(x: Tensor, weight: Tensor | None, eps: float, variant: str, number: float) -> Tensor:
    return reference.rms_norm(
        x,
        weight,
        eps,
        variant=_VARIANTS[variant],
        with_weight=weight is not None,
        scale=number,
        width=number,  # type: ignore[arg-type]  # a sum is divided by it
    )


_eager, _op, _bare = define_op(
    "_RMSNorm",
    "rms_norm(Tensor x, Tensor? weight, float eps, str variant, float number) -> Tensor",
    _forward,
    _fake_forward,
    Derivative(
        "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps, str variant, "
        "float number, bool weight_grad) -> (Tensor, Tensor)",
        _backward,
        _fake_backward,
        tensors=2,
        gradients=_gradients,
        reference=_reference,
    ),
)


@once_for(
    "x",
    "weight",
    "eps",
    "gate",
    "activation",
    "group_size",
    "with_weight",
    "normalized_shape",
    "bias",
    "scale",
    "width",
    "math_root",
    "offset",
)
def layer_class(variant: RMSNormVariant, facts: Mapping[str, Any]) -> type[nn.Module]:
    """A layer for a variant whose attributes and arguments have the names that ``facts`` gives.

    Args:
        variant: Where it rounds.
        facts: From the argument of the definition to the name of the attribute of the instance, or the
            name of the argument of ``forward`` for ``x`` (and ``gate``), or the number itself.

    Returns:
        An ``nn.Module`` with ``forward`` alone; the same class for the same arguments.
    """
    return forward_class(
        f"RMSNorm_{variant.name}",
        rms_norm,
        {"weight": None, **facts},
        inputs=("x", "gate"),
        optional=("gate",),
        constants={"variant": variant},
        absent_ok=("weight",) if variant.optional_weight else (),
    )
