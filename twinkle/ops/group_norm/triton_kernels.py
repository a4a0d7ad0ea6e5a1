"""GroupNorm on the GPU, alone or with the SiLU that is its next step: one pass each way over memory.

A program has one group of one sample and reads it twice, the second time from the cache. Bytes an element:
forward reads one and writes one, backward reads two and writes one. Statistics and arithmetic are float32;
the normed value is rounded before the activation, as torch rounds it; gradients are rounded once. A program
leaves the sums of its channels for weight and bias, which one reduction over the samples adds in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward_kernel", "forward_kernel"]


@triton.jit
def _channels(w, b, channel, ok, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    scale = channel.to(tl.float32) * 0.0 + 1.0
    shift = scale - 1.0
    if WEIGHT:
        scale = tl.load(w + channel, mask=ok, other=0.0).to(tl.float32)
    if BIAS:
        shift = tl.load(b + channel, mask=ok, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def forward_kernel(
    x,
    w,
    b,
    y,
    stats,
    groups,
    channels,
    places,
    x_sample,
    x_channel,
    x_place,
    eps,
    CH: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STATS: tl.constexpr,
):
    """One group of one sample: ``channels`` of them, each of ``places`` values."""
    program = tl.program_id(0)
    sample, group = (program // groups).to(tl.int64), program % groups
    x += sample * x_sample + group * channels * x_channel
    y += program.to(tl.int64) * channels * places
    mean = 0.0
    squares = 0.0
    before = 0.0
    for first in range(0, channels, CH):
        channel = first + tl.arange(0, CH)[:, None]
        for start in range(0, places, BLOCK):
            place = start + tl.arange(0, BLOCK)[None, :]
            ok = (channel < channels) & (place < places)
            count = tl.minimum(channels - first, CH) * tl.minimum(places - start, BLOCK)
            count = count.to(tl.float32)
            h = tl.load(x + channel * x_channel + place * x_place, mask=ok, other=0.0).to(tl.float32)
            own = tl.sum(h) / count
            h = tl.where(ok, h - own, 0.0)
            # Two means and two sums of squares about them, made one (Chan et al. 1979).
            off = own - mean
            share = count / (before + count)
            squares += tl.sum(h * h) + off * off * (before * share)
            mean += off * share
            before += count
    root = tl.rsqrt(squares / before + eps)
    for first in range(0, channels, CH):
        channel = first + tl.arange(0, CH)[:, None]
        scale, shift = _channels(w, b, group * channels + channel, channel < channels, WEIGHT, BIAS)
        for start in range(0, places, BLOCK):
            place = start + tl.arange(0, BLOCK)[None, :]
            ok = (channel < channels) & (place < places)
            h = tl.load(x + channel * x_channel + place * x_place, mask=ok, other=0.0).to(tl.float32)
            z = (h - mean) * root * scale + shift
            if ACTIVATION != "none":
                z = z.to(x.dtype.element_ty).to(tl.float32)
                gate = tl.sigmoid(z)
                if ACTIVATION == "swish":
                    gate = gate.to(x.dtype.element_ty).to(tl.float32)
                z = z * gate
            tl.store(y + channel * places + place, z.to(y.dtype.element_ty), mask=ok)
    if STATS:
        tl.store(stats + program, mean)
        tl.store(stats + tl.num_programs(0) + program, root)


@triton.jit
def _normed(dy, x, dy_at, x_at, ok, mean, root, scale, shift, ACTIVATION: tl.constexpr):
    """The normed value before the affine part, and what reaches it behind that: through the activation."""
    n = (tl.load(x + x_at, mask=ok, other=0.0).to(tl.float32) - mean) * root
    g = tl.load(dy + dy_at, mask=ok, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        z = (n * scale + shift).to(x.dtype.element_ty).to(tl.float32)
        s = tl.sigmoid(z)
        g = g * (s * (1.0 + z * (1.0 - s)))
    return n, g


@triton.jit
def backward_kernel(
    dy,
    x,
    w,
    b,
    stats,
    dx,
    partial,
    groups,
    channels,
    places,
    dy_sample,
    dy_channel,
    dy_place,
    x_sample,
    x_channel,
    x_place,
    CH: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUMS: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
):
    """Gradients of one group of one sample, and the sums of its channels for weight and bias."""
    program = tl.program_id(0)
    sample, group = (program // groups).to(tl.int64), program % groups
    x += sample * x_sample + group * channels * x_channel
    dx += sample * x_sample + group * channels * x_channel
    dy += sample * dy_sample + group * channels * dy_channel
    # [samples, two sums, channels of all groups]
    partial += sample * 2 * groups * channels + group * channels
    mean = tl.load(stats + program)
    root = tl.load(stats + tl.num_programs(0) + program)
    level = 0.0
    dot = 0.0
    for first in range(0, channels, CH):
        channel = first + tl.arange(0, CH)[:, None]
        inside = channel < channels
        scale, shift = _channels(w, b, group * channels + channel, inside, WEIGHT, BIAS)
        levels = tl.zeros([CH, BLOCK], tl.float32)
        dots = tl.zeros([CH, BLOCK], tl.float32)
        for start in range(0, places, BLOCK):
            place = start + tl.arange(0, BLOCK)[None, :]
            ok = inside & (place < places)
            x_at, dy_at = channel * x_channel + place * x_place, channel * dy_channel + place * dy_place
            n, g = _normed(dy, x, dy_at, x_at, ok, mean, root, scale, shift, ACTIVATION)
            levels += g
            dots += g * n
        own_level = tl.sum(levels, axis=1, keep_dims=True)
        own_dot = tl.sum(dots, axis=1, keep_dims=True)
        if SUMS:
            tl.store(partial + channel, own_dot, mask=inside)
            tl.store(partial + groups * channels + channel, own_level, mask=inside)
        level += tl.sum(own_level * scale)
        dot += tl.sum(own_dot * scale)
    if INPUT_GRAD:
        level = level / (channels * places)
        dot = dot / (channels * places)
        for first in range(0, channels, CH):
            channel = first + tl.arange(0, CH)[:, None]
            inside = channel < channels
            scale, shift = _channels(w, b, group * channels + channel, inside, WEIGHT, BIAS)
            for start in range(0, places, BLOCK):
                place = start + tl.arange(0, BLOCK)[None, :]
                ok = inside & (place < places)
                x_at, dy_at = channel * x_channel + place * x_place, channel * dy_channel + place * dy_place
                n, g = _normed(dy, x, dy_at, x_at, ok, mean, root, scale, shift, ACTIVATION)
                d = (g * scale - level - n * dot) * root
                tl.store(dx + x_at, d.to(dx.dtype.element_ty), mask=ok)
