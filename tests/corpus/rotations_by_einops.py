"""Spellings of rotations with einops: ``rearrange`` in the place of ``reshape`` and ``flatten``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rotations import BATCH, HEADS, TOKENS, WIDTH, random
from rotations_by_pairs import angles
from rotations_by_products import angles as half_angles
from spelling import Corpus

try:
    from einops import rearrange, repeat
except ImportError:
    from tiny_einops import rearrange, repeat

if TYPE_CHECKING:
    from typing import Any

__all__ = ["CORPORA"]


def of_rows(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` as ``[batch, heads, tokens, 8]``, angles as ``[batch, tokens, 8]``."""
    x = random(dtype, generator, BATCH, HEADS, TOKENS, WIDTH)
    return {"x": x, "freqs": random(dtype, generator, BATCH, TOKENS, WIDTH)}


def scaled_rows(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``t`` as ``[batch, heads, tokens, 8]``; angles and factors for 4 channels as ``[1, tokens, 4]``."""
    t = random(dtype, generator, BATCH, HEADS, TOKENS, WIDTH)
    freqs = random(dtype, generator, 1, TOKENS, WIDTH // 2)
    scale = (torch.rand(1, TOKENS, WIDTH // 2, generator=generator) + 0.5).to(dtype)
    return {"t": t, "freqs": freqs, "scale": scale}


def _corpus(inputs: Any) -> Corpus:
    return Corpus("rotary", inputs=inputs, constant=("freqs", "angles", "scale"))


ANGLES, ROWS, HALF, SCALED = map(_corpus, (angles, of_rows, half_angles, scaled_rows))
CORPORA = (ANGLES, ROWS, HALF, SCALED)


def rotate_pairs(x):
    x = rearrange(x, "... (d r) -> ... d r", r=2)
    x1, x2 = x.unbind(dim=-1)
    x = torch.stack((-x2, x1), dim=-1)
    return rearrange(x, "... d r -> ... (d r)")


def rotate_halves(x):
    x = rearrange(x, "... (j d) -> ... j d", j=2)
    x1, x2 = x.unbind(dim=-2)
    return torch.cat((-x2, x1), dim=-1)


@ANGLES.spelling("pairs_full")
def pairs(x, freqs):
    """As in rotary-embedding-torch."""
    return (x * freqs.cos()) + (rotate_pairs(x) * freqs.sin())


@ANGLES.look_alike(pairs, "split as halves, joined as pairs")
def split_as_halves(x, freqs):
    parts = rearrange(x, "... (r d) -> ... d r", r=2)
    x1, x2 = parts.unbind(dim=-1)
    turned = rearrange(torch.stack((-x2, x1), dim=-1), "... d r -> ... (d r)")
    return (x * freqs.cos()) + (turned * freqs.sin())


@ANGLES.look_alike(pairs, "joined as halves")
def joined_as_halves(x, freqs):
    x1, x2 = rearrange(x, "... (d r) -> ... d r", r=2).unbind(dim=-1)
    turned = rearrange(torch.stack((-x2, x1), dim=-1), "... d r -> ... (r d)")
    return (x * freqs.cos()) + (turned * freqs.sin())


@ANGLES.look_alike(pairs, "groups of four channels")
def groups_of_four(x, freqs):
    parts = rearrange(x, "... (d r) -> ... d r", r=4)
    x1, x2 = parts[..., :2], parts[..., 2:]
    turned = rearrange(torch.cat((-x2, x1), dim=-1), "... d r -> ... (d r)")
    return (x * freqs.cos()) + (turned * freqs.sin())


@ANGLES.look_alike(pairs, "the other way round")
def turned_back(x, freqs):
    return (x * freqs.cos()) - (rotate_pairs(x) * freqs.sin())


@ANGLES.spelling("halves_full")
def halves(x, freqs):
    """As in x-transformers' older releases."""
    return (x * freqs.cos()) + (rotate_halves(x) * freqs.sin())


@ANGLES.look_alike(halves, "halves exchanged")
def halves_exchanged(x, freqs):
    x1, x2 = rearrange(x, "... (j d) -> ... j d", j=2).unbind(dim=-2)
    return (x * freqs.cos()) + (torch.cat((x2, -x1), dim=-1) * freqs.sin())


@ANGLES.look_alike(halves, "the number of channels of a part is given, not of parts")
def as_many_channels(x, freqs):
    x1, x2 = rearrange(x, "... (j d) -> ... j d", d=4).unbind(dim=-2)
    return (x * freqs.cos()) + (torch.cat((x1, x2), dim=-1) * freqs.sin())


@ROWS.spelling("pairs_full")
def rows_with_a_head_dimension(x, freqs):
    """The table gets its head dimension by a pattern, and axes have names."""
    freqs = rearrange(freqs, "b n d -> b 1 n d")
    x1, x2 = rearrange(x, "b h n (d r) -> b h n d r", r=2).unbind(dim=-1)
    turned = rearrange(torch.stack((-x2, x1), dim=-1), "b h n d r -> b h n (d r)")
    return (x * freqs.cos()) + (turned * freqs.sin())


@ROWS.look_alike(rows_with_a_head_dimension, "halves are joined as pairs")
def rows_of_halves(x, freqs):
    freqs = rearrange(freqs, "b n d -> b 1 n d")
    x1, x2 = rearrange(x, "b h n (r d) -> b h n r d", r=2).unbind(dim=-2)
    turned = rearrange(torch.stack((-x2, x1), dim=-1), "b h n d r -> b h n (d r)")
    return (x * freqs.cos()) + (turned * freqs.sin())


@ROWS.look_alike(rows_with_a_head_dimension, "axes that are merged stand in the other order")
def merged_in_the_other_order(x, freqs):
    freqs = rearrange(freqs, "b n d -> b 1 n d")
    x1, x2 = rearrange(x, "b h n (d r) -> b h n d r", r=2).unbind(dim=-1)
    turned = rearrange(torch.stack((-x2, x1), dim=-1), "b h n d r -> b h n (r d)")
    return (x * freqs.cos()) + (turned * freqs.sin())


@HALF.spelling("complex_float32")
def complex_numbers(x, angles):
    """A complex product between two patterns."""
    table = rearrange(torch.polar(torch.ones_like(angles), angles), "n d -> 1 1 n d")
    numbers = torch.view_as_complex(rearrange(x.float(), "b h n (d r) -> b h n d r", r=2))
    return rearrange(torch.view_as_real(numbers * table), "b h n d r -> b h n (d r)").type_as(x)


@HALF.look_alike(complex_numbers, "halves are the real and the imaginary parts")
def complex_halves(x, angles):
    table = rearrange(torch.polar(torch.ones_like(angles), angles), "n d -> 1 1 n d")
    numbers = torch.view_as_complex(rearrange(x.float(), "b h n (r d) -> b h n d r", r=2).contiguous())
    return rearrange(torch.view_as_real(numbers * table), "b h n d r -> b h n (d r)").type_as(x)


@HALF.spelling("halves_full")
def repeated_angles(x, angles):
    """Angles that ``repeat`` makes as wide as a head."""
    freqs = repeat(angles, "n d -> n (r d)", r=2)
    return x * freqs.cos() + rotate_halves(x) * freqs.sin()


@HALF.look_alike(repeated_angles, "pairs are turned by the angles of halves")
def pairs_by_angles_of_halves(x, angles):
    freqs = repeat(angles, "n d -> n (r d)", r=2)
    return x * freqs.cos() + rotate_pairs(x) * freqs.sin()


@SCALED.spelling("pairs_full_scaled_first")
def with_a_factor(t, freqs, scale=1):
    """xPos as in x-transformers: the last rows of the tables, with a head dimension where there are heads."""
    width, tokens, dtype = freqs.shape[-1], t.shape[-2], t.dtype
    freqs = freqs[:, -tokens:, :]
    scale = scale[:, -tokens:, :] if isinstance(scale, torch.Tensor) else scale
    if t.ndim == 4 and freqs.ndim == 3:
        freqs = rearrange(freqs, "b n d -> b 1 n d")
        if isinstance(scale, torch.Tensor):
            scale = rearrange(scale, "b n d -> b 1 n d")
    t, kept = t[..., :width], t[..., width:]
    t = (t * freqs.cos() * scale) + (rotate_pairs(t) * freqs.sin() * scale)
    return torch.cat((t, kept), dim=-1).type(dtype)


@SCALED.look_alike(with_a_factor, "the factor is that of the angles")
def factor_of_the_angles(t, freqs, scale=1):
    width, dtype = freqs.shape[-1], t.dtype
    freqs = rearrange(freqs, "b n d -> b 1 n d") * rearrange(scale, "b n d -> b 1 n d")
    t, kept = t[..., :width], t[..., width:]
    t = (t * freqs.cos()) + (rotate_pairs(t) * freqs.sin())
    return torch.cat((t, kept), dim=-1).type(dtype)


@SCALED.look_alike(with_a_factor, "products are divided by the factor")
def divided_by_the_factor(t, freqs, scale=1):
    width, dtype = freqs.shape[-1], t.dtype
    freqs, scale = rearrange(freqs, "b n d -> b 1 n d"), rearrange(scale, "b n d -> b 1 n d")
    t, kept = t[..., :width], t[..., width:]
    t = (t * freqs.cos() / scale) + (rotate_pairs(t) * freqs.sin() / scale)
    return torch.cat((t, kept), dim=-1).type(dtype)


@SCALED.spelling("halves_full_scaled_wide")
def with_a_factor_for_all(t, freqs, scale):
    """The factor of all channels, and no cast."""
    width = t.shape[-1] // 2
    freqs, scale = torch.cat((freqs, freqs), -1)[:, None], torch.cat((scale, scale), -1)[:, None]
    rotated = torch.cat((-t[..., width:], t[..., :width]), dim=-1)
    return t * freqs.cos() * scale + rotated * freqs.sin() * scale


@SCALED.look_alike(with_a_factor_for_all, "the factor comes first, which rounds otherwise")
def factor_first(t, freqs, scale):
    width = t.shape[-1] // 2
    freqs, scale = torch.cat((freqs, freqs), -1)[:, None], torch.cat((scale, scale), -1)[:, None]
    rotated = torch.cat((-t[..., width:], t[..., :width]), dim=-1)
    return t * scale * freqs.cos() + rotated * scale * freqs.sin()
