"""LayerNorm by Triton: a function with the signature of its definition, and layers that call it.

    >>> from twinkle.ops.layer_norm.triton_backend import layer_class
    >>> layer_class(form, {"x": "input", "weight": "weight", "bias": "bias", "eps": 1e-5,
    ...                    "normalized_shape": (768,)})

A layer is an ``nn.Module`` with ``forward`` alone: it runs on the instance of the class it replaces.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import nn

from twinkle.ops.build import forward_class
from twinkle.ops.launch import DEFINITION, STRAIGHT, apply_of, define, route, through_definition
from twinkle.ops.layer_norm import reference, torch_backend
from twinkle.ops.layer_norm.reference import FORMS, LayerNormForm
from twinkle.ops.plain import pays

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor

__all__ = ["layer_class", "layer_norm", "supports"]

WIDEST = 65536
_LEAST = 1 << 23
"""Elements of the input below which torch's kernel runs: ours takes longer to launch than it saves."""
_FUSED = next(form for form in FORMS if form.name == "fused")


def supports(
    form: LayerNormForm, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why there is no kernel for a form and an instance, or None.

    It computes torch's own function, and a norm that is written out in float32 and rounded at its end.
    """
    if form.written != "fused" and (reason := torch_backend.supports(form)) is not None:
        return reason
    shape = None if facts is None else facts.get("normalized_shape")
    if isinstance(shape, tuple) and len(shape) != 1:
        return f"it normalises over {len(shape)} dimensions"
    return None


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    form: LayerNormForm,
    normalized_shape: tuple[int, ...] = (),
) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) · w + b`` in float32, rounded once; see ``reference.layer_norm``.

    Small inputs, several dimensions, other dtypes and everything that :func:`twinkle.ops.launch.route` keeps
    from a kernel go to torch's own function.

    Args:
        x: ``[..., hidden]``, up to 65536 wide for the kernel.
        weight: ``[hidden]`` or None.
        bias: ``[hidden]`` or None.
        eps: Added to the variance.
        form: One that :func:`supports` has nothing against.
        normalized_shape: Of a ``fused`` form; the kernel needs the last dimension alone.

    Returns:
        ``[..., hidden]``, of the dtype of ``x``.
    """
    if form.affine != "both":
        bias = None
        weight = None if form.affine == "none" else weight
    if pays(x, _LEAST) and not x.is_nested:
        way = route(x, weight, bias)
        if way != DEFINITION and _accepts(x, weight, bias, form, normalized_shape):
            if way != STRAIGHT:
                return _op(x, weight, bias, eps)[0]
            if torch.is_grad_enabled():
                return _straight(x, weight, bias, eps)
            from twinkle.ops.layer_norm import triton as kernels

            return kernels.forward(x, weight, bias, eps, stats=False)[0]
    if form is _FUSED:  # what small inputs take, so straight
        return nn.functional.layer_norm(x, normalized_shape, weight, bias, eps)
    if form.written == "out":
        return torch_backend.layer_norm(x, weight, bias, eps, form=form)
    return reference.layer_norm(x, weight, bias, eps, form=form, normalized_shape=normalized_shape)


def _accepts(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    form: LayerNormForm,
    normalized_shape: tuple[int, ...],
) -> bool:
    """Whether the kernel takes tensors of these shapes and dtypes."""
    last = x.shape[-1:]
    if not last or not 0 < last[0] <= WIDEST:
        return False
    if form.written == "fused":
        if tuple(normalized_shape) != tuple(last):
            return False
        # Autocast makes float32 of everything, and mixed dtypes are torch's to refuse.
        only = x.dtype if form.compute == "input" else torch.float32
        if only != torch.float32 and torch.is_autocast_enabled(x.device.type):
            return False
    else:
        only = None
    for p in (weight, bias):
        if p is None:
            continue
        if p.shape != last or not p.is_contiguous() or (only is not None and p.dtype != only):
            return False
    return True


def _exactly(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    """What the kernel computes, whichever the form: in float32, rounded once."""
    with torch.autocast(x.device.type, enabled=False):
        w, b = (None if p is None else p.float() for p in (weight, bias))
        h = nn.functional.layer_norm(x.float(), x.shape[-1:], w, b, eps)
        return h.to(x.dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        from twinkle.ops.layer_norm import triton as kernels

        y, stats = kernels.forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from twinkle.ops.layer_norm import triton as kernels

        x, weight, bias, stats = ctx.saved_tensors
        if torch.is_grad_enabled():
            definition = functools.partial(_exactly, eps=ctx.eps)
            return (*through_definition(definition, (x, weight, bias), (dy,)), None)
        dx, dw, db, _ = ctx.needs_input_grad
        found = kernels.backward(dy, x, weight, bias, stats, input_grad=dx, weight_grad=dw, bias_grad=db)
        return (*found, None)


_straight = apply_of(_LayerNorm)


def _op_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    from twinkle.ops.layer_norm import triton as kernels

    return kernels.forward(x, weight, bias, eps)


def _fake_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty((2, rows), dtype=torch.float32)


def _op_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    from twinkle.ops.layer_norm import triton as kernels

    found = kernels.backward(
        dy, x, weight, bias, stats, input_grad=wanted[0], weight_grad=wanted[1], bias_grad=wanted[2]
    )
    first, second, third = (x.new_empty(0) if made is None else made for made in found)
    return first, second, third


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (
        p.new_empty(p.shape) if p is not None and is_wanted else x.new_empty(0)
        for p, is_wanted in zip((x, weight, bias), wanted, strict=True)
    )
    return first, second, third


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, output[1])


def _derivative(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    x, weight, bias, stats = ctx.saved_tensors
    wanted = [
        p is not None and need for p, need in zip((x, weight, bias), ctx.needs_input_grad[:3], strict=True)
    ]
    found = _backward_op(dy, x, weight, bias, stats, wanted)
    return (*(made if is_wanted else None for made, is_wanted in zip(found, wanted, strict=True)), None)


_backward_op = define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor)",
    _op_backward,
    _fake_backward,
)
_op = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    _op_forward,
    _fake_forward,
    setup=_setup,
    backward=_derivative,
)


def layer_class(form: LayerNormForm, facts: Mapping[str, Any]) -> type[nn.Module]:
    """A layer for a form whose attributes and arguments have the names that ``facts`` gives.

    Args:
        form: One that :func:`supports` has nothing against.
        facts: From the argument of the definition to the name of the attribute, for ``x`` of the argument of
            ``forward``, or the value itself.

    Returns:
        An ``nn.Module`` with ``forward`` alone; the same class for the same arguments.
    """
    return _layer_class(form, tuple(sorted(facts.items())))


@functools.cache
def _layer_class(form: LayerNormForm, facts: tuple[tuple[str, Any], ...]) -> type[nn.Module]:
    known = ("x", "weight", "bias", "eps", "normalized_shape")
    values = {"weight": None, "bias": None, **{name: value for name, value in facts if name in known}}
    return forward_class(
        f"LayerNorm_{form.name}", layer_norm, values, inputs=("x",), constants={"form": form}
    )
