"""Rotary position embedding: pairs of channels turned by an angle (Su et al. 2021, RoFormer).

``y = x · cos + rotate(x) · sin``. Families differ in which channels make a pair, in how many channels
are turned, in what the tables hold and in the dtype of the arithmetic.
"""

# mypy: disable-error-code="union-attr, operator, misc, attr-defined, index"
# Which optional arguments are given follows from the form: an assert would be a step of the computation.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from typing import Final, Literal

    from torch import Tensor

__all__ = ["FORMS", "RotaryForm", "rotary"]


@dataclass(frozen=True)
class RotaryForm:
    """Which channels a rotation pairs, and where it rounds.

    Attributes:
        pairs: ``half``: channel i with i + d/2; ``interleaved``: 2i with 2i + 1;
            ``interleaved_to_half``: pairs 2i with 2i + 1 and writes their results to i and i + d/2;
            ``complex``: interleaved, as a complex product with a complex table;
            ``matrix``: interleaved, as a sum over 2 x 2 matrices.
        inverse: Turns the other way round.
        tables: What of ``cos`` and ``sin`` is used: ``full`` (one value a channel), ``half`` (one a
            pair, for ``chunk`` arithmetic), ``first_half`` (the first half of a full table, one a pair),
            ``first_half_repeated`` (that, each twice), ``repeated`` (a half table, each twice).
        compute: ``input``: in the dtypes given; ``float32``: the inputs are cast; ``float32_tables``: the
            tables too. ``float32_product``: as ``float32`` after rotating.
        cast: The outputs are cast to the dtype of their ``own`` input, of the ``query``, or not.
        part: ``all`` channels, as many ``first`` or ``last`` ones as the tables are wide, or of the
            tokens, all but a ``prefix`` that the tables do not cover.
        broadcast: How the tables get their head dimension: ``argument`` (an ``unsqueeze_dim``), a fixed
            dimension ``-2`` or ``2`` or ``1``, or ``none``.
        indexed: The tables are rows taken by position ids.
        sections: Multimodal: the channels take the tables of time, height and width in turn.
        tensors: How many tensors are turned: 1, 2 (q, k) or 3 (q, k, v).
    """

    name: str
    pairs: Literal["half", "interleaved", "interleaved_to_half", "complex", "matrix"] = "half"
    inverse: bool = False
    tables: Literal["full", "half", "first_half", "first_half_repeated", "repeated"] = "full"
    compute: Literal["input", "float32", "float32_tables"] = "input"
    cast: Literal["none", "own", "query"] = "none"
    part: Literal["all", "first", "last", "prefix"] = "all"
    broadcast: Literal["argument", "none", "-2", "1", "2"] = "argument"
    indexed: bool = False
    sections: bool = False
    tensors: Literal[1, 2, 3] = 2


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
    *,
    form: RotaryForm,
    v: Tensor | None = None,
    position_ids: Tensor | None = None,
    mrope_section: list[int] | None = None,
    slice_last: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """The definition.

    Args:
        q: ``[batch, heads, tokens, channels]``, or heads and tokens exchanged, as ``unsqueeze_dim`` says.
        k: As ``q``; unused by a form of one tensor.
        cos: ``[batch, tokens, channels]``; for the complex form the complex table.
        sin: As ``cos``; unused by the complex form.
        unsqueeze_dim: Where the tables get their head dimension.
        form: Which channels are paired, and where it rounds.
        v: The third tensor of a form of three.
        position_ids: Of an indexed form.
        mrope_section: Channels of time, height and width, of a form with sections.
        slice_last: The order of slicing and unsqueezing the tables, which changes no value.

    Returns:
        A tensor for a form of one tensor, else a tuple.
    """
    if form.pairs == "complex":
        return _complex(q, k, cos, form)
    if form.pairs == "matrix":
        return _matrix(q, k, cos, sin, unsqueeze_dim)
    cos = _table(cos, unsqueeze_dim, position_ids, mrope_section, form, slice_last)
    sin = _table(sin, unsqueeze_dim, position_ids, mrope_section, form, slice_last)
    q_out = _turn(q, cos, sin, q, form)
    if form.tensors == 1:
        return q_out
    k_out = _turn(k, cos, sin, q, form)
    if form.tensors == 2:
        return q_out, k_out
    return q_out, k_out, _turn(v, cos, sin, q, form)


def _table(
    table: Tensor,
    unsqueeze_dim: int,
    position_ids: Tensor | None,
    mrope_section: list[int] | None,
    form: RotaryForm,
    slice_last: bool,
) -> Tensor:
    if form.indexed:
        table = table[position_ids]
    if form.sections:
        sections = mrope_section * 2
        table = torch.cat([m[i % 3] for i, m in enumerate(table.split(sections, dim=-1))], dim=-1)
    if not slice_last:
        table = _widen(table, form)
    if form.broadcast == "argument":
        table = table.unsqueeze(unsqueeze_dim)
    elif form.broadcast == "-2":
        table = table.unsqueeze(-2)
    elif form.broadcast == "1":
        table = table.unsqueeze(1)
    elif form.broadcast == "2":
        table = table.unsqueeze(2)
    if slice_last:
        table = _widen(table, form)
    if form.compute == "float32_tables":
        table = table.float()
    return table


def _widen(table: Tensor, form: RotaryForm) -> Tensor:
    if form.tables == "first_half":
        return table[..., : table.shape[-1] // 2]
    if form.tables == "first_half_repeated":
        return table[..., : table.shape[-1] // 2].repeat_interleave(2, dim=-1)
    if form.tables == "repeated":
        return table.repeat_interleave(2, dim=-1)
    return table


def _turn(x: Tensor, cos: Tensor, sin: Tensor, query: Tensor, form: RotaryForm) -> Tensor:
    if form.part == "first":
        width = cos.shape[-1]
        return torch.cat([_rounded(x[..., :width], x, cos, sin, query.dtype, form), x[..., width:]], dim=-1)
    if form.part == "last":
        width = cos.shape[-1]
        return torch.cat([x[..., :-width], _rounded(x[..., -width:], x, cos, sin, query.dtype, form)], dim=-1)
    if form.part == "prefix":
        prefix, patches = x.split((query.shape[-2] - sin.shape[-2], sin.shape[-2]), dim=-2)
        return torch.cat((prefix, _rounded(patches, x, cos, sin, query.dtype, form)), dim=-2)
    return _rounded(x, x, cos, sin, query.dtype, form)


def _rounded(
    x: Tensor, whole: Tensor, cos: Tensor, sin: Tensor, query_dtype: torch.dtype, form: RotaryForm
) -> Tensor:
    if form.compute != "input":
        x = x.float()
    if form.pairs == "interleaved_to_half":
        x1, x2 = x[..., 0::2], x[..., 1::2]
        y = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
    elif form.tables == "half" and form.pairs == "half":
        x1, x2 = torch.chunk(x, 2, dim=-1)
        y = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    elif form.tables == "half":
        x1, x2 = x[..., ::2], x[..., 1::2]
        y = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)
    else:
        y = x * cos + _rotate(x, form) * sin
    if form.cast == "own":
        return y.to(whole.dtype)
    if form.cast == "query":
        return y.to(query_dtype)
    return y


def _rotate(x: Tensor, form: RotaryForm) -> Tensor:
    if form.pairs == "half":
        x1 = x[..., : x.shape[-1] // 2]
        x2 = x[..., x.shape[-1] // 2 :]
        if form.inverse:
            return torch.cat((x2, -x1), dim=-1)
        return torch.cat((-x2, x1), dim=-1)
    x1 = x[..., 0::2]
    x2 = x[..., 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)


def _complex(q: Tensor, k: Tensor, table: Tensor, form: RotaryForm) -> tuple[Tensor, Tensor]:
    q_ = torch.view_as_complex(q.float().reshape(*q.shape[:-1], -1, 2))
    k_ = torch.view_as_complex(k.float().reshape(*k.shape[:-1], -1, 2))
    if form.broadcast == "2":
        table = table[:, :, None, :]
    elif form.broadcast == "1":
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


_Q: Final = "query"
FORMS: tuple[RotaryForm, ...] = (
    RotaryForm("half"),
    RotaryForm("half_one", tensors=1),
    RotaryForm("half_indexed", indexed=True),
    RotaryForm("half_indexed_three", indexed=True, tensors=3),
    RotaryForm("half_cast", cast="own"),
    RotaryForm("half_cast_query", cast=_Q),
    RotaryForm("half_float32", compute="float32", cast=_Q),
    RotaryForm("half_float32_own", compute="float32", cast="own"),
    RotaryForm("vision", compute="float32_tables", cast="own", broadcast="-2"),
    RotaryForm("vision_query", compute="float32_tables", cast=_Q, broadcast="-2"),
    RotaryForm("float32_tables", compute="float32_tables", cast="own"),
    RotaryForm("float32_tables_query", compute="float32_tables", cast=_Q),
    RotaryForm("half_plain", broadcast="none"),
    RotaryForm("half_head_1", broadcast="1"),
    RotaryForm("half_head_2", broadcast="2"),
    RotaryForm("prefix", broadcast="none", part="prefix"),
    RotaryForm("inverse", inverse=True),
    RotaryForm("partial", part="first"),
    RotaryForm("partial_one", part="first", tensors=1),
    RotaryForm("partial_head_1", part="first", broadcast="1"),
    RotaryForm("sections", sections=True),
    RotaryForm("split_half", tables="half"),
    RotaryForm("split_interleaved", pairs="interleaved", tables="half"),
    RotaryForm("interleaved_to_half", pairs="interleaved_to_half", tables="first_half"),
    RotaryForm("interleaved", pairs="interleaved"),
    RotaryForm("interleaved_float32", pairs="interleaved", compute="float32", cast=_Q),
    RotaryForm("interleaved_float32_own", pairs="interleaved", compute="float32", cast="own"),
    RotaryForm(
        "interleaved_float32_plain", pairs="interleaved", compute="float32", cast="own", broadcast="none"
    ),
    RotaryForm("interleaved_partial", pairs="interleaved", part="first"),
    RotaryForm("interleaved_repeated_one", pairs="interleaved", tables="repeated", broadcast="2", tensors=1),
    RotaryForm(
        "interleaved_repeated_last",
        pairs="interleaved",
        tables="repeated",
        compute="float32",
        cast="own",
        part="last",
        tensors=1,
    ),
    RotaryForm("interleaved_widened", pairs="interleaved", tables="first_half_repeated"),
    RotaryForm(
        "interleaved_widened_partial", pairs="interleaved", tables="first_half_repeated", part="first"
    ),
    RotaryForm(
        "interleaved_widened_float32",
        pairs="interleaved",
        tables="first_half_repeated",
        compute="float32",
        cast=_Q,
    ),
    RotaryForm("complex_head_2", pairs="complex", broadcast="2"),
    RotaryForm("complex_head_1", pairs="complex", broadcast="1"),
    RotaryForm("matrix", pairs="matrix"),
)
"""Every form that is recognised."""
