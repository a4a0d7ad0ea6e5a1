"""What the backends share: how the tables of a call lie, its dtypes, and the definition where none runs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from twinkle.ops.build import once_for, plain_function
from twinkle.ops.derivative import through_definition
from twinkle.ops.rotary import given, reference
from twinkle.ops.rotary.reference import VARIANTS, RotaryVariant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor

__all__ = [
    "HALF",
    "NAMED",
    "compute_dtype",
    "empty",
    "gradients_with_graph",
    "maker_of",
    "or_definition",
    "out_dtype",
    "plan",
    "real_tables",
    "sums_dtype",
    "turn_each",
    "unscaled",
]

NAMED = {variant.name: variant for variant in VARIANTS}
HALF = NAMED["half"]
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


def or_definition(attempt: Callable[..., Any]) -> Callable[..., Any]:
    """The op of a backend: what ``attempt`` gives, and the definition where that is None.

    Args:
        attempt: The ``by_kernel`` of the backend. Both take the arguments of ``reference.rotary``; `HALF` is
            the default of ``variant``.
    """

    def rotary(
        q: Tensor,
        k: Tensor | None,
        cos: Tensor,
        sin: Tensor | None = None,
        unsqueeze_dim: int = 1,
        *,
        variant: RotaryVariant = HALF,
        v: Tensor | None = None,
        position_ids: Tensor | None = None,
        mrope_section: list[int] | None = None,
        rotary_dim: int | None = None,
        scale: Tensor | float = 1.0,
        slice_last: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """``x · cos + rotate(x) · sin``; see ``reference.rotary`` for the arguments.

        Tables that want a gradient go through the definition.

        Returns:
            A tensor for a variant of one tensor, else a tuple.
        """
        options = {
            "variant": variant,
            "v": v,
            "position_ids": position_ids,
            "mrope_section": mrope_section,
            "rotary_dim": rotary_dim,
            "scale": scale,
        }
        made = attempt(q, k, cos, sin, unsqueeze_dim, **options)
        if made is not None:
            return made
        return reference.rotary(q, k, cos, sin, unsqueeze_dim, slice_last=slice_last, **options)  # type: ignore[arg-type]

    return rotary


def unscaled(variant: RotaryVariant, scale: Any) -> RotaryVariant:
    """The variant without a factor where that is 1, which changes no bit."""
    if not variant.scaled or not isinstance(scale, int | float) or scale != 1:
        return variant
    found = NAMED[variant.name.replace("_scaled_wide", "").replace("_scaled", "_cast")]
    assert dataclasses.replace(variant, scaled=False, name=found.name) == found
    return found


def turn_each(
    turn: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]],
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    variant: RotaryVariant,
) -> Tensor | tuple[Tensor, ...]:
    """The results of a call by a function that turns one or two tensors."""
    count = variant.tensors if variant.broadcast != "given" else 1 + (k is not None) + (v is not None)
    if count == 1:
        return turn(q, None)[0]
    results = turn(q, k)
    if count == 2:
        return results[0], results[1]
    assert v is not None
    return (*results, turn(v, None)[0])


def real_tables(q: Tensor, cos: Tensor, sin: Any, variant: RotaryVariant) -> tuple[Tensor, Any] | None:
    """What a variant's tables are made of: parts of complex numbers, columns of matrices; None for others."""
    if variant.pairs == "complex":
        return given.real_and_imaginary(q, cos, variant)
    if variant.pairs == "matrix" and variant.broadcast == "given":
        return given.flat_columns(*((cos, sin) if variant.tables == "columns" else given.columns_of(cos)))
    return cos, sin


def plan(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int,
    variant: RotaryVariant,
    position_ids: Tensor | None,
    mrope_section: list[int] | None,
    rotary_dim: int | None,
) -> tuple[Tensor, Tensor, bool] | None:
    """The tables as ``[batch or 1, tokens, width]``, and whether tokens stand before heads; else None."""
    if variant.broadcast == "given":
        return given.plan(q, k, v, cos, sin, rotary_dim, variant)
    return _by_place(q, k, cos, sin, unsqueeze_dim, variant, position_ids, mrope_section)


def _by_place(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int,
    variant: RotaryVariant,
    position_ids: Tensor | None,
    mrope_section: list[int] | None,
) -> tuple[Tensor, Tensor, bool] | None:
    rank = q.dim()
    if variant.indexed or variant.sections:
        narrow = reference.RotaryVariant(
            "", broadcast="none", indexed=variant.indexed, sections=variant.sections
        )
        cos = reference._table(cos, 0, position_ids, mrope_section, narrow, False)
        sin = reference._table(sin, 0, position_ids, mrope_section, narrow, False)
    if cos.shape != sin.shape or rank not in (3, 4) or cos.dtype != sin.dtype:
        return None
    if rank != 4 and variant.pairs in ("complex", "matrix"):
        return None  # these join the fourth dimension with the fifth
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


def compute_dtype(x: torch.dtype, table: torch.dtype, variant: RotaryVariant) -> torch.dtype:
    """The dtype that products are rounded to, from those of a turned tensor and of real tables."""
    if variant.pairs == "complex":  # its casts leave the table as it is
        wide = {"input": x, "float64": torch.float64}.get(variant.compute, torch.float32)
        return torch.promote_types(wide, table)
    return torch.promote_types(x, table) if variant.compute == "input" else torch.float32


def sums_dtype(x: torch.dtype, table: torch.dtype, variant: RotaryVariant) -> torch.dtype:
    """The dtype that gradients are rounded to before the parts of one are added."""
    if variant.pairs == "matrix":  # the sum of the products is an operator, whose result is cast
        return compute_dtype(x, table, variant)
    return x if variant.compute in ("input", "float32_each") else torch.float32


def out_dtype(x: torch.dtype, table: torch.dtype, query: torch.dtype, variant: RotaryVariant) -> torch.dtype:
    """The dtype of a result; ``query`` is that of the queries."""
    turned = {"own": x, "query": query, "none": compute_dtype(x, table, variant)}[variant.cast]
    return torch.promote_types(turned, x) if variant.part != "all" else turned


def empty(x: Tensor, dtype: torch.dtype, variant: RotaryVariant | None = None) -> Tensor:
    """Room for a result, with the strides that a variant's definition gives it, or for a gradient."""
    # Elementwise results keep the strides of the input; those of a concatenation or a sum do not.
    joined = variant is not None and (
        variant.part != "all"
        or (variant.tables == "half" and variant.pairs != "complex")
        or variant.pairs == "interleaved_to_half"
        or (variant.pairs == "matrix" and variant.tables != "columns")
    )
    out = torch.empty_like(
        x, dtype=dtype, memory_format=torch.contiguous_format if joined else torch.preserve_format
    )
    # The kernel wants channels side by side.
    return (
        out if out.stride(-1) == 1 or x.shape[-1] == 1 else torch.empty(x.shape, dtype=dtype, device=x.device)
    )


def gradients_with_graph(
    ctx: Any, cos: Tensor, sin: Tensor, *gradients: Tensor | None, scale: Tensor | None = None
) -> list[Tensor | None]:
    """Gradients with a graph. The rotation is linear, so it matters nothing where they are taken."""
    name, tokens_first, dtype = ctx.rest
    *shapes, query = ctx.shapes
    variant = NAMED[name]
    if len(shapes[0]) == 3:
        cos, sin = cos[0], sin[0]
    place = len(shapes[0]) - (2 if tokens_first else 3)
    plain = dataclasses.replace(
        variant,
        broadcast="argument",
        indexed=False,
        sections=False,
        tensors=1,
        cast="own" if variant.cast == "query" else variant.cast,
    )
    tables: tuple[Tensor | None, Tensor | None] = (cos, sin)
    more: dict[str, Any] = {}
    if variant.pairs == "complex":
        plain = dataclasses.replace(plain, broadcast="given")
        tables = (torch.complex(cos, sin).unsqueeze(place), None)
    elif variant.pairs == "matrix" and variant.broadcast == "given":
        plain = dataclasses.replace(plain, broadcast="given", tables="columns")
        tables = tuple(column.unflatten(-1, (-1, 2)).unsqueeze(place) for column in (cos, sin))
    elif scale is not None:
        plain = dataclasses.replace(plain, broadcast="given")
        tables = (cos.unsqueeze(place), sin.unsqueeze(place))
        more = {"scale": scale.unsqueeze(place), "rotary_dim": cos.shape[-1]}
    elif variant.pairs == "matrix":
        plain = dataclasses.replace(plain, pairs="interleaved", tables="first_half_repeated")

    def definition(*x: Tensor | None) -> Any:
        made = [reference.rotary(y, None, *tables, place, variant=plain, **more) for y in x if y is not None]
        return tuple(y.to(query) if variant.cast == "query" else y for y in made)  # type: ignore[union-attr]

    origins = [
        None if s is None else torch.zeros(s, dtype=dtype, device=cos.device, requires_grad=True)
        for s in shapes
    ]
    grads = gradients if shapes[1] is not None else gradients[:1]
    return through_definition(definition, tuple(origins), tuple(grads))


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
