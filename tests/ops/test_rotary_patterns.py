"""Patterns of einops: what they do with the channels, and rotations that are written with them."""

from __future__ import annotations

import sys

import pytest
import tiny_einops
import torch
from tiny_einops import rearrange

from twinkle.match.structure import recognise
from twinkle.ops.rotary.patterns import Merge, Split, move_of
from twinkle.ops.rotary.triton_backend import function_for


@pytest.mark.parametrize(
    ("pattern", "sizes", "move"),
    [
        ("... (d r) -> ... d r", {"r": 2}, Split(None, 1, 2)),
        ("... (r d) -> ... r d", {"r": 2}, Split(None, 0, 2)),
        ("b h n (d r) -> b h n d r", {"r": 2}, Split(3, 1, 2)),
        ("b n (d r) -> b n d r", {"r": 2}, Split(2, 1, 2)),
        ("...(d two)->... d two", {"two": 2}, Split(None, 1, 2)),
        ("... d r -> ... (d r)", {}, Merge(None)),
        ("b h n d r -> b h n (d r)", {}, Merge(3)),
    ],
)
def test_patterns_that_split_or_merge_the_channels(pattern, sizes, move):
    assert move_of(pattern, sizes) == move


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        ("... (d r) -> ... r d", {"r": 2}),  # exchanged
        ("... d r -> ... (r d)", {}),
        ("b h n (d r) -> b n h d r", {"r": 2}),  # axes moved
        ("b h n d r -> b n h (d r)", {}),
        ("b (h r) n d -> b h r n d", {"r": 2}),  # another axis
        ("... (d r) -> ... d r", {}),  # einops raises
        ("... (d r) -> ... d r", {"r": 2, "d": 4}),
        ("... (d r) -> ... d r", {"k": 2}),
        ("... (d r s) -> ... d r s", {"r": 2, "s": 2}),
        ("... d -> ... d", {}),
        ("... (d d) -> ... d d", {"d": 2}),
        ("b n d -> b 1 n d", {}),
        ("(b h) n (d r) -> (b h) n d r", {"r": 2, "h": 2}),
        ("... (d r -> ... d r", {"r": 2}),
        ("... (d (r)) -> ... d r", {"r": 2}),
        ("... (d r)", {"r": 2}),
        ("b ... (d r) -> b ... d r", {"r": 2}),
        ("...(d r)->...d r", {"r": 2}),  # dots have a space behind them
        ("", {}),
    ],
)
def test_all_other_patterns_are_no_such_move(pattern, sizes):
    assert move_of(pattern, sizes) is None


def rotate_half(x):
    x = rearrange(x, "... (d r) -> ... d r", r=2)
    x1, x2 = x.unbind(dim=-1)
    return rearrange(torch.stack((-x2, x1), dim=-1), "... d r -> ... (d r)")


def with_rows(x, freqs):
    freqs = rearrange(freqs, "b n d -> b 1 n d")
    return x * freqs.cos() + rotate_half(x) * freqs.sin()


def of_three_axes(x, freqs):
    x1, x2 = rearrange(x, "b n (d r) -> b n d r", r=2).unbind(dim=-1)
    turned = rearrange(torch.stack((-x2, x1), dim=-1), "b n d r -> b n (d r)")
    return x * freqs.cos() + turned * freqs.sin()


def test_the_tables_of_a_kernel_are_made_by_einops(kernels, monkeypatch):
    monkeypatch.setitem(sys.modules, "einops", tiny_einops.module)
    found = recognise(with_rows)
    assert found.facts["cos"] == "_tw_einops.rearrange(freqs, 'b n d -> b 1 n d').cos()"
    made = function_for(found.variant, found.facts, with_rows)
    x, freqs = (torch.randn(shape, device=kernels) for shape in ((2, 3, 5, 8), (2, 5, 8)))
    x.requires_grad_()
    ours, theirs = made(x, freqs), with_rows(x, freqs)
    assert "_RotaryBackward" in type(ours.grad_fn).__name__
    assert torch.equal(ours, theirs)
    gradients = (torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (ours, theirs))
    assert torch.equal(*gradients)


def test_a_pattern_for_another_number_of_axes_is_no_rotation_of_four():
    assert not recognise(of_three_axes)


def test_a_function_of_that_name_from_elsewhere_is_followed_as_any_other():
    def rearrange(x, pattern, r):
        return x.unflatten(-1, (r, -1)).transpose(-1, -2)

    def rotation(x, freqs):
        x1, x2 = rearrange(x, "... (d r) -> ... d r", r=2).unbind(dim=-1)
        turned = torch.stack((-x2, x1), dim=-1).flatten(-2)
        return x * freqs.cos() + turned * freqs.sin()

    assert not recognise(rotation)


def with_a_factor(t, freqs, scale=1):
    width, tokens, dtype = freqs.shape[-1], t.shape[-2], t.dtype
    freqs = freqs[:, -tokens:, :]
    scale = scale[:, -tokens:, :] if isinstance(scale, torch.Tensor) else scale
    if t.ndim == 4 and freqs.ndim == 3:
        freqs = rearrange(freqs, "b n d -> b 1 n d")
        if isinstance(scale, torch.Tensor):
            scale = rearrange(scale, "b n d -> b 1 n d")
    t, kept = t[..., :width], t[..., width:]
    t = (t * freqs.cos() * scale) + (rotate_half(t) * freqs.sin() * scale)
    return torch.cat((t, kept), dim=-1).type(dtype)


def test_a_rotation_with_a_factor_for_each_position(kernels, half, monkeypatch):
    monkeypatch.setitem(sys.modules, "einops", tiny_einops.module)
    found = recognise(with_a_factor)
    made = function_for(found.variant, found.facts, with_a_factor)
    x = torch.randn(2, 3, 5, 8, device=kernels, dtype=half, requires_grad=True)
    freqs, factor = (torch.rand(1, 7, 4, device=kernels).to(half) + 0.5 for _ in range(2))
    for scale in ((), (factor,), (factor**-1,), (0.5,)):
        ours, theirs = made(x, freqs, *scale), with_a_factor(x, freqs, *scale)
        assert "_RotaryBackward" in type(ours.grad_fn).__name__
        assert torch.equal(ours, theirs)
        gradients = (torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (ours, theirs))
        assert torch.equal(*gradients)
    # Three dimensions are no heads, and the original's own.
    assert torch.equal(made(x[0], freqs), with_a_factor(x[0], freqs))
