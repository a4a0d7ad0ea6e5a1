"""Adaptive norms in triton against their definition."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_near, terms

from twinkle.ops.layer_norm.reference import VARIANTS as LAYER_NORMS
from twinkle.ops.modulated_norm import reference, triton_backend
from twinkle.ops.modulated_norm.triton_backend import modulated_norm, path_for, supports, variant_of
from twinkle.ops.rms_norm.reference import VARIANTS as RMS_NORMS

LAYER = {variant.name: variant for variant in LAYER_NORMS}
RMS = {variant.name: variant for variant in RMS_NORMS}
PLAIN = variant_of(LAYER["fused"])
CONDITIONS = {
    "sample": lambda lead: (lead[0], *[1] * (len(lead) - 1)),
    "token": lambda lead: lead,
    "all": lambda lead: [1] * len(lead),
    "one row": lambda lead: (),
}


@pytest.fixture
def at_any_size(kernels, monkeypatch):
    """The device, with a kernel for small inputs as well."""
    monkeypatch.setattr(triton_backend, "LEAST", 0)
    return kernels


def inputs(device, lead=(3, 5), width=100, condition="sample", dtype=torch.float32, kept=None, made=None):
    """``x``, weight, bias, scale and shift, in the dtypes of tokens, of parameters and of the condition."""
    torch.manual_seed(0)
    kept, made = kept or dtype, made or dtype
    of = CONDITIONS[condition](lead)
    found = [
        torch.randn(*lead, width).to(dtype),
        (torch.randn(width) + 1).to(kept),
        torch.randn(width).to(kept),
        torch.randn(*of, width).to(made),
        torch.randn(*of, width).to(made),
    ]
    return [t.to(device).requires_grad_() for t in found]


def both(function, variant, given, dtype=None):
    x, w, b, s, t = given
    y = function(x, w, 1e-5, s, t, variant=variant, bias=b, dtype=dtype)
    arriving = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    leaves = [p for p in given if p is not None and p.requires_grad]
    return [y, *torch.autograd.grad(y, leaves, arriving, allow_unused=True)]


def bare(given, norm):
    x, w, b, s, t = given
    affine = getattr(norm, "affine", None) or {"none": "none"}.get(norm.weight, "weight")
    return [x, None if affine == "none" else w, b if affine == "both" else None, s, t]


def compare(given, variant, dtype=None):
    ours, theirs = (both(f, variant, given, dtype) for f in (modulated_norm, reference.modulated_norm))
    assert "_ModulatedNorm" in type(ours[0].grad_fn).__name__
    room = 4 * terms(given[0].numel() // given[0].shape[-1] + given[0].shape[-1]) + 80
    for a, e in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        assert_near(a, e, room, magnitude=20.0)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("lead", [(3, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("width", [100, 128])
def test_the_result_and_all_gradients(at_any_size, lead, width, condition):
    compare(inputs(at_any_size, lead, width, condition), PLAIN)


@pytest.mark.parametrize(
    "name", ["fused_unweighted", "fused_no_bias", "fused_float32", "fused_float32_nullable"]
)
@pytest.mark.parametrize("condition", ["sample", "token"])
def test_other_layer_norms(at_any_size, name, condition):
    variant = variant_of(LAYER[name])
    assert supports(variant) is None
    compare(bare(inputs(at_any_size, condition=condition), LAYER[name]), variant)


@pytest.mark.parametrize("name", ["llama", "gemma", "fused", "unweighted", "diffusers"])
@pytest.mark.parametrize("condition", ["sample", "token"])
def test_rms_norms(at_any_size, name, condition):
    if name not in RMS:
        name = next(v.name for v in RMS_NORMS if v.weight == {"gemma": "one_plus"}.get(name, "none"))
    variant = variant_of(RMS[name])
    assert supports(variant) is None
    compare(bare(inputs(at_any_size, condition=condition), RMS[name]), variant)


def test_a_weight_that_may_be_none(at_any_size, half):
    variant = variant_of(RMS["diffusers"])
    for dtype in (torch.float32, half):
        x, _, _, s, t = inputs(at_any_size, dtype=dtype, made=torch.float32)
        ours, theirs = (
            both(f, variant, [x, None, None, s, t]) for f in (modulated_norm, reference.modulated_norm)
        )
        for a, e in zip(ours, theirs, strict=True):
            assert a.dtype == e.dtype
            assert_near(a, e, 200 if dtype == torch.float32 else 40, dtype=dtype, magnitude=20.0)


@pytest.mark.parametrize("condition", ["sample", "token"])
def test_no_shift(at_any_size, condition):
    compare([*inputs(at_any_size, condition=condition)[:4], None], PLAIN)


@pytest.mark.parametrize("many", [(2, 70), (9, 2), (40, 3)], ids=str)
def test_parts_of_many_programs(at_any_size, many):
    compare(inputs(at_any_size, many, 24), PLAIN)
    compare(inputs(at_any_size, many, 24, "token"), PLAIN)


def test_half_precision_is_rounded_after_each_step(at_any_size, half):
    """All but the few numbers that another order of the row's sum moves are equal, bit for bit."""
    for variant, given in (
        (variant_of(LAYER["fused_unweighted"]), {}),
        (variant_of(LAYER["fused_unweighted"]), {"made": torch.float32}),
        (variant_of(LAYER["fused_unweighted"], widened=True), {"made": torch.float32}),
        (variant_of(LAYER["fused_unweighted"], upcast=True), {"made": torch.float32}),
        (variant_of(LAYER["fused_unweighted"], upcast=True), {}),
        (variant_of(RMS["llama"]), {}),
    ):
        tensors = bare(inputs(at_any_size, (2, 40), 64, dtype=half, **given), variant.norm)
        ours, theirs = (both(f, variant, tensors) for f in (modulated_norm, reference.modulated_norm))
        exact = both(
            reference.modulated_norm,
            variant_of(variant.norm),
            [None if t is None else t.detach().double().requires_grad_() for t in tensors],
        )
        assert ours[0].dtype == theirs[0].dtype
        if half in (ours[0].dtype, *[half] * variant.widened):
            assert float((ours[0] != theirs[0]).float().mean()) < 0.02
        for a, e, best in zip(ours, theirs, exact, strict=True):
            assert a.dtype == e.dtype
            off = [float(((t.double() - best).norm() / best.norm()).detach()) for t in (a, e)]
            assert off[0] <= 2 * off[1] + 1e-6


@pytest.mark.parametrize("condition", ["sample", "token"])
def test_a_result_of_another_dtype(at_any_size, half, condition):
    """As Wan writes it: float32 inside, and the result cast to what the tokens are."""
    given = bare(
        inputs(at_any_size, condition=condition, dtype=half, made=torch.float32), LAYER["fused_unweighted"]
    )
    variant = variant_of(LAYER["fused_unweighted"], upcast=True)
    ours, theirs = (both(f, variant, given, half) for f in (modulated_norm, reference.modulated_norm))
    for a, e in zip(ours, theirs, strict=True):
        assert a.dtype == e.dtype
        assert_near(a, e, 40, dtype=half, magnitude=8.0)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 3), (1, 4)], ids=str)
@pytest.mark.parametrize("condition", ["sample", "token"])
def test_gradients_that_nobody_wants(at_any_size, wanted, condition):
    given = [t.detach() for t in inputs(at_any_size, condition=condition)]
    for at in wanted:
        given[at].requires_grad_()
    compare(given, PLAIN)


def test_a_condition_that_is_a_part_of_a_larger_tensor(at_any_size):
    x, w, b, *_ = inputs(at_any_size)
    whole = torch.randn(3, 6, 100, device=at_any_size, requires_grad=True)

    def run(function):
        parts = whole.chunk(6, dim=1)
        y = function(x, w, 1e-5, parts[1], parts[0], variant=PLAIN, bias=b)
        return [y, *torch.autograd.grad(y.sin().sum(), (x, whole))]

    for a, e in zip(run(modulated_norm), run(reference.modulated_norm), strict=True):
        assert_near(a, e, 2 * terms(100) + 60, magnitude=10.0)


def test_strided_inputs_and_gradients(at_any_size):
    x, w, b, s, t = inputs(at_any_size, (2, 8), 64)
    cut = x[:, 3:]

    def run(function):
        y = function(cut, w, 1e-5, s, t, variant=PLAIN, bias=b)
        return [y, *torch.autograd.grad(y.transpose(0, 1).sum(0).sin().sum(), (x, s, t))]

    for a, e in zip(run(modulated_norm), run(reference.modulated_norm), strict=True):
        assert_near(a, e, 2 * terms(64) + 60, magnitude=10.0)


def test_second_derivatives(at_any_size):
    given = inputs(at_any_size, width=12)

    def second(function):
        x, w, b, s, t = given
        y = function(x, w, 1e-5, s, t, variant=PLAIN, bias=b)
        first = torch.autograd.grad(y.sin().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    for a, e in zip(second(modulated_norm), second(reference.modulated_norm), strict=True):
        assert_near(a, e, 4000, magnitude=float(e.abs().max()) + 1)


def test_gradients_are_the_same_each_time(at_any_size):
    given = inputs(at_any_size, (2, 70), 24)
    for a, e in zip(*(both(modulated_norm, PLAIN, given) for _ in range(2)), strict=True):
        assert torch.equal(a, e)


def test_what_the_kernel_does_not_take_goes_through_the_definition(at_any_size):
    x, w, b, s, t = inputs(at_any_size, (3, 3))
    rows = torch.randn(3, 100, device=at_any_size)
    for scale, shift in (
        (rows, rows),  # of each token, whichever the sample
        (rows[None], rows[None]),
        (s[..., :1], t[..., :1]),  # one number for all channels
        (s, t[:1]),
        (s, t[:, 0]),
        (s.double(), t.double()),
    ):
        assert path_for(x, w, b, scale, shift, PLAIN).value == "reference"
        y = modulated_norm(x, w, 1e-5, scale, shift, variant=PLAIN, bias=b)
        assert torch.equal(y, reference.modulated_norm(x, w, 1e-5, scale, shift, variant=PLAIN, bias=b))
    assert path_for(x[:1], w, b, s, t, PLAIN).value == "reference", "the result is larger than the input"
    assert path_for(x, w, b, s, t, PLAIN).value == "eager"


def test_small_inputs_go_through_the_definition(kernels):
    x, w, b, s, t = inputs(kernels)
    assert path_for(x, w, b, s, t, PLAIN).value == "reference"


def test_norms_without_a_kernel():
    for norm in (LAYER["fused_then_both"], LAYER["std_input_both"], RMS["root_first"]):
        assert supports(variant_of(norm)) is not None


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("condition", ["sample", "token"])
def test_the_op_keeps_to_its_schema(at_any_size, dtype, condition):
    x, w, b, s, t = inputs(at_any_size, width=16, condition=condition)
    torch.library.opcheck(
        torch.ops.twinkle.modulated_norm.default, (x, w, b, s, t, 1e-5, "layer_norm_fused", dtype)
    )
    torch.library.opcheck(
        torch.ops.twinkle.modulated_norm.default, (x, None, None, s, None, 1e-5, "layer_norm_fused", dtype)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lead", "width", "condition"),
    [
        ((4, 1024), 3072, "sample"),
        ((32, 256), 1152, "sample"),
        ((2, 700), 1536, "token"),
        ((2, 9), 8192, "all"),
    ],
    ids=str,
)
def test_large_inputs_on_a_gpu(at_any_size, dtype, lead, width, condition):
    for norm in (LAYER["fused_unweighted"], LAYER["fused"], RMS["llama"]):
        given = bare(inputs(at_any_size, lead, width, condition, dtype), norm)
        variant = variant_of(norm)
        ours, theirs = (both(f, variant, given) for f in (modulated_norm, reference.modulated_norm))
        high = torch.float64 if dtype == torch.float32 else torch.float32
        exact = both(
            reference.modulated_norm,
            variant,
            [None if t is None else t.detach().to(high).requires_grad_() for t in given],
        )
        if dtype == torch.float32:
            assert_near(ours[0], theirs[0], 64, magnitude=20.0)
        else:
            assert float((ours[0] != theirs[0]).float().mean()) < 0.02
        for a, e, best in zip(ours, theirs, exact, strict=True):
            assert a.dtype == e.dtype
            off = [float(((t.to(high) - best).norm() / best.norm()).detach()) for t in (a, e)]
            assert off[0] <= 2 * off[1] + 1e-5
        again = both(modulated_norm, variant, given)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
