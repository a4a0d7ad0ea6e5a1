"""A residual add and the LayerNorm behind it in triton against their definition."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_near, terms

from twinkle.ops.layer_norm.reference import VARIANTS
from twinkle.ops.plain import at_every_size
from twinkle.ops.residual_norm import reference, triton_layer_norm
from twinkle.ops.residual_norm.reference import ResidualNormVariant
from twinkle.ops.residual_norm.triton_backend import path_for, residual_norm, run, supports

NORMS = {variant.name: variant for variant in VARIANTS}
FUSED = ResidualNormVariant("layer_norm_fused", NORMS["fused"])


@pytest.fixture
def at_any_size(kernels, monkeypatch):
    """The device, with a kernel for small sums as well."""
    monkeypatch.setattr(triton_layer_norm, "LEAST", 0)
    return kernels


def inputs(device, width=100, x=torch.float32, r=torch.float32, rows=(3, 5)):
    torch.manual_seed(0)
    made = torch.randn(*rows, width).to(x), torch.randn(*rows, width).to(r) + 1
    kept = torch.promote_types(x, r)
    weights = ((torch.randn(width) + 1).to(kept), torch.randn(width).to(kept))
    return [t.to(device).requires_grad_() for t in (*made, *weights)]


def both(function, variant, x, r, w, b):
    h, y = function(x, r, w, 1e-5, variant=variant, bias=b, scale=0.22)
    gradients = [
        torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).to(t) for i, t in enumerate((h, y))
    ]
    return [h, y, *torch.autograd.grad((h, y), [t for t in (x, r, w, b) if t is not None], gradients)]


@pytest.mark.parametrize("width", [100, 9000])
@pytest.mark.parametrize("scaled", [False, True])
def test_both_results_and_all_gradients(at_any_size, width, scaled):
    variant = ResidualNormVariant("", NORMS["fused"], scaled)
    given = inputs(at_any_size, width)
    h, _ = residual_norm(*given[:3], 1e-5, variant=variant, bias=given[3], scale=0.22)
    assert type(h.grad_fn).__name__ == "_ResidualLayerNormBackward"
    for a, e in zip(
        both(residual_norm, variant, *given), both(reference.residual_norm, variant, *given), strict=True
    ):
        assert_near(a, e, 2 * terms(width) + 40, magnitude=20.0)


@pytest.mark.parametrize("name", ["fused_no_bias", "fused_unweighted", "cohere", "fused_float32"])
def test_other_layer_norms(at_any_size, name):
    variant = ResidualNormVariant("", NORMS[name])
    assert supports(variant) is None
    x, r, w, b = inputs(at_any_size)
    w = None if NORMS[name].affine == "none" else w
    b = b if NORMS[name].affine == "both" else None
    ours, theirs = (both(f, variant, x, r, w, b) for f in (residual_norm, reference.residual_norm))
    for a, e in zip(ours, theirs, strict=True):
        assert_near(a, e, 2 * terms(100) + 40, magnitude=20.0)


@pytest.mark.parametrize("wide", ["x", "r", "none"])
def test_half_precision_beside_float32(at_any_size, half, wide):
    """As under autocast: the sum and the norm are of the wider dtype, each gradient of its own."""
    given = inputs(
        at_any_size, x=torch.float32 if wide == "x" else half, r=torch.float32 if wide == "r" else half
    )
    ours, theirs = (both(f, FUSED, *given) for f in (residual_norm, reference.residual_norm))
    exact = both(reference.residual_norm, FUSED, *(t.detach().double().requires_grad_() for t in given))
    assert torch.equal(ours[0], theirs[0])
    for a, e, best in zip(ours, theirs, exact, strict=True):
        assert a.dtype == e.dtype
        off = [float(((t.double() - best).norm() / best.norm()).detach()) for t in (a, e)]
        assert off[0] <= 2 * off[1] + 1e-6


@pytest.mark.parametrize("only", [0, 1])
@pytest.mark.parametrize("scaled", [False, True])
def test_one_result_used(at_any_size, only, scaled):
    variant = ResidualNormVariant("", NORMS["fused"], scaled)
    x, r, w, b = inputs(at_any_size)
    found, expected = (
        torch.autograd.grad(
            f(x, r, w, 1e-5, variant=variant, bias=b, scale=0.5)[only].sin().sum(),
            (x, r, w, b),
            allow_unused=True,
        )
        for f in (residual_norm, reference.residual_norm)
    )
    for a, e in zip(found, expected, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            assert_near(a, e, 2 * terms(100) + 40, magnitude=10.0)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (2, 3), (0, 3)])
def test_gradients_that_nobody_wants(at_any_size, wanted):
    given = [t.detach() for t in inputs(at_any_size)]
    leaves = [given[at].requires_grad_() for at in wanted]
    found, expected = (
        torch.autograd.grad(f(*given[:3], 1e-5, variant=FUSED, bias=given[3])[1].sin().sum(), leaves)
        for f in (residual_norm, reference.residual_norm)
    )
    for a, e in zip(found, expected, strict=True):
        assert_near(a, e, 2 * terms(100) + 40, magnitude=10.0)


def test_a_sum_that_nobody_wants_is_not_written(at_any_size):
    x, r, w, b = inputs(at_any_size)
    path = path_for(x, r, w, FUSED, b)
    with torch.no_grad():
        h, y = run(path, x, r, w, 1e-5, FUSED, 1.0, b, False)
        assert h is None
        assert torch.equal(y, run(path, x, r, w, 1e-5, FUSED, 1.0, b)[1])


def test_second_derivatives(at_any_size):
    given = inputs(at_any_size, width=12)

    def second(function):
        h, y = function(*given[:3], 1e-5, variant=FUSED, bias=given[3])
        first = torch.autograd.grad((h.sin() + y.sin()).sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    for a, e in zip(second(residual_norm), second(reference.residual_norm), strict=True):
        assert_near(a, e, 2000, magnitude=float(e.abs().max()) + 1)


def test_what_the_kernel_does_not_take_goes_through_the_definition(at_any_size):
    x, r, w, b = inputs(at_any_size)
    cases = {
        "strided": (x[..., ::2], r[..., ::2], w[::2].contiguous(), b[::2].contiguous()),
        "broadcast": (x, r[:1], w, b),
        "two shapes": (x[:, :1], r, w, b),
        "turned": (x.transpose(0, 1), r.transpose(0, 1), w, b),
    }
    for name, given in cases.items():
        h, y = residual_norm(*given[:3], 1e-5, variant=FUSED, bias=given[3])
        assert type(h.grad_fn).__name__ == "AddBackward0", name
        assert torch.equal(y, reference.residual_norm(*given[:3], 1e-5, variant=FUSED, bias=given[3])[1])


LAYOUTS = {
    "tokens of a convolution": ((2, 24, 7), (0, 2, 1)),
    "pixels": ((2, 24, 3, 4), (0, 2, 3, 1)),
    "one batch": ((24, 5), (1, 0)),
    "batches of batches": ((2, 3, 24, 5), (0, 1, 3, 2)),
}


def channels_first(name, r, device):
    """Inputs whose residual is what a convolution made, turned: its channels lie apart."""
    torch.manual_seed(0)
    shape, turn = LAYOUTS[name]
    residual = torch.randn(shape).add(1).to(device, r).permute(turn)
    x = torch.randn(residual.shape).to(device)
    w, b = torch.randn(24).add(1).to(device), torch.randn(24).to(device)
    return [t.requires_grad_() for t in (x, residual, w, b)]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("r", [torch.float32, torch.float16])
def test_a_residual_that_lies_channels_first(at_any_size, name, scaled, r):
    """The sum is laid out as torch's: what a program does with its memory is the same."""
    variant = ResidualNormVariant("", NORMS["fused"], scaled)
    given = channels_first(name, r, at_any_size)
    assert not given[1].is_contiguous()
    ours, theirs = (both(f, variant, *given) for f in (residual_norm, reference.residual_norm))
    assert type(ours[0].grad_fn).__name__ == "_ResidualLayerNormBackward"
    assert torch.equal(ours[0], theirs[0])
    assert ours[0].stride() == theirs[0].stride()
    assert ours[1].stride() == theirs[1].stride()
    for a, e in zip(ours[1:], theirs[1:], strict=True):
        assert a.dtype == e.dtype
        assert_near(a, e, 2 * terms(100) + 40, magnitude=20.0)
    with torch.no_grad():
        path = path_for(*given[:3], variant, given[3])
        h, y = run(path, *given[:3], 1e-5, variant, 0.22, given[3], False)
        assert h is None
        # Rows that lie across are added up in the order of what else is written.
        assert_near(y, ours[1], 2 * terms(24), magnitude=20.0)


def test_other_turned_sums_are_torch_s(at_any_size):
    x, r, w, b = channels_first("tokens of a convolution", torch.float32, at_any_size)
    apart = torch.randn(2, 24, 8, device=at_any_size)[..., :7].transpose(1, 2)
    wide = torch.randn(1, 2100, 3, device=at_any_size).transpose(1, 2)
    ones = torch.ones(2100, device=at_any_size)
    cases = {
        "the addend is turned": (r, x, w, b),
        "both are": (r, r * 2, w, b),
        "rows with gaps": (x, apart, w, b),
        "wide rows": (wide.contiguous().requires_grad_(), wide, ones, ones),
    }
    for name, given in cases.items():
        h, _ = residual_norm(*given[:3], 1e-5, variant=FUSED, bias=given[3])
        assert type(h.grad_fn).__name__ == "AddBackward0", name
        assert h.stride() == (given[1] + given[0]).stride()


def test_small_sums_are_torch_s(kernels):
    x, r, w, b = inputs(kernels)
    h, _ = residual_norm(x, r, w, 1e-5, variant=FUSED, bias=b)
    assert type(h.grad_fn).__name__ == "AddBackward0"


def test_opcheck(at_any_size):
    x, r, w, _ = inputs(at_any_size, width=20, rows=(2,))
    torch.library.opcheck(torch.ops.twinkle.residual_layer_norm.default, (x, r, w, None, 1e-5, None))


def test_the_same_bits_every_time(at_any_size):
    given = inputs(at_any_size)
    for a, b in zip(both(residual_norm, FUSED, *given), both(residual_norm, FUSED, *given), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 768, 1500), (2, 1280, 1500), (3, 96, 56, 56), (2, 1152, 1024)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_channels_first_sizes_of_models(kernels, shape, dtype):
    if kernels.type != "cuda":
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    r = torch.randn(shape, device=kernels, dtype=dtype).add(1)
    r = r.permute(0, *range(2, len(shape)), 1)
    x = torch.randn(r.shape, device=kernels, dtype=dtype)
    w, b = (torch.randn(shape[1], device=kernels, dtype=dtype) for _ in range(2))
    given = [t.requires_grad_() for t in (x, r, w, b)]
    with at_every_size():
        ours, theirs = (both(f, FUSED, *given) for f in (residual_norm, reference.residual_norm))
    exact = both(reference.residual_norm, FUSED, *(t.detach().double().requires_grad_() for t in given))
    assert torch.equal(ours[0], theirs[0])
    assert ours[0].stride() == theirs[0].stride()
    for a, e, best in zip(ours, theirs, exact, strict=True):
        off = [float(((t.double() - best).norm() / best.norm()).detach()) for t in (a, e)]
        assert off[0] <= 2 * off[1] + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 1024, 4096, 8192, 12288])
@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")])
def test_sizes_of_models(kernels, width, dtypes):
    if kernels.type != "cuda":
        pytest.skip("needs a GPU")
    named = {"bf16": torch.bfloat16, "fp32": torch.float32}
    given = inputs(kernels, width, named[dtypes[0]], named[dtypes[1]], rows=(4096,))
    ours, theirs = (both(f, FUSED, *given) for f in (residual_norm, reference.residual_norm))
    exact = both(reference.residual_norm, FUSED, *(t.detach().double().requires_grad_() for t in given))
    assert torch.equal(ours[0], theirs[0])
    for a, e, best in zip(ours, theirs, exact, strict=True):
        assert a.dtype == e.dtype
        off = [float(((t.double() - best).norm() / best.norm()).detach()) for t in (a, e)]
        assert off[0] <= 2 * off[1] + 1e-6
