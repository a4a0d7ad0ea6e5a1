"""Spellings of rotations that are products: of complex numbers, or of matrices and pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rotations import BATCH, HEADS, TOKENS, WIDTH, random
from spelling import Corpus

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

__all__ = ["CORPORA"]


def _polar(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    angle = (torch.randn(*shape, generator=generator) * 3).to(dtype)
    return torch.polar(torch.ones_like(angle), angle)


def one_row_a_token(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, tokens, heads, 8]``, a complex table as ``[tokens, 4]``."""
    x = random(dtype, generator, BATCH, TOKENS, HEADS, WIDTH)
    return {"x": x, "freqs_cis": _polar(generator, TOKENS, WIDTH // 2)}


def of_four_dimensions(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, tokens, heads, 8]``, a complex table as ``[1, tokens, 1, 4]``."""
    x = random(dtype, generator, BATCH, TOKENS, HEADS, WIDTH)
    return {"x": x, "freqs_cis": _polar(generator, 1, TOKENS, 1, WIDTH // 2)}


def wide(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``hidden_states`` as ``[batch, heads, tokens, 8]``, a table in complex128 as ``[1, 1, tokens, 4]``."""
    x = random(dtype, generator, BATCH, HEADS, TOKENS, WIDTH)
    return {"hidden_states": x, "freqs": _polar(generator, 1, 1, TOKENS, WIDTH // 2, dtype=torch.float64)}


def both(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``xq`` and ``xk`` as ``[batch, heads, tokens, 8]``, a complex table as ``[tokens, 4]``."""
    xq = random(dtype, generator, BATCH, HEADS, TOKENS, WIDTH)
    xk = random(dtype, generator, BATCH, 1, TOKENS, WIDTH)
    return {"xq": xq, "xk": xk, "freqs_cis": _polar(generator, TOKENS, WIDTH // 2)}


def angles(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, heads, tokens, 8]``, float32 angles as ``[tokens, 4]``."""
    x = random(dtype, generator, BATCH, HEADS, TOKENS, WIDTH)
    return {"x": x, "angles": random(torch.float32, generator, TOKENS, WIDTH // 2)}


def matrices(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``xq`` and ``xk`` as ``[batch, heads, tokens, 8]``, float32 matrices as ``[1, 1, tokens, 4, 2, 2]``."""
    xq = random(dtype, generator, BATCH, HEADS, TOKENS, WIDTH)
    xk = random(dtype, generator, BATCH, 1, TOKENS, WIDTH)
    return {"xq": xq, "xk": xk, "pe": random(torch.float32, generator, 1, 1, TOKENS, WIDTH // 2, 2, 2)}


def matrices_of_tokens(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``xq`` and ``xk`` as ``[batch, tokens, heads, 8]``, float32 matrices as ``[tokens, 4, 2, 2]``."""
    xq = random(dtype, generator, BATCH, TOKENS, HEADS, WIDTH)
    xk = random(dtype, generator, BATCH, TOKENS, 1, WIDTH)
    return {"xq": xq, "xk": xk, "freqs": random(torch.float32, generator, TOKENS, WIDTH // 2, 2, 2)}


def _corpus(inputs: Any) -> Corpus:
    return Corpus("rotary", inputs=inputs, constant=("freqs_cis", "freqs", "angles", "pe"))


ROWS, FOUR, WIDE, BOTH = map(_corpus, (one_row_a_token, of_four_dimensions, wide, both))
ANGLES, MATRICES, OF_TOKENS = map(_corpus, (angles, matrices, matrices_of_tokens))
CORPORA = (ROWS, FOUR, WIDE, BOTH, ANGLES, MATRICES, OF_TOKENS)


@ROWS.spelling("complex_float32")
def one_tensor(x, freqs_cis):
    """As in Lumina and in Qwen-Image: a head dimension for the table, one tensor at a time."""
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(turned * freqs_cis.unsqueeze(1)).flatten(3).type_as(x)


@ROWS.look_alike(one_tensor, "real and imaginary parts exchanged")
def parts_exchanged(x, freqs_cis):
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2).flip(-1).contiguous())
    return torch.view_as_real(turned * freqs_cis.unsqueeze(1)).flatten(3).type_as(x)


@ROWS.look_alike(one_tensor, "the tensor is conjugated, not the table")
def conjugated(x, freqs_cis):
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)).conj()
    return torch.view_as_real((turned * freqs_cis.unsqueeze(1)).resolve_conj()).flatten(3).type_as(x)


@ROWS.look_alike(one_tensor, "divided by the table")
def divided(x, freqs_cis):
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(turned / freqs_cis.unsqueeze(1)).flatten(3).type_as(x)


@ROWS.look_alike(one_tensor, "added to the table")
def added(x, freqs_cis):
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(turned + freqs_cis.unsqueeze(1)).flatten(3).type_as(x)


@ROWS.spelling("complex_float32", contracted=True)
def by_sizes(x, freqs_cis):
    """Sizes by name, and the result in the shape that came."""
    b, t, h, d = x.shape
    numbers = torch.view_as_complex(x.float().view(b, t, h, d // 2, 2))
    return torch.view_as_real(freqs_cis.view(1, t, 1, d // 2) * numbers).reshape(b, t, h, d).to(x.dtype)


@ROWS.look_alike(by_sizes, "halves are the real and the imaginary parts")
def halves_by_sizes(x, freqs_cis):
    b, t, h, d = x.shape
    numbers = torch.view_as_complex(x.float().view(b, t, h, 2, d // 2).transpose(-1, -2).contiguous())
    return torch.view_as_real(freqs_cis.view(1, t, 1, d // 2) * numbers).reshape(b, t, h, d).to(x.dtype)


@ROWS.look_alike(by_sizes, "the parts are joined as halves")
def joined_as_halves(x, freqs_cis):
    b, t, h, d = x.shape
    numbers = torch.view_as_complex(x.float().view(b, t, h, d // 2, 2))
    made = torch.view_as_real(freqs_cis.view(1, t, 1, d // 2) * numbers)
    return made.transpose(-1, -2).reshape(b, t, h, d).to(x.dtype)


@FOUR.spelling("complex_float32_wide")
def left_wide(x, freqs_cis):
    """The result is not cast back."""
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * freqs_cis).flatten(3)


@FOUR.look_alike(left_wide, "halves are the parts")
def halves_left_wide(x, freqs_cis):
    halves = x.float().reshape(*x.shape[:-1], 2, -1)
    numbers = torch.view_as_complex(halves.transpose(-1, -2).contiguous())
    return torch.view_as_real(numbers * freqs_cis).flatten(3)


@FOUR.spelling("complex_wide")
def without_a_cast(x, freqs_cis):
    """Of float32 alone: torch has no complex numbers of bfloat16."""
    numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * freqs_cis).flatten(-2)


@FOUR.look_alike(without_a_cast, "squared")
def squared(x, freqs_cis):
    numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * freqs_cis * freqs_cis).flatten(-2)


@WIDE.spelling("complex_float64")
def in_complex128(hidden_states, freqs):
    """Wan's attention: float64, and a table in complex128."""
    numbers = torch.view_as_complex(hidden_states.to(torch.float64).unflatten(3, (-1, 2)))
    return torch.view_as_real(numbers * freqs).flatten(3, 4).type_as(hidden_states)


@WIDE.look_alike(in_complex128, "the table is rounded first")
def table_rounded(hidden_states, freqs):
    numbers = torch.view_as_complex(hidden_states.to(torch.float32).unflatten(3, (-1, 2)))
    turned = torch.view_as_real(numbers * freqs.to(torch.complex64)).flatten(3, 4)
    return turned.type_as(hidden_states)


@WIDE.look_alike(in_complex128, "along the heads")
def along_the_heads(hidden_states, freqs):
    numbers = torch.view_as_complex(hidden_states.to(torch.float64).unflatten(3, (-1, 2)))
    turned = numbers.transpose(1, 2) * freqs[:, :, : numbers.shape[1]]
    return torch.view_as_real(turned).transpose(1, 2).flatten(3, 4).type_as(hidden_states)


@WIDE.spelling("complex_float32")
def wide_table_of_a_float32_product(hidden_states, freqs):
    """The cast is to float32, and the table makes the product complex128."""
    numbers = torch.view_as_complex(hidden_states.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(numbers * freqs).flatten(-2).to(hidden_states.dtype)


@WIDE.look_alike(wide_table_of_a_float32_product, "the result is rounded to float32 first")
def rounded_twice(hidden_states, freqs):
    numbers = torch.view_as_complex(hidden_states.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(numbers * freqs).flatten(-2).to(torch.bfloat16).to(hidden_states.dtype)


@BOTH.spelling("complex_float32")
def heads_before_tokens(xq, xk, freqs_cis):
    """Queries and keys, each in one expression."""
    table = freqs_cis[None, None, : xq.shape[2]]
    return _turned(xq, table), _turned(xk, table)


def _turned(x, table):
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * table).flatten(3).type_as(x)


@BOTH.look_alike(heads_before_tokens, "keys by the conjugate")
def keys_by_the_conjugate(xq, xk, freqs_cis):
    table = freqs_cis[None, None, : xq.shape[2]]
    q = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    k = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    return (
        torch.view_as_real(q * table).flatten(3).type_as(xq),
        torch.view_as_real(k * table.conj()).flatten(3).type_as(xk),
    )


@BOTH.look_alike(heads_before_tokens, "keys have the dtype of queries, which are wider")
def keys_left_wide(xq, xk, freqs_cis):
    table = freqs_cis[None, None, : xq.shape[2]]
    q = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    k = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    return (
        torch.view_as_real(q * table).flatten(3).type_as(xq),
        torch.view_as_real(k * table).flatten(3),
    )


@ANGLES.spelling("complex_float32")
def table_of_angles(x, angles):
    """The table is made where it is used."""
    table = torch.polar(torch.ones_like(angles), angles)
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * table).flatten(3).type_as(x)


@ANGLES.look_alike(table_of_angles, "angles are added, which is the same but for rounding")
def angles_added(x, angles):
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(torch.polar(numbers.abs(), numbers.angle() + angles)).flatten(3).type_as(x)


@MATRICES.spelling("matrix_float32")
def columns_of_matrices(xq, xk, pe):
    """Flux's own form, of queries and keys."""
    q = xq.float().reshape(*xq.shape[:-1], -1, 1, 2)
    k = xk.float().reshape(*xk.shape[:-1], -1, 1, 2)
    q = pe[..., 0] * q[..., 0] + pe[..., 1] * q[..., 1]
    k = pe[..., 0] * k[..., 0] + pe[..., 1] * k[..., 1]
    return q.reshape(*xq.shape).type_as(xq), k.reshape(*xk.shape).type_as(xk)


@MATRICES.look_alike(columns_of_matrices, "rows in the place of columns")
def rows_of_matrices(xq, xk, pe):
    q = xq.float().reshape(*xq.shape[:-1], -1, 1, 2)
    k = xk.float().reshape(*xk.shape[:-1], -1, 1, 2)
    q = pe[..., 0, :] * q[..., 0] - pe[..., 1, :] * q[..., 1]
    k = pe[..., 0, :] * k[..., 0] - pe[..., 1, :] * k[..., 1]
    return q.reshape(*xq.shape).type_as(xq), k.reshape(*xk.shape).type_as(xk)


@MATRICES.look_alike(columns_of_matrices, "even and odd channels exchanged")
def channels_exchanged(xq, xk, pe):
    q = xq.float().reshape(*xq.shape[:-1], -1, 1, 2)
    k = xk.float().reshape(*xk.shape[:-1], -1, 1, 2)
    q = pe[..., 0] * q[..., 1] + pe[..., 1] * q[..., 1]
    k = pe[..., 0] * k[..., 1] + pe[..., 1] * k[..., 1]
    return q.reshape(*xq.shape).type_as(xq), k.reshape(*xk.shape).type_as(xk)


@MATRICES.look_alike(columns_of_matrices, "halves in the place of pairs")
def halves_by_matrices(xq, xk, pe):
    q = xq.float().reshape(*xq.shape[:-1], 2, 1, -1).transpose(-1, -3)
    k = xk.float().reshape(*xk.shape[:-1], 2, 1, -1).transpose(-1, -3)
    q = pe[..., 0] * q[..., 0] + pe[..., 1] * q[..., 1]
    k = pe[..., 0] * k[..., 0] + pe[..., 1] * k[..., 1]
    return q.reshape(*xq.shape).type_as(xq), k.reshape(*xk.shape).type_as(xk)


@MATRICES.spelling("matrix_cast")
def in_the_dtype_that_came(xq, xk, pe):
    """Queries and keys are not cast before; the matrices make the products wide."""
    q = xq.reshape(*xq.shape[:-1], -1, 1, 2)
    k = xk.reshape(*xk.shape[:-1], -1, 1, 2)
    q = pe[..., 0] * q[..., 0] + pe[..., 1] * q[..., 1]
    k = pe[..., 0] * k[..., 0] + pe[..., 1] * k[..., 1]
    return q.reshape(*xq.shape).to(xq.dtype), k.reshape(*xk.shape).to(xk.dtype)


@MATRICES.look_alike(in_the_dtype_that_came, "the products are rounded")
def products_rounded(xq, xk, pe):
    q = xq.reshape(*xq.shape[:-1], -1, 1, 2)
    k = xk.reshape(*xk.shape[:-1], -1, 1, 2)
    q = (pe[..., 0] * q[..., 0]).to(xq.dtype) + (pe[..., 1] * q[..., 1]).to(xq.dtype)
    k = (pe[..., 0] * k[..., 0]).to(xk.dtype) + (pe[..., 1] * k[..., 1]).to(xk.dtype)
    return q.reshape(*xq.shape).to(xq.dtype), k.reshape(*xk.shape).to(xk.dtype)


@OF_TOKENS.spelling("matrix_sum_cast")
def sums_of_products(xq, xk, freqs):
    """As in lingua: one product with the matrices, and a sum."""
    table = freqs[None, :, None]
    q = xq.reshape(*xq.shape[:-1], -1, 1, 2)
    k = xk.reshape(*xk.shape[:-1], -1, 1, 2)
    return (q * table).sum(5).flatten(3).type_as(xq), (k * table).sum(5).flatten(3).type_as(xk)


@OF_TOKENS.look_alike(sums_of_products, "summed over the other axis")
def other_axis(xq, xk, freqs):
    table = freqs[None, :, None]
    q = xq.reshape(*xq.shape[:-1], -1, 1, 2)
    k = xk.reshape(*xk.shape[:-1], -1, 1, 2)
    return (q * table).sum(4).flatten(3).type_as(xq), (k * table).sum(4).flatten(3).type_as(xk)


@OF_TOKENS.spelling("matrix_sum_float32")
def sums_in_float32(xq, xk, freqs):
    """The same behind a cast, in the shape that came."""
    table = freqs[None, :, None]
    q = xq.float().reshape(*xq.shape[:-1], -1, 1, 2)
    k = xk.float().reshape(*xk.shape[:-1], -1, 1, 2)
    q, k = (q * table).sum(dim=-1), (table * k).sum(dim=-1)
    return q.reshape(*xq.shape).type_as(xq), k.reshape(*xk.shape).type_as(xk)


@OF_TOKENS.look_alike(sums_in_float32, "pairs are columns, not rows")
def columns_times_matrices(xq, xk, freqs):
    table = freqs[None, :, None]
    q = xq.float().reshape(*xq.shape[:-1], -1, 2, 1)
    k = xk.float().reshape(*xk.shape[:-1], -1, 2, 1)
    q, k = (q * table).sum(dim=-2), (table * k).sum(dim=-2)
    return q.reshape(*xq.shape).type_as(xq), k.reshape(*xk.shape).type_as(xk)
