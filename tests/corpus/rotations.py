"""Spellings of rotations whose pairs are halves: channel i with channel i + d/2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from spelling import Corpus
from torch import nn

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

__all__ = ["CORPORA", "random", "tables"]

BATCH, HEADS, TOKENS, WIDTH = 2, 3, 5, 8


def random(dtype: torch.dtype, generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=generator).to(dtype)


def tables(dtype: torch.dtype, generator: torch.Generator, *shape: int) -> dict[str, Tensor]:
    """``cos`` and ``sin`` of random angles."""
    angle = torch.randn(*shape, generator=generator) * 3
    return {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}


def heads_first(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, heads, tokens, 8]``, tables as ``[tokens, 4]``."""
    x = random(dtype, generator, BATCH, HEADS, TOKENS, WIDTH)
    return {"x": x, **tables(dtype, generator, TOKENS, WIDTH // 2)}


def tokens_first(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, tokens, heads, 8]``, tables as ``[1, tokens, 1, 4]`` in the same dtype."""
    x = random(dtype, generator, BATCH, TOKENS, HEADS, WIDTH)
    return {"x": x, **tables(dtype, generator, 1, TOKENS, 1, WIDTH // 2)}


def wide_tables(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, heads, tokens, 8]``, float32 tables as ``[tokens, 4]``."""
    return {**heads_first(dtype, generator), **tables(torch.float32, generator, TOKENS, WIDTH // 2)}


def full_tables(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, heads, tokens, 8]``, tables as ``[tokens, 8]``."""
    return {**heads_first(dtype, generator), **tables(dtype, generator, TOKENS, WIDTH)}


def two_tensors(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``q`` and ``k`` with their own heads, tables as ``[batch, tokens, 4]``."""
    q = random(dtype, generator, BATCH, HEADS, TOKENS, WIDTH)
    k = random(dtype, generator, BATCH, 1, TOKENS, WIDTH)
    return {"q": q, "k": k, **tables(dtype, generator, BATCH, TOKENS, WIDTH // 2)}


def part_of_channels(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` with 8 channels of which the tables cover 4."""
    return {**heads_first(dtype, generator), **tables(dtype, generator, TOKENS, WIDTH // 4)}


def part_of_channels_full(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` with 8 channels of which the tables cover 4, an entry a channel."""
    return {**heads_first(dtype, generator), **tables(dtype, generator, TOKENS, WIDTH // 2)}


def real_pair(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x``, and a pair of float32 tables as ``[tokens, 8]``."""
    x = random(dtype, generator, BATCH, HEADS, TOKENS, WIDTH)
    return {"x": x, "freqs": tuple(tables(torch.float32, generator, TOKENS, WIDTH).values())}


def angles(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` and float32 angles as ``[tokens, 4]``."""
    x = random(dtype, generator, BATCH, HEADS, TOKENS, WIDTH)
    return {"x": x, "theta": random(torch.float32, generator, TOKENS, WIDTH // 2)}


def only_x(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, tokens, heads, 8]`` for a layer that holds its tables."""
    return {"x": random(dtype, generator, BATCH, TOKENS, HEADS, WIDTH)}


def _corpus(inputs: Any) -> Corpus:
    return Corpus("rotary", inputs=inputs, constant=("cos", "sin", "freqs", "theta"))


HALVES, TOKENS_FIRST, WIDE, FULL = map(_corpus, (heads_first, tokens_first, wide_tables, full_tables))
BOTH, PART, PART_FULL = map(_corpus, (two_tensors, part_of_channels, part_of_channels_full))
PAIR_OF_TABLES, ANGLES, LAYERS = map(_corpus, (real_pair, angles, only_x))
CORPORA = (HALVES, TOKENS_FIRST, WIDE, FULL, BOTH, PART, PART_FULL, PAIR_OF_TABLES, ANGLES, LAYERS)


@TOKENS_FIRST.spelling("halves_inverse")
def turned_back(x, cos, sin):
    """As nanochat writes it: the sine is negated in the second line."""
    assert x.ndim == 4
    d = x.shape[3] // 2
    x1, x2 = x[..., :d], x[..., d:]
    y1 = x1 * cos + x2 * sin
    y2 = x1 * (-sin) + x2 * cos
    return torch.cat([y1, y2], 3)


@TOKENS_FIRST.look_alike(turned_back, "both signs are plus")
def no_rotation(x, cos, sin):
    d = x.shape[3] // 2
    x1, x2 = x[..., :d], x[..., d:]
    return torch.cat([x1 * cos + x2 * sin, x1 * sin + x2 * cos], 3)


@TOKENS_FIRST.look_alike(turned_back, "the other way round")
def turned_forth(x, cos, sin):
    d = x.shape[3] // 2
    x1, x2 = x[..., :d], x[..., d:]
    return torch.cat([x1 * cos + x2 * (-sin), x1 * sin + x2 * cos], 3)


@TOKENS_FIRST.look_alike(turned_back, "results exchanged")
def exchanged_results(x, cos, sin):
    d = x.shape[3] // 2
    x1, x2 = x[..., :d], x[..., d:]
    return torch.cat([x1 * (-sin) + x2 * cos, x1 * cos + x2 * sin], 3)


@WIDE.spelling("halves_cast_inverse")
def turned_back_and_cast(x, cos, sin):
    """Its earlier form: tables of another dtype, results cast back."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    out = torch.cat([a * cos + b * sin, b * cos + a * (-sin)], dim=-1)
    return out.to(x.dtype)


@WIDE.look_alike(turned_back_and_cast, "not cast back")
def not_cast_back(x, cos, sin):
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos + b * sin, b * cos + a * (-sin)], dim=-1)


@HALVES.spelling("halves")
def by_chunk(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


@HALVES.look_alike(by_chunk, "halves exchanged")
def exchanged_halves(x, cos, sin):
    second, first = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


@HALVES.look_alike(by_chunk, "joined as pairs")
def joined_as_pairs(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)


@HALVES.spelling("halves")
def by_split(x, cos, sin):
    first, second = torch.split(x, x.size(-1) // 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@HALVES.look_alike(by_split, "quarters of which two are used")
def by_quarters(x, cos, sin):
    parts = torch.split(x, x.size(-1) // 4, dim=-1)
    first, second = torch.cat(parts[0:2], -1), torch.cat(parts[0:2], -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@HALVES.spelling("halves")
def by_tensor_split(x, cos, sin):
    first, second = x.tensor_split(2, dim=-1)
    rotated_first = first * cos - second * sin
    rotated_second = first * sin + second * cos
    return torch.concat([rotated_first, rotated_second], axis=-1)


@HALVES.look_alike(by_tensor_split, "the sine of the other product is negated")
def other_product(x, cos, sin):
    first, second = x.tensor_split(2, dim=-1)
    return torch.concat([second * cos - first * sin, first * cos + second * sin], axis=-1)


@HALVES.spelling("halves")
def by_reshape(x, cos, sin):
    first, second = x.reshape(*x.shape[:-1], 2, -1).unbind(dim=-2)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-2).flatten(-2)


@HALVES.look_alike(by_reshape, "stacked at the end")
def stacked_at_the_end(x, cos, sin):
    first, second = x.reshape(*x.shape[:-1], 2, -1).unbind(dim=-2)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)


@HALVES.spelling("halves_cast")
def by_assignment(x, cos, sin):
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    out[..., :half] = x[..., :half] * cos - x[..., half:] * sin
    out[..., half:] = x[..., half:] * cos + x[..., :half] * sin
    return out


@HALVES.look_alike(by_assignment, "the second line reads what the first one wrote")
def reads_what_it_wrote(x, cos, sin):
    out = x.clone()
    half = x.shape[-1] // 2
    out[..., :half] = out[..., :half] * cos - out[..., half:] * sin
    out[..., half:] = out[..., half:] * cos + out[..., :half] * sin
    return out


@WIDE.spelling("halves_float32")
def in_float32(x, cos, sin):
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


@WIDE.look_alike(in_float32, "rounded before the joining, with the tables rounded first")
def tables_rounded_first(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


@WIDE.look_alike(in_float32, "left in float32")
def left_in_float32(x, cos, sin):
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


@BOTH.spelling("split_half")
def queries_and_keys(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    q1, q2 = q.chunk(2, -1)
    k1, k2 = k.chunk(2, -1)
    q = torch.cat([q1 * cos - q2 * sin, q2 * cos + q1 * sin], -1)
    k = torch.cat([k1 * cos - k2 * sin, k2 * cos + k1 * sin], -1)
    return q, k


@BOTH.look_alike(queries_and_keys, "keys turn the other way")
def keys_turn_back(q, k, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    q1, q2 = q.chunk(2, -1)
    k1, k2 = k.chunk(2, -1)
    q = torch.cat([q1 * cos - q2 * sin, q2 * cos + q1 * sin], -1)
    k = torch.cat([k1 * cos + k2 * sin, k2 * cos - k1 * sin], -1)
    return q, k


@BOTH.spelling("halves")
def both_from_one_table(q, k, cos, sin):
    """Tables by slices, and keys that are turned by a helper as queries are."""
    cos, sin = cos[:, None, : q.shape[2]], sin[:, None, : q.shape[2]]
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x, cos, sin):
    half = x.shape[-1] // 2
    a, b = x[:, :, :, :half], x[:, :, :, half:]
    return torch.cat((-b * sin + a * cos, b * cos + a * sin), -1)


@BOTH.look_alike(both_from_one_table, "queries have the tables of keys exchanged")
def tables_of_keys_exchanged(q, k, cos, sin):
    cos, sin = cos[:, None, : q.shape[2]], sin[:, None, : q.shape[2]]
    return _turned(q, cos, sin), _turned(k, sin, cos)


@ANGLES.spelling("halves_float32")
def by_angles(x, theta):
    cos, sin = theta.cos(), theta.sin()
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


@ANGLES.look_alike(by_angles, "sine and cosine are those of different angles")
def in_its_own_dtype(x, theta):
    a, b = x.chunk(2, -1)
    cos, sin = theta.cos().to(x.dtype), theta.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Tables(nn.Module):
    """Tables of one entry a pair, as buffers."""

    def __init__(self) -> None:
        super().__init__()
        for name, table in tables(torch.float32, torch.Generator().manual_seed(0), 9, WIDTH // 2).items():
            self.register_buffer(name, table)


@LAYERS.spelling("halves_float32_inverse")
class OwnTables(Tables):
    """A layer with cached tables, as in modded-nanogpt."""

    def forward(self, x):
        cos, sin = self.cos[None, : x.size(-3), None, :], self.sin[None, : x.size(-3), None, :]
        x1, x2 = x.to(dtype=torch.float32).chunk(2, dim=-1)
        y1 = x1 * cos + x2 * sin
        y2 = x1 * (-sin) + x2 * cos
        return torch.cat((y1, y2), 3).type_as(x)


@LAYERS.look_alike(OwnTables, "along the heads")
class AlongHeads(Tables):
    def forward(self, x):
        cos, sin = self.cos[None, : x.size(-3), None, :], self.sin[None, : x.size(-3), None, :]
        x1, x2 = x.to(dtype=torch.float32).chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), 2).type_as(x)


@PART.spelling("halves_first")
def by_sizes(x, cos, sin):
    turned = 2 * cos.shape[-1]
    rotated, kept = x.split([turned, x.shape[-1] - turned], dim=-1)
    a, b = rotated.chunk(2, dim=-1)
    return torch.cat((torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1), kept), dim=-1)


@PART.look_alike(by_sizes, "the last channels are turned")
def last_channels(x, cos, sin):
    turned = 2 * cos.shape[-1]
    kept, rotated = x.split([x.shape[-1] - turned, turned], dim=-1)
    a, b = rotated.chunk(2, dim=-1)
    return torch.cat((kept, torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)), dim=-1)


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_back(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, -first), dim=-1)


@PART_FULL.spelling("halves_full_first")
def by_slices(x, cos, sin):
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    return torch.cat((turned * cos + rotate_half(turned) * sin, kept), dim=-1)


@PART_FULL.look_alike(by_slices, "channels that are kept stand first")
def kept_first(x, cos, sin):
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    return torch.cat((kept, turned * cos + rotate_half(turned) * sin), dim=-1)


@PART.spelling("halves_full_first")
def doubled_tables(x, cos, sin):
    width = cos.shape[-1] * 2
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    turned = x[..., :width] * cos + rotate_half(x[..., :width]) * sin
    return torch.cat([turned, x[..., width:]], dim=-1)


@PART.look_alike(doubled_tables, "turned back")
def doubled_tables_back(x, cos, sin):
    width = cos.shape[-1] * 2
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    turned = x[..., :width] * cos + rotate_back(x[..., :width]) * sin
    return torch.cat([turned, x[..., width:]], dim=-1)


@FULL.spelling("halves_full")
def one_tensor(x, cos, sin):
    return x * cos[None, None, : x.shape[-2], :] + rotate_half(x) * sin[None, None, : x.shape[-2], :]


@FULL.look_alike(one_tensor, "sine and rotated copy subtracted")
def subtracted(x, cos, sin):
    return x * cos[None, None, : x.shape[-2], :] - rotate_half(x) * sin[None, None, : x.shape[-2], :]


@FULL.look_alike(one_tensor, "halves of the rotated copy exchanged")
def rotated_otherwise(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((first, -second), dim=-1)
    return x * cos[None, None, : x.shape[-2], :] + rotated * sin[None, None, : x.shape[-2], :]


@FULL.spelling("halves_full_cast")
def one_tensor_and_cast(x, cos, sin):
    cos, sin = cos.view(1, 1, *cos.shape), sin.view(1, 1, *sin.shape)
    return (rotate_half(x) * sin + x * cos).type_as(x)


@FULL.look_alike(one_tensor_and_cast, "turned back")
def one_tensor_back(x, cos, sin):
    cos, sin = cos.view(1, 1, *cos.shape), sin.view(1, 1, *sin.shape)
    return (rotate_back(x) * sin + x * cos).type_as(x)


@PAIR_OF_TABLES.spelling("halves_full_float32_each")
def real_and_imaginary_halves(x, freqs, unbind_dim=-2):
    """The real form of diffusers with its other ``unbind_dim``."""
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


@PAIR_OF_TABLES.look_alike(real_and_imaginary_halves, "cast once, before the rotation")
def cast_once(x, freqs):
    cos, sin = freqs
    wide = x.float()
    return (wide * cos[None, None] + rotate_half(wide) * sin[None, None]).to(x.dtype)


@PAIR_OF_TABLES.look_alike(real_and_imaginary_halves, "the tables exchanged")
def tables_exchanged(x, freqs):
    cos, sin = freqs
    return (x.float() * sin[None, None] - rotate_half(x).float() * cos[None, None]).to(x.dtype)


@PAIR_OF_TABLES.look_alike(real_and_imaginary_halves, "each half cast twice, which rounds four gradients")
def cast_in_each_line(x, freqs):
    cos, sin = freqs[0][None, None, :, : WIDTH // 2], freqs[1][None, None, :, : WIDTH // 2]
    a, b = x.chunk(2, -1)
    first = a.float() * cos - b.float() * sin
    second = b.float() * cos + a.float() * sin
    return torch.cat((first, second), -1).to(x.dtype)
