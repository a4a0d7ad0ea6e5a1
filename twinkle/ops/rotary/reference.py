"""Rotary position embedding: pairs of channels turned by an angle (Su et al. 2021, RoFormer).

``y = x · cos + rotate(x) · sin``. Families differ in which channels make a pair, in how many channels
are turned, in what the tables hold and in the dtype of the arithmetic.
"""

# mypy: disable-error-code="union-attr, operator, misc, attr-defined, index"
# Which optional arguments are given follows from the variant: an assert would be a step of the computation.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final, Literal

    from torch import Tensor

__all__ = ["VARIANTS", "RotaryVariant", "rotary"]


@dataclass(frozen=True)
class RotaryVariant:
    """Which channels a rotation pairs, and where it rounds.

    Attributes:
        pairs: ``half``: channel i with i + d/2; ``interleaved``: 2i with 2i + 1;
            ``interleaved_to_half``: pairs 2i with 2i + 1 and writes their results to i and i + d/2;
            ``complex``: interleaved, as a complex product with a complex table;
            ``matrix``: interleaved, as a sum over 2 x 2 matrices.
        inverse: Turns the other way round.
        tables: What of ``cos`` and ``sin`` is used: ``full`` (one value a channel), ``half`` (one a
            pair, for ``chunk`` arithmetic), ``first_half`` (the first half of a full table, one a pair),
            ``first_half_repeated`` (that, each twice), ``repeated`` (a half table, each twice), ``columns``
            of matrices in the place of both, or ``matrices`` in that of ``cos``, whose products are summed.
        compute: ``input``: in the dtypes given; ``float32``: the inputs are cast; ``float32_tables``: the
            tables too. ``float32_each``: an input is cast, and its rotated copy by itself, which rounds two
            gradients; ``float64``: as ``float32``.
        cast: The outputs are cast to the dtype of their ``own`` input, of the ``query``, or not.
        part: ``all`` channels, as many ``first`` or ``last`` ones as the tables are wide, or of the
            tokens, all but a ``prefix`` that the tables do not cover.
        broadcast: How the tables get their head dimension: ``argument`` (an ``unsqueeze_dim``), a fixed
            dimension ``-2`` or ``2`` or ``1``, or ``none``. ``given``: they have it, and any code may have
            made them; such a variant turns as many tensors as there are.
        indexed: The tables are rows taken by position ids.
        sections: Multimodal: the channels take the tables of time, height and width in turn.
        tensors: How many tensors are turned: 1, 2 (q, k) or 3 (q, k, v).
        scaled: Both products are multiplied with a factor (xPos).
    """

    name: str
    pairs: Literal["half", "interleaved", "interleaved_to_half", "complex", "matrix"] = "half"
    inverse: bool = False
    tables: Literal[
        "full", "half", "first_half", "first_half_repeated", "repeated", "columns", "matrices"
    ] = "full"
    compute: Literal["input", "float32", "float32_tables", "float32_each", "float64"] = "input"
    cast: Literal["none", "own", "query"] = "none"
    part: Literal["all", "first", "last", "prefix"] = "all"
    broadcast: Literal["argument", "none", "-2", "1", "2", "given"] = "argument"
    indexed: bool = False
    sections: bool = False
    tensors: Literal[1, 2, 3] = 2
    scaled: bool = False


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
    *,
    variant: RotaryVariant,
    v: Tensor | None = None,
    position_ids: Tensor | None = None,
    mrope_section: list[int] | None = None,
    rotary_dim: int | None = None,
    scale: Tensor | float = 1.0,
    slice_last: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """The definition.

    Args:
        q: ``[batch, heads, tokens, channels]``, or heads and tokens exchanged, as ``unsqueeze_dim`` says.
        k: As ``q``; unused by a variant of one tensor.
        cos: ``[batch, tokens, channels]``; for the complex variant the complex table.
        sin: As ``cos``; unused by the complex variant.
        unsqueeze_dim: Where the tables get their head dimension.
        variant: Which channels are paired, and where it rounds.
        v: The third tensor of a variant of three.
        position_ids: Of an indexed variant.
        mrope_section: Channels of time, height and width, of a variant with sections.
        rotary_dim: How many channels are turned, where the tables are given and only the first are.
        scale: Of a variant with a factor; it broadcasts as the tables do.
        slice_last: The order of slicing and unsqueezing the tables, which changes no value.

    Returns:
        A tensor for a variant of one tensor, else a tuple.
    """
    if variant.broadcast == "given":
        turn: Callable[..., Tensor] = _turn_complex if variant.pairs == "complex" else _turn_given
        if variant.pairs == "matrix":
            turn = _turn_matrix
        q_out = turn(q, cos, sin, rotary_dim, scale, variant)
        if k is None:
            return q_out
        k_out = turn(k, cos, sin, rotary_dim, scale, variant)
        if v is None:
            return q_out, k_out
        return q_out, k_out, turn(v, cos, sin, rotary_dim, scale, variant)
    if variant.pairs == "complex":
        return _complex(q, k, cos, variant)
    if variant.pairs == "matrix":
        return _matrix(q, k, cos, sin, unsqueeze_dim)
    cos = _table(cos, unsqueeze_dim, position_ids, mrope_section, variant, slice_last)
    sin = _table(sin, unsqueeze_dim, position_ids, mrope_section, variant, slice_last)
    q_out = _turn(q, cos, sin, q, variant)
    if variant.tensors == 1:
        return q_out
    k_out = _turn(k, cos, sin, q, variant)
    if variant.tensors == 2:
        return q_out, k_out
    return q_out, k_out, _turn(v, cos, sin, q, variant)


def _table(
    table: Tensor,
    unsqueeze_dim: int,
    position_ids: Tensor | None,
    mrope_section: list[int] | None,
    variant: RotaryVariant,
    slice_last: bool,
) -> Tensor:
    if variant.indexed:
        table = table[position_ids]
    if variant.sections:
        sections = mrope_section * 2
        table = torch.cat([m[i % 3] for i, m in enumerate(table.split(sections, dim=-1))], dim=-1)
    if not slice_last:
        table = _widen(table, variant)
    if variant.broadcast == "argument":
        table = table.unsqueeze(unsqueeze_dim)
    elif variant.broadcast == "-2":
        table = table.unsqueeze(-2)
    elif variant.broadcast == "1":
        table = table.unsqueeze(1)
    elif variant.broadcast == "2":
        table = table.unsqueeze(2)
    if slice_last:
        table = _widen(table, variant)
    if variant.compute == "float32_tables":
        table = table.float()
    return table


def _widen(table: Tensor, variant: RotaryVariant) -> Tensor:
    if variant.tables == "first_half":
        return table[..., : table.shape[-1] // 2]
    if variant.tables == "first_half_repeated":
        return table[..., : table.shape[-1] // 2].repeat_interleave(2, dim=-1)
    if variant.tables == "repeated":
        return table.repeat_interleave(2, dim=-1)
    return table


def _turn_given(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int | None,
    scale: Tensor | float,
    variant: RotaryVariant,
) -> Tensor:
    if variant.part == "first":
        turned = _rounded(x[..., :rotary_dim], x, cos, sin, x.dtype, variant, scale)
        return torch.cat([turned, x[..., rotary_dim:]], dim=-1)
    return _rounded(x, x, cos, sin, x.dtype, variant, scale)


def _turn_complex(x: Tensor, cos: Tensor, *rest: object) -> Tensor:
    variant = rest[-1]
    wide = x
    if variant.compute == "float32":
        wide = x.float()
    elif variant.compute == "float64":
        wide = x.double()
    turned = torch.view_as_complex(wide.reshape(*x.shape[:-1], -1, 2)) * cos
    y = torch.view_as_real(turned).flatten(-2)
    return y.to(x.dtype) if variant.cast == "own" else y


def _turn_matrix(x: Tensor, cos: Tensor, sin: Tensor, *rest: object) -> Tensor:
    """By matrices: ``cos`` is their first column, ``sin`` the second, as ``[..., channels / 2, 2]``."""
    variant = rest[-1]
    wide = x.float() if variant.compute == "float32" else x
    pairs = wide.reshape(*x.shape[:-1], -1, 1, 2)
    if variant.tables == "matrices":
        y = (pairs * cos).sum(-1).flatten(-2)
    else:
        y = (cos * pairs[..., 0] + sin * pairs[..., 1]).reshape(x.shape)
    return y.to(x.dtype) if variant.cast == "own" else y


def _turn(x: Tensor, cos: Tensor, sin: Tensor, query: Tensor, variant: RotaryVariant) -> Tensor:
    if variant.part == "first":
        width = cos.shape[-1] * 2 if variant.tables == "half" else cos.shape[-1]
        return torch.cat(
            [_rounded(x[..., :width], x, cos, sin, query.dtype, variant), x[..., width:]], dim=-1
        )
    if variant.part == "last":
        width = cos.shape[-1]
        return torch.cat(
            [x[..., :-width], _rounded(x[..., -width:], x, cos, sin, query.dtype, variant)], dim=-1
        )
    if variant.part == "prefix":
        prefix, patches = x.split((query.shape[-2] - sin.shape[-2], sin.shape[-2]), dim=-2)
        return torch.cat((prefix, _rounded(patches, x, cos, sin, query.dtype, variant)), dim=-2)
    return _rounded(x, x, cos, sin, query.dtype, variant)


def _rounded(
    x: Tensor,
    whole: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_dtype: torch.dtype,
    variant: RotaryVariant,
    scale: Tensor | float = 1.0,
) -> Tensor:
    if variant.scaled:
        y = x * cos * scale + _rotate(x, variant) * sin * scale
        return y.to(whole.dtype) if variant.cast == "own" else y
    if variant.compute == "float32_each":
        y = x.float() * cos + _rotate(x, variant).float() * sin
        return y.to(whole.dtype) if variant.cast == "own" else y
    if variant.compute != "input":
        x = x.float()
    if variant.pairs == "interleaved_to_half":
        x1, x2 = x[..., 0::2], x[..., 1::2]
        y = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
    elif variant.tables == "half" and variant.pairs == "half":
        x1, x2 = torch.chunk(x, 2, dim=-1)
        y = torch.cat(_pair(x1, x2, cos, sin, variant), dim=-1)
    elif variant.tables == "half":
        x1, x2 = x[..., ::2], x[..., 1::2]
        y = torch.stack(_pair(x1, x2, cos, sin, variant), dim=-1).flatten(-2)
    else:
        y = x * cos + _rotate(x, variant) * sin
    if variant.cast == "own":
        return y.to(whole.dtype)
    if variant.cast == "query":
        return y.to(query_dtype)
    return y


def _pair(x1: Tensor, x2: Tensor, cos: Tensor, sin: Tensor, variant: RotaryVariant) -> tuple[Tensor, Tensor]:
    if variant.inverse:
        return x1 * cos + x2 * sin, x2 * cos - x1 * sin
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


def _rotate(x: Tensor, variant: RotaryVariant) -> Tensor:
    if variant.pairs == "half":
        x1 = x[..., : x.shape[-1] // 2]
        x2 = x[..., x.shape[-1] // 2 :]
        if variant.inverse:
            return torch.cat((x2, -x1), dim=-1)
        return torch.cat((-x2, x1), dim=-1)
    x1 = x[..., 0::2]
    x2 = x[..., 1::2]
    if variant.inverse:
        return torch.stack((x2, -x1), dim=-1).flatten(-2)
    return torch.stack((-x2, x1), dim=-1).flatten(-2)


def _complex(q: Tensor, k: Tensor, table: Tensor, variant: RotaryVariant) -> tuple[Tensor, Tensor]:
    q_ = torch.view_as_complex(q.float().reshape(*q.shape[:-1], -1, 2))
    k_ = torch.view_as_complex(k.float().reshape(*k.shape[:-1], -1, 2))
    if variant.broadcast == "2":
        table = table[:, :, None, :]
    elif variant.broadcast == "1":
        table = table.unsqueeze(1).to(q_.device)
    q_out = torch.view_as_real(q_ * table).flatten(3)
    k_out = torch.view_as_real(k_ * table).flatten(3)
    return q_out.type_as(q), k_out.type_as(k)


def _matrix(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
    width = cos.shape[-1] // 2
    cos, sin = cos[..., :width], sin[..., :width]
    table = torch.stack([cos, -sin, sin, cos], dim=-1)
    table = table.view(*cos.shape, 2, 2).unsqueeze(unsqueeze_dim)
    q_ = q.reshape(*q.shape[:-1], -1, 1, 2)
    k_ = k.reshape(*k.shape[:-1], -1, 1, 2)
    return (q_ * table).sum(5).flatten(3), (k_ * table).sum(5).flatten(3)


def _given() -> tuple[RotaryVariant, ...]:
    """The rotations whose tables may come from any code: every pairing with every rounding."""
    found: list[RotaryVariant] = []
    for pairs, called in _PAIRS:
        for tables, suffix in (("half", ""), ("full", "_full")):
            for rounding, compute, cast in _ROUNDINGS:
                if compute == "float32_each" and tables == "half":
                    continue
                for part, inverse, how in _PARTS:
                    found.append(
                        RotaryVariant(
                            f"{called}{suffix}{rounding}{how}",
                            pairs=pairs,
                            inverse=inverse,
                            tables=tables,  # type: ignore[arg-type]
                            compute=compute,  # type: ignore[arg-type]
                            cast=cast,  # type: ignore[arg-type]
                            part=part,  # type: ignore[arg-type]
                            broadcast="given",
                            tensors=1,
                        )
                    )
    return tuple(found)


_Q: Final = "query"
_PAIRS: tuple[tuple[Literal["half", "interleaved"], str], ...] = (
    ("half", "halves"),
    ("interleaved", "pairs"),
)
_ENDS: tuple[tuple[Literal["all", "first"], str], ...] = (("all", ""), ("first", "_first"))
_PARTS: Final = (("all", False, ""), ("all", True, "_inverse"), ("first", False, "_first"))
_ROUNDINGS: Final = (
    ("", "input", "none"),
    ("_cast", "input", "own"),
    ("_float32", "float32", "own"),
    ("_float32_wide", "float32", "none"),
    ("_float32_each", "float32_each", "own"),
)
_COMPLEX: tuple[tuple[str, Literal["input", "float32", "float64"]], ...] = (
    ("", "input"),
    ("_float32", "float32"),
    ("_float64", "float64"),
)
_MATRICES: tuple[tuple[str, Literal["columns", "matrices"]], ...] = (
    ("", "columns"),
    ("_sum", "matrices"),
)
_CASTS: tuple[tuple[str, Literal["own", "none"]], ...] = (("", "own"), ("_wide", "none"))
VARIANTS: tuple[RotaryVariant, ...] = (
    RotaryVariant("half"),
    RotaryVariant("half_one", tensors=1),
    RotaryVariant("half_indexed", indexed=True),
    RotaryVariant("half_indexed_three", indexed=True, tensors=3),
    RotaryVariant("half_cast", cast="own"),
    RotaryVariant("half_cast_query", cast=_Q),
    RotaryVariant("half_float32", compute="float32", cast=_Q),
    RotaryVariant("half_float32_own", compute="float32", cast="own"),
    RotaryVariant("vision", compute="float32_tables", cast="own", broadcast="-2"),
    RotaryVariant("vision_query", compute="float32_tables", cast=_Q, broadcast="-2"),
    RotaryVariant("float32_tables", compute="float32_tables", cast="own"),
    RotaryVariant("float32_tables_query", compute="float32_tables", cast=_Q),
    RotaryVariant("half_plain", broadcast="none"),
    RotaryVariant("half_head_1", broadcast="1"),
    RotaryVariant("half_head_2", broadcast="2"),
    RotaryVariant("prefix", broadcast="none", part="prefix"),
    RotaryVariant("inverse", inverse=True),
    RotaryVariant("partial", part="first"),
    RotaryVariant("partial_one", part="first", tensors=1),
    RotaryVariant("partial_head_1", part="first", broadcast="1"),
    RotaryVariant("sections", sections=True),
    RotaryVariant("split_half", tables="half"),
    RotaryVariant("split_interleaved", pairs="interleaved", tables="half"),
    RotaryVariant("interleaved_to_half", pairs="interleaved_to_half", tables="first_half"),
    RotaryVariant("interleaved", pairs="interleaved"),
    RotaryVariant("interleaved_float32", pairs="interleaved", compute="float32", cast=_Q),
    RotaryVariant("interleaved_float32_own", pairs="interleaved", compute="float32", cast="own"),
    RotaryVariant(
        "interleaved_float32_plain", pairs="interleaved", compute="float32", cast="own", broadcast="none"
    ),
    RotaryVariant("interleaved_partial", pairs="interleaved", part="first"),
    RotaryVariant(
        "interleaved_repeated_one", pairs="interleaved", tables="repeated", broadcast="2", tensors=1
    ),
    RotaryVariant(
        "interleaved_repeated_last",
        pairs="interleaved",
        tables="repeated",
        compute="float32",
        cast="own",
        part="last",
        tensors=1,
    ),
    RotaryVariant("interleaved_widened", pairs="interleaved", tables="first_half_repeated"),
    RotaryVariant(
        "interleaved_widened_partial", pairs="interleaved", tables="first_half_repeated", part="first"
    ),
    RotaryVariant(
        "interleaved_widened_float32",
        pairs="interleaved",
        tables="first_half_repeated",
        compute="float32",
        cast=_Q,
    ),
    RotaryVariant(
        "complex_head_2", pairs="complex", tables="half", compute="float32", cast="own", broadcast="2"
    ),
    RotaryVariant(
        "complex_head_1", pairs="complex", tables="half", compute="float32", cast="own", broadcast="1"
    ),
    RotaryVariant("matrix", pairs="matrix", tables="first_half"),
    *_given(),
    *(
        RotaryVariant(
            f"{called}_full_scaled{wide}{how}",
            pairs=pairs,
            cast=cast,
            part=part,
            broadcast="given",
            tensors=1,
            scaled=True,
        )
        for pairs, called in _PAIRS
        for part, how in _ENDS
        for wide, cast in _CASTS
    ),
    *(
        RotaryVariant(
            f"matrix{called}{rounding}" if called or rounding else "matrix_input",
            pairs="matrix",
            tables=tables,
            compute=compute,  # type: ignore[arg-type]
            cast=cast,  # type: ignore[arg-type]
            broadcast="given",
            tensors=1,
        )
        for called, tables in _MATRICES
        for rounding, compute, cast in _ROUNDINGS[:4]
    ),
    *(
        RotaryVariant(
            f"complex{rounding}{how}",
            pairs="complex",
            tables="half",
            compute=compute,
            cast=cast,
            broadcast="given",
            tensors=1,
        )
        for rounding, compute in _COMPLEX
        for how, cast in _CASTS
    ),
)
"""Every variant that is recognised."""
