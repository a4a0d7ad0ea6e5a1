"""Spellings of rotations whose pairs are adjacent channels, real and complex."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rotations import BATCH, HEADS, TOKENS, WIDTH, random, tables
from spelling import Corpus
from torch import nn

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

__all__ = ["CORPORA"]


def heads_first(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, heads, tokens, 8]``, tables as ``[tokens, 4]``."""
    x = random(dtype, generator, BATCH, HEADS, TOKENS, WIDTH)
    return {"x": x, **tables(dtype, generator, TOKENS, WIDTH // 2)}


def wide_tables(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, tokens, heads, 8]``, float32 tables as ``[1, tokens, 1, 8]``."""
    x = random(dtype, generator, BATCH, TOKENS, HEADS, WIDTH)
    return {"x": x, **tables(torch.float32, generator, 1, TOKENS, 1, WIDTH)}


def one_cache(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, tokens, heads, 8]``, cosines and sines in one float32 tensor ``[tokens, 4, 2]``."""
    x = random(dtype, generator, BATCH, TOKENS, HEADS, WIDTH)
    pair = tables(torch.float32, generator, TOKENS, WIDTH // 2)
    return {"x": x, "cache": torch.stack((pair["cos"], pair["sin"]), -1)}


def real_pair(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x``, and a pair of float32 tables as ``[tokens, 8]``."""
    x = random(dtype, generator, BATCH, HEADS, TOKENS, WIDTH)
    return {"x": x, "freqs": tuple(tables(torch.float32, generator, TOKENS, WIDTH).values())}


def angles(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x``, and angles as ``[tokens, 8]``."""
    x = random(dtype, generator, BATCH, HEADS, TOKENS, WIDTH)
    return {"x": x, "freqs": random(dtype, generator, TOKENS, WIDTH)}


def few_angles(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x``, and angles for 4 of its 8 channels."""
    return {**angles(dtype, generator), "freqs": random(dtype, generator, TOKENS, WIDTH // 2)}


def scaled_angles(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """As `few_angles`, and a factor."""
    return {**few_angles(dtype, generator), "scale": 0.75}


def _polar(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.polar(torch.ones(shape), torch.randn(*shape, generator=generator) * 3)


def complex_table(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, tokens, heads, 8]``, a complex table as ``[tokens, 4]``."""
    x = random(dtype, generator, BATCH, TOKENS, HEADS, WIDTH)
    return {"x": x, "freqs_cis": _polar(generator, TOKENS, WIDTH // 2)}


def complex_tables(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, tokens, heads, 8]``, a complex table as ``[batch, tokens, 4]``."""
    x = random(dtype, generator, BATCH, TOKENS, HEADS, WIDTH)
    return {"x": x, "freqs_cis": _polar(generator, BATCH, TOKENS, WIDTH // 2)}


def complex_pair(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``xq`` and ``xk`` as ``[batch, tokens, heads, 8]``, a complex table as ``[tokens, 4]``."""
    xq = random(dtype, generator, BATCH, TOKENS, HEADS, WIDTH)
    xk = random(dtype, generator, BATCH, TOKENS, 1, WIDTH)
    return {"xq": xq, "xk": xk, "freqs_cis": _polar(generator, TOKENS, WIDTH // 2)}


def only_x(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, tokens, heads, 8]`` for a layer that holds its table."""
    return {"x": random(dtype, generator, BATCH, TOKENS, HEADS, WIDTH), "input_pos": None}


def _corpus(inputs: Any) -> Corpus:
    return Corpus("rotary", inputs=inputs, constant=("cos", "sin", "cache", "freqs", "freqs_cis"))


def matrices(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, heads, tokens, 8]``, float32 matrices as ``[1, 1, tokens, 4, 2, 2]``."""
    x = random(dtype, generator, BATCH, HEADS, TOKENS, WIDTH)
    return {"x": x, "freqs": random(torch.float32, generator, 1, 1, TOKENS, WIDTH // 2, 2, 2)}


HEADS_FIRST, WIDE, CACHE, PAIR_OF_TABLES = map(_corpus, (heads_first, wide_tables, one_cache, real_pair))
ANGLES, FEW, COMPLEX, BATCHES = map(_corpus, (angles, few_angles, complex_table, complex_tables))
BOTH, LAYERS, MATRICES, SCALED = map(_corpus, (complex_pair, only_x, matrices, scaled_angles))
REAL = (HEADS_FIRST, WIDE, CACHE, PAIR_OF_TABLES, ANGLES, FEW, SCALED, MATRICES)
CORPORA = (*REAL, COMPLEX, BATCHES, BOTH, LAYERS)


@HEADS_FIRST.spelling("pairs")
def by_strides(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


@HEADS_FIRST.look_alike(by_strides, "even and odd channels exchanged")
def exchanged(x, cos, sin):
    even, odd = x[..., 1::2], x[..., 0::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


@HEADS_FIRST.look_alike(by_strides, "results in halves")
def results_in_halves(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)


@HEADS_FIRST.spelling("pairs")
def by_views(x, cos, sin):
    b, h, t, d = x.shape
    pairs = x.view(b, h, t, d // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).reshape(b, h, t, d)


@HEADS_FIRST.look_alike(by_views, "halves instead of pairs")
def by_other_views(x, cos, sin):
    b, h, t, d = x.shape
    pairs = x.view(b, h, t, 2, d // 2)
    even, odd = pairs[..., 0, :], pairs[..., 1, :]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).reshape(b, h, t, d)


@HEADS_FIRST.spelling("pairs_inverse")
def turned_back(x, cos, sin):
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((odd * sin + even * cos, odd * cos - even * sin), dim=-1).view(*x.shape)


@HEADS_FIRST.look_alike(turned_back, "turned forth")
def turned_forth(x, cos, sin):
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).view(*x.shape)


@WIDE.spelling("pairs_cast")
def halves_of_tables(x, cos, sin):
    """The real form of Wan: a new tensor is filled, and tables have each value twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine = cos[..., 0::2]
    sine = sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cosine - odd * sine
    out[..., 1::2] = even * sine + odd * cosine
    return out.type_as(x)


@WIDE.look_alike(halves_of_tables, "one line is written to both places")
def written_twice(x, cos, sin):
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cos[..., 0::2], sin[..., 1::2]
    out = torch.zeros_like(x)
    out[..., 0::2] = even * cosine - odd * sine
    out[..., 0::2] = even * sine + odd * cosine
    return out.type_as(x)


@WIDE.look_alike(halves_of_tables, "the lines exchanged")
def lines_exchanged(x, cos, sin):
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * sine + odd * cosine
    out[..., 1::2] = even * cosine - odd * sine
    return out.type_as(x)


@HEADS_FIRST.spelling("pairs_cast")
def parts_cast(x, cos, sin):
    """As in Mochi: each half of the result is cast by itself."""
    even, odd = x[..., ::2], x[..., 1::2]
    first = (even * cos - odd * sin).type_as(x)
    second = (even * sin + odd * cos).type_as(x)
    return torch.stack([first, second], dim=-1).flatten(-2)


@HEADS_FIRST.look_alike(parts_cast, "stacked on another axis")
def stacked_otherwise(x, cos, sin):
    even, odd = x[..., ::2], x[..., 1::2]
    first = (even * cos - odd * sin).type_as(x)
    second = (even * sin + odd * cos).type_as(x)
    return torch.stack([first, second], dim=-2).flatten(-2)


@CACHE.spelling("pairs_float32")
def cached_pairs(x, cache):
    """As in gpt-fast: cosines and sines in one table."""
    shaped = x.float().reshape(*x.shape[:-1], -1, 2)
    cache = cache.view(1, shaped.size(1), 1, shaped.size(3), 2)
    out = torch.stack(
        [
            shaped[..., 0] * cache[..., 0] - shaped[..., 1] * cache[..., 1],
            shaped[..., 1] * cache[..., 0] + shaped[..., 0] * cache[..., 1],
        ],
        -1,
    )
    return out.flatten(3).type_as(x)


@CACHE.look_alike(cached_pairs, "a sign is other")
def cached_pairs_added(x, cache):
    shaped = x.float().reshape(*x.shape[:-1], -1, 2)
    cache = cache.view(1, shaped.size(1), 1, shaped.size(3), 2)
    out = torch.stack(
        [
            shaped[..., 0] * cache[..., 0] + shaped[..., 1] * cache[..., 1],
            shaped[..., 1] * cache[..., 0] + shaped[..., 0] * cache[..., 1],
        ],
        -1,
    )
    return out.flatten(3).type_as(x)


class Cached(nn.Module):
    """A table of cosines and sines as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        made = one_cache(torch.float32, torch.Generator().manual_seed(0))["cache"]
        self.register_buffer("cache", torch.cat((made, made.flip(0))))


@LAYERS.spelling("pairs_float32")
class CachedTable(Cached):
    """As in torchtune: positions choose the rows where there are any."""

    def forward(self, x, *, input_pos=None):
        cache = self.cache[: x.size(1)] if input_pos is None else self.cache[input_pos]
        shaped = x.float().reshape(*x.shape[:-1], -1, 2)
        cache = cache.view(-1, shaped.size(1), 1, shaped.size(3), 2)
        out = torch.stack(
            [
                shaped[..., 0] * cache[..., 0] - shaped[..., 1] * cache[..., 1],
                shaped[..., 1] * cache[..., 0] + shaped[..., 0] * cache[..., 1],
            ],
            -1,
        )
        return out.flatten(3).type_as(x)


@LAYERS.look_alike(CachedTable, "in its own dtype")
class OwnDtype(Cached):
    def forward(self, x, *, input_pos=None):
        shaped = x.reshape(*x.shape[:-1], -1, 2)
        cache = self.cache[: x.size(1)].view(-1, shaped.size(1), 1, shaped.size(3), 2).to(x.dtype)
        real = shaped[..., 0] * cache[..., 0] - shaped[..., 1] * cache[..., 1]
        return torch.stack(
            [real, shaped[..., 1] * cache[..., 0] + shaped[..., 0] * cache[..., 1]], -1
        ).flatten(3)


def rotate_pairs(x):
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(dim=-1)
    return torch.stack((-odd, even), dim=-1).flatten(-2)


def rotate_pairs_back(x):
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(dim=-1)
    return torch.stack((odd, -even), dim=-1).flatten(-2)


@ANGLES.spelling("pairs_full")
def by_angles(x, freqs):
    return x * freqs.cos() + rotate_pairs(x) * freqs.sin()


@ANGLES.look_alike(by_angles, "sine and cosine exchanged, with the sign of the rotated copy")
def by_other_angles(x, freqs):
    return x * freqs.cos() - rotate_pairs(x) * freqs.sin()


@ANGLES.spelling("pairs_full_inverse")
def by_angles_back(x, freqs):
    return x * torch.cos(freqs) + rotate_pairs_back(x) * torch.sin(freqs)


@ANGLES.look_alike(by_angles_back, "even channels are negated, and not moved")
def not_moved(x, freqs):
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(dim=-1)
    return x * torch.cos(freqs) + torch.stack((-even, odd), dim=-1).flatten(-2) * torch.sin(freqs)


@FEW.spelling("pairs_full_cast_first")
def few_channels(x, freqs):
    """As in x-transformers: as many channels as there are angles."""
    turned, kept = x[..., : freqs.shape[-1]], x[..., freqs.shape[-1] :]
    turned = turned * freqs.cos() + rotate_pairs(turned) * freqs.sin()
    return torch.cat((turned, kept), dim=-1).type(x.dtype)


@FEW.look_alike(few_channels, "the rotated copy is that of halves")
def few_channels_by_halves(x, freqs):
    turned, kept = x[..., : freqs.shape[-1]], x[..., freqs.shape[-1] :]
    first, second = turned.chunk(2, -1)
    turned = turned * freqs.cos() + torch.cat((-second, first), -1) * freqs.sin()
    return torch.cat((turned, kept), dim=-1).type(x.dtype)


@PAIR_OF_TABLES.spelling("pairs_full_float32_each")
def real_and_imaginary(x, freqs, use_real=True, unbind_dim=-1):
    """The form of diffusers: one function for real and for complex tables."""
    if use_real:
        cos, sin = freqs
        cos, sin = cos[None, None], sin[None, None]
        cos, sin = cos.to(x.device), sin.to(x.device)
        if unbind_dim == -1:
            real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
            rotated = torch.stack([-imaginary, real], dim=-1).flatten(3)
        elif unbind_dim == -2:
            real, imaginary = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
            rotated = torch.cat([-imaginary, real], dim=-1)
        else:
            raise ValueError(f"unbind_dim is {unbind_dim}")
        return (x.float() * cos + rotated.float() * sin).to(x.dtype)
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * freqs.unsqueeze(2)
    return torch.view_as_real(turned).flatten(3).type_as(x)


@PAIR_OF_TABLES.look_alike(real_and_imaginary, "the imaginary part is not negated")
def not_negated(x, freqs):
    cos, sin = freqs[0][None, None], freqs[1][None, None]
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack([imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos + rotated.float() * sin).to(x.dtype)


@COMPLEX.spelling("complex_float32")
def complex_product(x, freqs_cis):
    shaped = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    freqs_cis = freqs_cis.view(1, shaped.size(1), 1, shaped.size(3))
    return torch.view_as_real(shaped * freqs_cis).flatten(3).to(x.dtype)


@COMPLEX.look_alike(complex_product, "by the conjugate")
def by_the_conjugate(x, freqs_cis):
    shaped = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    freqs_cis = freqs_cis.conj().view(1, shaped.size(1), 1, shaped.size(3))
    return torch.view_as_real(shaped * freqs_cis).flatten(3).to(x.dtype)


@BATCHES.spelling("complex_float32")
def with_a_head_dimension(x, freqs_cis):
    shaped = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(shaped * freqs_cis.unsqueeze(2)).flatten(-2).type_as(x)


@BATCHES.look_alike(with_a_head_dimension, "halves as real and imaginary parts")
def halves_as_parts(x, freqs_cis):
    first, second = x.float().chunk(2, -1)
    turned = torch.complex(first, second) * freqs_cis.unsqueeze(2)
    return torch.cat((turned.real, turned.imag), -1).type_as(x)


@COMPLEX.spelling("complex_float64")
def in_float64(x, freqs_cis):
    """The complex form of Wan."""
    shaped = torch.view_as_complex(x.to(torch.float64).unflatten(3, (-1, 2)))
    return torch.view_as_real(shaped * freqs_cis[None, :, None]).flatten(3, 4).type_as(x)


@COMPLEX.look_alike(in_float64, "in float32")
def in_float32(x, freqs_cis):
    shaped = torch.view_as_complex(x.to(torch.float32).unflatten(3, (-1, 2)))
    return torch.view_as_real(shaped * freqs_cis[None, :, None]).flatten(3, 4).type_as(x)


def reshaped(freqs_cis, x):
    shape = [d if i == 1 or i == x.ndim - 1 else 1 for i, d in enumerate(x.shape)]
    return freqs_cis.view(*shape)


@BOTH.spelling("complex_float32")
def first_llama(xq, xk, freqs_cis):
    """As in the first Llama: the table is given the shape of the queries."""
    q = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    k = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    freqs_cis = reshaped(freqs_cis, q)
    q = torch.view_as_real(q * freqs_cis).flatten(3)
    k = torch.view_as_real(k * freqs_cis).flatten(3)
    return q.type_as(xq), k.type_as(xk)


@BOTH.look_alike(first_llama, "keys are not turned")
def keys_are_not_turned(xq, xk, freqs_cis):
    q = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    k = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    q = torch.view_as_real(q * reshaped(freqs_cis, q)).flatten(3)
    return q.type_as(xq), torch.view_as_real(k).flatten(3).type_as(xk)


@SCALED.spelling("pairs_full_scaled_first")
def few_channels_scaled(x, freqs, scale=0.75):
    """x-transformers' rotation with its factor, that of xPos."""
    width = freqs.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    turned = (turned * freqs.cos() * scale) + (rotate_pairs(turned) * freqs.sin() * scale)
    return torch.cat((turned, kept), dim=-1).type(x.dtype)


@SCALED.look_alike(few_channels_scaled, "one product is scaled")
def one_product_scaled(x, freqs, scale=0.75):
    width = freqs.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    turned = (turned * freqs.cos() * scale) + rotate_pairs(turned) * freqs.sin()
    return torch.cat((turned, kept), dim=-1).type(x.dtype)


@SCALED.look_alike(few_channels_scaled, "the sum is scaled, which rounds otherwise")
def sum_scaled(x, freqs, scale=0.75):
    width = freqs.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    turned = (turned * freqs.cos() + rotate_pairs(turned) * freqs.sin()) * scale
    return torch.cat((turned, kept), dim=-1).type(x.dtype)


@MATRICES.spelling("matrix_float32")
def by_matrices(x, freqs):
    """As in the first Flux: each pair times a matrix of its own."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    out = freqs[..., 0] * pairs[..., 0] + freqs[..., 1] * pairs[..., 1]
    return out.reshape(*x.shape).type_as(x)


@MATRICES.look_alike(by_matrices, "the matrices transposed")
def by_transposed_matrices(x, freqs):
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    first = freqs[..., 0, 0] * pairs[..., 0] + freqs[..., 1, 0] * pairs[..., 1]
    second = freqs[..., 0, 1] * pairs[..., 0] + freqs[..., 1, 1] * pairs[..., 1]
    return torch.stack((first, second), -1).flatten(3).type_as(x)
