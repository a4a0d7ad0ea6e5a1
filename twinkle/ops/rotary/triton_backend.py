"""Rotary position embedding by Triton: with the signature of its definition, and with any other."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from twinkle.ops.build import once_for, plain_function
from twinkle.ops.derivative import Derivative, define_op, through_definition
from twinkle.ops.launch import EAGER, REFERENCE, dispatch_path, lazy_module
from twinkle.ops.rotary import given, reference
from twinkle.ops.rotary.reference import VARIANTS, RotaryVariant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor

__all__ = ["by_kernel", "function_for", "maker_of", "rotary", "supports"]

_kernels = lazy_module("twinkle.ops.rotary.triton")
_VARIANTS = {variant.name: variant for variant in VARIANTS}
_HALF = _VARIANTS["half"]
_ONE = ("half", "first_half", "first_half_repeated", "repeated")
_FACTS = (
    "q",
    "k",
    "cos",
    "sin",
    "unsqueeze_dim",
    "v",
    "position_ids",
    "mrope_section",
    "rotary_dim",
    "scale",
    "requires",
    "dense",
)
_PAIRS = {"half": 0, "interleaved": 1, "interleaved_to_half": 2}


def supports(
    variant: RotaryVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why there is no kernel for a variant, or None."""
    if variant.scaled:
        return "no kernel for a factor on both products"
    if variant.pairs in _PAIRS and variant.part in ("all", "first", "last"):
        return None
    return f"no kernel for {variant.pairs} pairs of {variant.part} channels"


_SUPPORTED = frozenset(name for name, variant in _VARIANTS.items() if supports(variant) is None)


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
    *,
    variant: RotaryVariant = _HALF,
    v: Tensor | None = None,
    position_ids: Tensor | None = None,
    mrope_section: list[int] | None = None,
    rotary_dim: int | None = None,
    scale: Tensor | float = 1.0,
    slice_last: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """``x · cos + rotate(x) · sin``; see ``reference.rotary`` for the arguments.

    Equal to it bit for bit, gradients too. Tables that want a gradient go through the definition.

    Returns:
        A tensor for a variant of one tensor, else a tuple.
    """
    made = by_kernel(
        q,
        k,
        cos,
        sin,
        unsqueeze_dim,
        variant=variant,
        v=v,
        position_ids=position_ids,
        mrope_section=mrope_section,
        rotary_dim=rotary_dim,
    )
    if made is not None:
        return made
    return reference.rotary(
        q,
        k,
        cos,
        sin,
        unsqueeze_dim,
        variant=variant,
        v=v,
        position_ids=position_ids,
        mrope_section=mrope_section,
        rotary_dim=rotary_dim,
        scale=scale,
        slice_last=slice_last,
    )


def by_kernel(
    q: Tensor,
    k: Tensor | None = None,
    cos: Any = None,
    sin: Any = None,
    unsqueeze_dim: int = 1,
    *,
    variant: RotaryVariant = _HALF,
    v: Tensor | None = None,
    position_ids: Tensor | None = None,
    mrope_section: list[int] | None = None,
    rotary_dim: int | None = None,
    scale: Tensor | float = 1.0,
) -> Tensor | tuple[Tensor, ...] | None:
    """As `rotary` where the kernel computes it, else None."""
    if variant.name not in _SUPPORTED or not isinstance(cos, torch.Tensor):
        return None
    path = dispatch_path(q, k, cos, sin, v)
    if path is REFERENCE or (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)):
        return None
    if variant.broadcast == "given":
        plan = given.plan(q, k, v, cos, sin, rotary_dim, variant)
    else:
        plan = _plan(q, k, cos, sin, unsqueeze_dim, variant, position_ids, mrope_section)
    if plan is None:
        return None
    cos, sin, tokens_first = plan
    turned: Callable[..., Any] = _eager if path is EAGER else _op
    count = variant.tensors if variant.broadcast != "given" else 1 + (k is not None) + (v is not None)
    if count == 1:
        return turned(q, None, cos, sin, variant.name, tokens_first, q.dtype)[0]
    results = turned(q, k, cos, sin, variant.name, tokens_first, q.dtype)
    if count == 2:
        return results[0], results[1]
    return (*results, turned(v, None, cos, sin, variant.name, tokens_first, q.dtype)[0])


def _plan(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int,
    variant: RotaryVariant,
    position_ids: Tensor | None,
    mrope_section: list[int] | None,
) -> tuple[Tensor, Tensor, bool] | None:
    """The tables as ``[batch or 1, tokens, width]``, and whether tokens stand before heads; else None."""
    rank = q.dim()
    if variant.indexed or variant.sections:
        narrow = reference.RotaryVariant(
            "", broadcast="none", indexed=variant.indexed, sections=variant.sections
        )
        cos = reference._table(cos, 0, position_ids, mrope_section, narrow, False)
        sin = reference._table(sin, 0, position_ids, mrope_section, narrow, False)
    if cos.shape != sin.shape or rank not in (3, 4) or cos.dtype != sin.dtype:
        return None
    if variant.tensors > 1 and (k is None or k.dim() != rank or k.dtype != q.dtype):
        return None
    width = cos.shape[-1]
    turned = 2 * width if variant.tables in ("half", "repeated") else width
    if turned > q.shape[-1] or turned % 2 or (variant.part == "all" and turned != q.shape[-1]):
        return None
    if variant.broadcast == "none":
        heads = -3
        lead = cos.dim()
        if lead > 3 and cos.shape[heads] == 1:
            cos, sin = cos.squeeze(heads), sin.squeeze(heads)
        elif lead > 2:
            return None
    else:
        place = unsqueeze_dim if variant.broadcast == "argument" else int(variant.broadcast)
        # The head dimension stands where the table is unsqueezed, counted from the end of q.
        heads = place - (cos.dim() + 1) if place >= 0 else place
    if heads not in (-2, -3) or cos.dim() not in (2, 3):
        return None
    tokens = -3 if heads == -2 else -2
    if cos.dim() == 2:
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
    batch = q.shape[0] if rank == 4 else 1
    if cos.shape[1] != q.shape[tokens] or cos.shape[0] not in (1, batch):
        return None
    if k is not None and variant.tensors > 1:
        other = k.shape[0] if rank == 4 else 1
        if other != batch or k.shape[tokens] != q.shape[tokens] or k.shape[-1] != q.shape[-1]:
            return None
    return cos, sin, heads == -2


def _eager(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    variant: str,
    tokens_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    if not torch.is_grad_enabled():
        return _forward(q, k, cos, sin, variant, tokens_first, dtype)
    return _differentiable(q, k, cos, sin, variant, tokens_first, dtype)  # type: ignore[no-any-return]


def _four(x: Tensor, tokens_first: bool) -> Tensor:
    """``[batch, heads, tokens, channels]`` with adjacent channels."""
    if x.dim() == 3:
        x = x.unsqueeze(0)
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    return x.transpose(1, 2) if tokens_first else x


def _compute(x: torch.dtype, table: torch.dtype, variant: RotaryVariant) -> torch.dtype:
    return torch.promote_types(x, table) if variant.compute == "input" else torch.float32


def _out_dtype(x: torch.dtype, table: torch.dtype, query: torch.dtype, variant: RotaryVariant) -> torch.dtype:
    turned = {"own": x, "query": query, "none": _compute(x, table, variant)}[variant.cast]
    return torch.promote_types(turned, x) if variant.part != "all" else turned


def _empty(x: Tensor, dtype: torch.dtype, variant: RotaryVariant | None = None) -> Tensor:
    # Elementwise results keep the strides of the input; variants that end in a concatenation do not.
    joined = variant is not None and (
        variant.part != "all" or variant.tables == "half" or variant.pairs == "interleaved_to_half"
    )
    out = torch.empty_like(
        x, dtype=dtype, memory_format=torch.contiguous_format if joined else torch.preserve_format
    )
    # The kernel wants channels side by side.
    return (
        out if out.stride(-1) == 1 or x.shape[-1] == 1 else torch.empty(x.shape, dtype=dtype, device=x.device)
    )


def _launch(
    x: tuple[Tensor, Tensor | None],
    outs: tuple[Tensor, Tensor | None],
    cos: Tensor,
    sin: Tensor,
    variant: RotaryVariant,
    tokens_first: bool,
    inputs: torch.dtype,
    back: bool,
) -> None:
    compute = _compute(inputs, cos.dtype, variant)
    half = cos.shape[-1] if variant.tables in ("half", "repeated") else cos.shape[-1] // 2
    if cos.stride(-1) != 1 or sin.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    first, second = (None if y is None else _four(y, tokens_first) for y in x)
    first_out, second_out = (None if y is None else _four(y, tokens_first) for y in outs)
    assert first is not None
    assert first_out is not None
    repeat = cos.shape[0] == 1 and first.shape[0] != 1
    _kernels().turn(
        first,
        second,
        first_out,
        second_out,
        cos.expand(first.shape[0], -1, -1) if repeat else cos,
        sin.expand(first.shape[0], -1, -1) if repeat else sin,
        pairs=_PAIRS[variant.pairs],
        one=variant.tables in _ONE,
        inverse=variant.inverse,
        half=half,
        start=x[0].shape[-1] - 2 * half if variant.part == "last" else 0,
        compute=compute,
        sums=inputs if variant.compute in ("input", "float32_each") else torch.float32,
        back=back,
    )


def _forward(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    variant: str,
    tokens_first: bool,
    query: torch.dtype,
) -> tuple[Tensor, Tensor]:
    q_out, k_out = _fake_forward(q, k, cos, sin, variant, tokens_first, query)
    outs = (q_out, None if k is None else k_out)
    _launch((q, k), outs, cos, sin, _VARIANTS[variant], tokens_first, q.dtype, False)
    return q_out, k_out


def _backward(
    dq: Tensor,
    dk: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    variant: str,
    tokens_first: bool,
    inputs: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    outs = _fake_backward(dq, dk, cos, sin, inputs)
    _launch((dq, dk), outs, cos, sin, _VARIANTS[variant], tokens_first, inputs, True)
    return outs


def _keep(ctx: Any, inputs: tuple[Any, ...], results: Any) -> None:
    q, k, cos, sin, variant, tokens_first, query = inputs
    ctx.save_for_backward(cos, sin)
    ctx.rest = (variant, tokens_first, q.dtype)
    ctx.two = k is not None
    ctx.shapes = (q.shape, None if k is None else k.shape, query)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, function: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    none = (None,) * 5
    dk = dk if ctx.two else None
    if dq is None:
        return (None, None if dk is None else function(dk, None, cos, sin, *ctx.rest)[0], *none)
    found = function(dq, dk, cos, sin, *ctx.rest)
    return (found[0], None if dk is None else found[1], *none)


def _again(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return (*gradients_with_graph(ctx, cos, sin, dq, dk if ctx.two else None), *(None,) * 5)


def gradients_with_graph(
    ctx: Any, cos: Tensor, sin: Tensor, *gradients: Tensor | None
) -> list[Tensor | None]:
    """Gradients with a graph. The rotation is linear, so it matters nothing where they are taken."""
    variant, tokens_first, dtype = ctx.rest
    *shapes, query = ctx.shapes
    cast = _VARIANTS[variant].cast
    plain = dataclasses.replace(
        _VARIANTS[variant],
        broadcast="argument",
        indexed=False,
        sections=False,
        cast="own" if cast == "query" else cast,
    )
    if len(shapes[0]) == 3:
        cos, sin = cos[0], sin[0]
    place = len(shapes[0]) - (2 if tokens_first else 3)

    def definition(*x: Tensor | None) -> Any:
        made = [
            reference.rotary(y, None, cos, sin, place, variant=dataclasses.replace(plain, tensors=1))
            for y in x
            if y is not None
        ]
        return tuple(y.to(query) if cast == "query" else y for y in made)  # type: ignore[union-attr]

    origins = [
        None if s is None else torch.zeros(s, dtype=dtype, device=cos.device, requires_grad=True)
        for s in shapes
    ]
    grads = gradients if shapes[1] is not None else gradients[:1]
    return through_definition(definition, tuple(origins), tuple(grads))


def _fake_forward(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    variant: str,
    tokens_first: bool,
    query: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Room for the results: an empty tensor where there is no ``k``."""
    kind = _VARIANTS[variant]

    def room(x: Tensor) -> Tensor:
        return _empty(x, _out_dtype(x.dtype, cos.dtype, query, kind), kind)

    return room(q), q.new_empty(0) if k is None else room(k)


def _fake_backward(
    dq: Tensor, dk: Tensor | None, cos: Tensor, sin: Tensor, *rest: Any
) -> tuple[Tensor, Tensor | None]:
    inputs = rest[-1]
    return _empty(dq, inputs), None if dk is None else _empty(dk, inputs)


_differentiable, _op = define_op(
    "_Rotary",
    "rotary(Tensor q, Tensor? k, Tensor cos, Tensor sin, str variant, bool tokens_first, ScalarType query)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    Derivative(
        "rotary_backward(Tensor dq, Tensor? dk, Tensor cos, Tensor sin, str variant, "
        "bool tokens_first, ScalarType inputs) -> (Tensor, Tensor)",
        _backward,
        _fake_backward,
        keep=_keep,
        gradients=_gradients,
        again=_again,
    ),
)


def maker_of(function: Callable[..., Any], attempt: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """What makes functions with the arguments of others that compute ``function``, a `rotary`.

    Where the definition is that of the original on some inputs alone, ``attempt`` is called, and the original
    wherever that gives None.

    The maker takes the variant, the facts (from the argument of `rotary` to the name of the argument of the
    original, or its value) and the original. It returns the same function for the same arguments.
    """

    @once_for(*_FACTS)
    def function_for(
        variant: RotaryVariant, facts: Mapping[str, Any], original: Callable[..., Any]
    ) -> Callable[..., Any]:
        if variant.broadcast == "given" or "requires" in facts:
            return given.guarded_function(original, facts, variant, attempt)
        return plain_function(original, function, {"k": None, **facts}, constants={"variant": variant})

    return function_for


function_for = maker_of(rotary, by_kernel)
"""See :func:`maker_of`."""
