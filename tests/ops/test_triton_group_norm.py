"""GroupNorm with and without SiLU in triton against its definition."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_near, rounding_bound, terms

from twinkle.ops.group_norm import reference, triton_backend
from twinkle.ops.group_norm.triton_backend import group_norm

VARIANTS = {variant.name: variant for variant in reference.VARIANTS}
each_variant = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture
def at_any_size(kernels, monkeypatch):
    """The device, with a kernel for small inputs as well."""
    monkeypatch.setattr(triton_backend, "LEAST", 0)
    return kernels


def run(function, name, x, w, b, g, groups, eps=0.1):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, w, b)]
    y = function(leaves[0], groups, *leaves[1:], eps, variant=VARIANTS[name])
    return y, torch.autograd.grad(y, [t for t in leaves if t is not None], g.to(y.dtype))


def inputs(device, *shape, dtype=torch.float32):
    torch.manual_seed(0)
    x, g = (torch.randn(shape) * s + o for s, o in ((2, 0.5), (1, 0)))
    w, b = torch.randn(shape[1]) + 1, torch.randn(shape[1])
    return [t.to(dtype).to(device) for t in (x, w, b, g)]


def close(found, expected, places):
    for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert a.dtype == b.dtype
        assert_near(a, b, 4 * terms(places) + 60, magnitude=float(b.detach().abs().max()) + 1)


@each_variant
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 12, 9, 7), 3), ((1, 6, 50), 2), ((3, 8, 1), 4), ((1, 4, 64, 40), 1), ((1, 66, 3, 3), 1)],
)
def test_float32_equals_the_definition_to_a_few_ulps(at_any_size, name, shape, groups):
    x, w, b, g = inputs(at_any_size, *shape)
    ours = run(group_norm, name, x, w, b, g, groups)
    assert type(ours[0].grad_fn).__name__ == "_GroupNormBackward"
    close(ours, run(reference.group_norm, name, x, w, b, g, groups), x.numel() // (shape[0] * groups))


@pytest.mark.parametrize("gradient", [torch.contiguous_format, torch.channels_last])
def test_channels_that_are_adjacent(at_any_size, gradient):
    x, w, b, g = inputs(at_any_size, 2, 12, 5, 7)
    x, g = x.contiguous(memory_format=torch.channels_last), g.contiguous(memory_format=gradient)
    ours = run(group_norm, "silu", x, w, b, g, 3)
    close(ours, run(reference.group_norm, "silu", x, w, b, g, 3), 140)
    assert type(ours[0].grad_fn).__name__ == "_GroupNormBackward"


@each_variant
@pytest.mark.parametrize("affine", ["weight", "none"])
def test_without_weight_or_bias(at_any_size, name, affine):
    x, w, b, g = inputs(at_any_size, 2, 12, 3, 7)
    w, b = (w if affine == "weight" else None), None  # without a weight alone torch's own backward raises
    close(run(group_norm, name, x, w, b, g, 4), run(reference.group_norm, name, x, w, b, g, 4), 63)


@each_variant
def test_half_precision_is_as_near_to_float64_as_the_definition(at_any_size, half, name):
    x, w, b, g = inputs(at_any_size, 2, 12, 8, 8, dtype=half)
    ours, theirs = (run(f, name, x, w, b, g, 3) for f in (group_norm, reference.group_norm))
    exact = run(reference.group_norm, name, x.double(), w.double(), b.double(), g.double(), 3)
    for a, b, best in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), (exact[0], *exact[1]), strict=True):
        assert a.dtype == b.dtype
        off = [float(((t.double() - best).norm() / best.norm()).detach()) for t in (a, b)]
        assert off[0] <= off[1] + rounding_bound(half, 1)


@pytest.mark.parametrize("wanted", ["x", "w", "b", "wb", "xb"])
def test_gradients_that_nobody_wants_are_not_computed(at_any_size, wanted):
    x, w, b, g = inputs(at_any_size, 2, 8, 3, 3)
    leaves = {"x": x, "w": w, "b": b}
    for name in wanted:
        leaves[name].requires_grad_()
    y = group_norm(x, 2, w, b, 0.1, variant=VARIANTS["silu"])
    found = torch.autograd.grad(y, [leaves[name] for name in wanted], g)
    y = reference.group_norm(x, 2, w, b, 0.1, variant=VARIANTS["silu"])
    for a, e in zip(found, torch.autograd.grad(y, [leaves[name] for name in wanted], g), strict=True):
        assert_near(a, e, 100, magnitude=10.0)


def test_what_the_kernel_does_not_take_goes_through_the_definition(at_any_size):
    x, w, b, _ = inputs(at_any_size, 2, 8, 4, 6)
    x.requires_grad_()
    plain = VARIANTS["plain"]
    for given in (x[..., ::2], x.transpose(2, 3), x[:, :, 0, 0]):
        y = group_norm(given, 2, w, b, 1e-5, variant=plain)
        assert type(y.grad_fn).__name__ != "_GroupNormBackward"
    with pytest.raises(RuntimeError):
        group_norm(x, 3, w, b, 1e-5, variant=plain)


def test_small_inputs_are_torch_s(kernels):
    x, w, b, _ = inputs(kernels, 2, 8, 4, 6)
    y = group_norm(x.requires_grad_(), 2, w, b, 1e-5, variant=VARIANTS["plain"])
    assert type(y.grad_fn).__name__ == "NativeGroupNormBackward0"


@pytest.mark.parametrize("shape", [(0, 8, 4), (2, 8, 0)])
def test_of_nothing(at_any_size, shape):
    x, w, b, _ = inputs(at_any_size, *shape)
    for t in (x, w, b):
        t.requires_grad_()
    y = group_norm(x, 2, w, b, 0.1, variant=VARIANTS["silu"])
    y.sum().backward()
    assert (x.grad.shape, w.grad.tolist(), b.grad.tolist()) == (x.shape, [0.0] * 8, [0.0] * 8)


def test_second_derivatives(at_any_size):
    x, w, b, _ = inputs(at_any_size, 1, 4, 3, 3)
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def second(function):
        y = function(x, 2, w, b, 0.1, variant=VARIANTS["silu"])
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for a, e in zip(second(group_norm), second(reference.group_norm), strict=True):
        assert_near(a, e, 600, magnitude=float(e.abs().max()) + 1)


def test_opcheck(at_any_size):
    x, w, _, _ = inputs(at_any_size, 1, 4, 3, 3)
    given = (x.requires_grad_(), w.requires_grad_(), None, 2, 1e-5, "silu")
    torch.library.opcheck(torch.ops.twinkle.group_norm.default, given)


@pytest.mark.gpu
@each_variant
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(4, 320, 64, 64), (4, 1280, 32, 32)])
def test_sizes_of_programs(at_any_size, name, last, shape):
    if at_any_size.type != "cuda":
        pytest.skip("needs a GPU")
    x, w, b, g = inputs(at_any_size, *shape, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    ours, theirs = (run(f, name, x, w, b, g, 32) for f in (group_norm, reference.group_norm))
    assert type(ours[0].grad_fn).__name__ == "_GroupNormBackward"
    assert ours[0].stride() == theirs[0].stride()
    exact = run(reference.group_norm, name, x.float(), w.float(), b.float(), g.float(), 32)
    for a, e, best in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), (exact[0], *exact[1]), strict=True):
        off = [float(((t.float() - best).norm() / best.norm()).detach()) for t in (a, e)]
        assert off[0] <= 2 * off[1] + 1e-5
