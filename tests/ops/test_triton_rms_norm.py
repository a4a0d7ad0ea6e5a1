"""RMSNorm in triton against its definition."""

from __future__ import annotations

import functools

import pytest
import torch
from rounding import across_a_boundary, assert_near, rounding_bound, terms

from twinkle.ops.rms_norm import reference
from twinkle.ops.rms_norm.dtypes import roundings
from twinkle.ops.rms_norm.triton_backend import accepts, layer_class, rms_norm, supports

VARIANTS = {variant.name: variant for variant in reference.VARIANTS if supports(variant) is None}
LLAMA = VARIANTS["llama"]


def operations(width: int) -> int:
    """Behind a number of a norm or its gradient: two sums over the row, one over few rows, a dozen others."""
    return 2 * terms(width) + 24


def ulps(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference in units in the last place of the larger magnitude of a row."""
    a, b = a.detach(), b.detach()
    unit = torch.finfo(b.dtype).eps * b.float().abs()
    return float(((a.float() - b.float()).abs() / unit.clamp_min(1e-30)).max()) if b.numel() else 0.0


def run(function, x, w, g=None, **kwargs):
    x = x.detach().clone().requires_grad_()
    w = None if w is None else w.detach().clone().requires_grad_()
    y = function(x, w, 1e-6, **kwargs)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) if g is None else g.to(y.dtype)
    return y, g, torch.autograd.grad(y, [t for t in (x, w) if t is not None], g)


def used_kernel(y: torch.Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_RMSNormBackward"


@pytest.mark.parametrize("name", VARIANTS)
def test_float32_equals_the_definition_to_a_few_ulps(kernels, name):
    torch.manual_seed(0)
    variant = VARIANTS[name]
    x, w = torch.randn(6, 200, device=kernels), torch.randn(200, device=kernels)
    w = None if variant.weight == "none" else w
    shape = {"normalized_shape": (200,)}
    shape["offset"] = 1.0
    y, g, gradients = run(rms_norm, x, w, variant=variant, **shape)
    assert used_kernel(y)
    y2, _, gradients2 = run(reference.rms_norm, x, w, g, variant=variant, **shape)
    assert_near(y, y2, operations(200))
    for a, b in zip(gradients, gradients2, strict=True):
        assert_near(a, b, operations(200))


@pytest.mark.parametrize("weight_dtype", ["half", "float32"])
@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_rounds_where_the_definition_rounds(kernels, half, name, weight_dtype):
    torch.manual_seed(0)
    variant = VARIANTS[name]
    x = torch.randn(7, 200, device=kernels, dtype=half)
    w = torch.randn(200, device=kernels, dtype=half if weight_dtype == "half" else torch.float32)
    w = None if variant.weight == "none" else w
    # A weight with an offset becomes a weight without, or with one, before it is asked about.
    if variant.weight != "offset" and not accepts(x, w, variant, None, None):
        assert variant.weight_place == "fused"
        assert variant.weight_cast == "none"
        pytest.skip("torch takes its own way with a weight of another dtype, and so do we")
    y, _, _ = run(rms_norm, x, w, variant=variant, normalized_shape=(200,))
    y2, _, _ = run(reference.rms_norm, x, w, variant=variant, normalized_shape=(200,))
    assert used_kernel(y)
    assert (y.dtype, y.stride()) == (y2.dtype, y2.stride())
    if roundings(variant, half, None if w is None else w.dtype)[0] == torch.float32 == y.dtype:
        assert_near(y, y2, operations(200))
    elif y.dtype == torch.float32:  # the norm was rounded before the weight
        apart = (y - y2).abs() / (torch.finfo(half).eps * y2.abs())
        assert float(apart.max()) <= (6 if variant.compute == "input" else 2)
        if variant.compute != "input":
            assert float((apart > 0.1).float().mean()) < across_a_boundary(half, operations(200))
    elif variant.compute == "input":
        assert ulps(y, y2) <= 6  # six roundings on either side, half a unit each
    else:
        # Sums in another order move few values across a rounding boundary.
        assert ulps(y, y2) <= 2
        assert float((y != y2).float().mean()) < across_a_boundary(half, operations(200))


@pytest.mark.parametrize("name", ["llama", "gemma", "olmo2", "t5", "unweighted"])
def test_half_precision_gradients_are_as_near_to_the_exact_ones(kernels, half, name):
    torch.manual_seed(0)
    variant = VARIANTS[name]
    x, w = (torch.randn(*s, device=kernels, dtype=half) for s in ((64, 200), (200,)))
    w = None if variant.weight == "none" else w
    _, g, ours = run(rms_norm, x, w, variant=variant)
    _, _, theirs = run(reference.rms_norm, x, w, g, variant=variant)
    _, _, exact = run(reference.rms_norm, x.double(), None if w is None else w.double(), g, variant=variant)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a - c).norm() <= (b - c).norm() + rounding_bound(half, 1, c.norm().item())


MEASURES = [
    name for name in VARIANTS if VARIANTS[name].eps_place != "mean" or VARIANTS[name].statistic == "sum"
]


@pytest.mark.parametrize(
    ("name", "width"),
    [(name, 24) for name in MEASURES] + [("normalize", 8200), ("root", 8200), ("sum", 8200)],
)
def test_gradients_follow_the_measure_where_eps_counts_and_where_it_does_not(kernels, name, width):
    torch.manual_seed(0)
    variant = VARIANTS[name]
    x = torch.randn(9, width, device=kernels) * torch.logspace(-5, 3, 9, device=kernels)[:, None]
    x[4] = 0
    w = None if variant.weight == "none" else torch.randn(width, device=kernels)
    y, g, gradients = run(functools.partial(rms_norm, offset=1.0), x, w, variant=variant)
    assert used_kernel(y)
    y2, _, gradients2 = run(functools.partial(reference.rms_norm, offset=1.0), x, w, g, variant=variant)
    for row in range(9):
        assert_near(y[row], y2[row], operations(width))
        found, expected = gradients[0][row], gradients2[0][row]
        if expected.isnan().all():  # of the root of 0
            assert found.isnan().all()
            continue
        # Before the part along the input is taken off.
        rate = y2[row].detach().norm() / x[row].norm().clamp_min(1e-6)
        largest = 10 * float(g[row].abs().max() * rate)
        assert_near(found, expected, operations(width), magnitude=largest)
    for found, expected in zip(gradients[1:], gradients2[1:], strict=True):
        assert_near(found.nan_to_num(), expected.nan_to_num(), operations(width))


@pytest.mark.parametrize("width", [1, 3, 128, 130, 4096, 8200, 20000, 65536])
def test_every_width_up_to_65536(kernels, width):
    torch.manual_seed(0)
    x, w = torch.randn(3, width, device=kernels), torch.randn(width, device=kernels)
    y, g, gradients = run(rms_norm, x, w, variant=LLAMA)
    assert used_kernel(y)
    y2, _, gradients2 = run(reference.rms_norm, x, w, g, variant=LLAMA)
    root = x.square().mean(-1, keepdim=True).rsqrt()
    largest = (g * w * root).abs().max().item()  # before the part along the input is taken off
    assert_near(y, y2, operations(width))
    for a, b in zip(gradients, gradients2, strict=True):
        assert_near(a, b, operations(width), magnitude=largest)


def test_a_wider_row_goes_through_the_definition(kernels):
    y = rms_norm(
        torch.ones(1, 65537, device=kernels, requires_grad=True), torch.ones(65537, device=kernels), 1e-6
    )
    assert not used_kernel(y)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (4, 0)])
def test_empty_inputs(kernels, shape):
    x = torch.randn(shape, device=kernels, requires_grad=True)
    w = torch.randn(shape[-1], device=kernels, requires_grad=True)
    y = rms_norm(x, w, 1e-6)
    y.sum().backward()
    assert y.shape == shape
    assert torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "strided channels"])
def test_inputs_that_are_not_contiguous(kernels, kind):
    torch.manual_seed(0)
    whole = torch.randn(4, 6, 64, device=kernels)
    x = {
        "transposed": lambda: whole.transpose(0, 1),
        "sliced": lambda: whole[1:3, ::2, :32],
        "expanded": lambda: whole[:1].expand(5, -1, -1),
        "strided channels": lambda: whole[..., ::2],
    }[kind]()
    w = torch.randn(x.shape[-1], device=kernels)
    y, y2 = rms_norm(x, w, 1e-6), reference.rms_norm(x, w, 1e-6, variant=LLAMA)
    assert_near(y, y2, operations(64))
    if kind == "transposed":
        assert y.stride() == y2.stride()


def test_a_gradient_that_is_expanded(kernels):
    x = torch.randn(3, 32, device=kernels, requires_grad=True)
    w = torch.randn(32, device=kernels)
    (ours,) = torch.autograd.grad(rms_norm(x, w, 1e-6).sum(), x)
    (theirs,) = torch.autograd.grad(reference.rms_norm(x, w, 1e-6, variant=LLAMA).sum(), x)
    assert_near(ours, theirs, operations(32))


def test_rows_of_zeros_without_eps_hurt_nobody_else(kernels):
    x = torch.randn(5, 32, device=kernels, requires_grad=True)
    w = torch.randn(32, device=kernels, requires_grad=True)
    rms_norm(x, w, 0.0).sum().backward()
    assert bool(torch.isfinite(w.grad).all())


def test_inputs_are_left_as_they_were(kernels):
    x, w = torch.randn(4, 64, device=kernels), torch.randn(64, device=kernels)
    kept = x.clone(), w.clone()
    run(rms_norm, x, w)
    assert torch.equal(x, kept[0])
    assert torch.equal(w, kept[1])


def test_the_same_bits_every_time(kernels):
    x, w = torch.randn(300, 64, device=kernels), torch.randn(64, device=kernels)
    first, g, gradients = run(rms_norm, x, w)
    for _ in range(3):
        y, _, again = run(rms_norm, x, w, g)
        assert torch.equal(y, first)
        assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_without_gradients_the_same(kernels):
    x, w = torch.randn(4, 64, device=kernels), torch.randn(64, device=kernels, requires_grad=True)
    with torch.no_grad():
        y = rms_norm(x, w, 1e-6)
    assert torch.equal(y, rms_norm(x, w, 1e-6))
    assert not y.requires_grad


def test_a_frozen_weight_gets_no_gradient(kernels):
    x = torch.randn(4, 64, device=kernels, requires_grad=True)
    w = torch.randn(64, device=kernels)
    rms_norm(x, w, 1e-6).sum().backward()
    assert w.grad is None


def test_the_function_transforms_of_torch_run_the_definition(kernels):
    x, w = torch.randn(4, 64, device=kernels), torch.randn(64, device=kernels)
    ours = torch.func.grad(lambda x: rms_norm(x, w, 1e-6).square().sum())(x)
    theirs = torch.func.grad(lambda x: reference.rms_norm(x, w, 1e-6, variant=LLAMA).square().sum())(x)
    assert torch.equal(ours, theirs)


def test_second_derivatives_are_those_of_the_definition(kernels):
    x = torch.randn(4, 64, device=kernels, dtype=torch.float32, requires_grad=True)
    w = torch.randn(64, device=kernels, requires_grad=True)

    def second(function):
        # The input depends on the weight as well: it must not be followed twice.
        y = function(x * w, w, 1e-6, variant=LLAMA).sin().sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, w))

    for a, b in zip(second(rms_norm), second(reference.rms_norm), strict=True):
        assert_near(a, b, 4 * operations(64))


def test_autocast_changes_nothing(kernels, half):
    x, w = torch.randn(4, 64, device=kernels, dtype=half), torch.randn(64, device=kernels)
    with torch.autocast(kernels.type, dtype=torch.bfloat16):
        y, y2 = rms_norm(x, w, 1e-6), reference.rms_norm(x, w, 1e-6, variant=LLAMA)
    assert y.dtype == y2.dtype


def test_autocast_of_a_variant_that_computes_in_the_dtype_of_its_input_runs_the_definition(kernels, half):
    x = torch.randn(4, 64, device=kernels, dtype=half)
    with torch.autocast(kernels.type, dtype=torch.bfloat16):
        y = rms_norm(x, None, 1e-6, variant=VARIANTS["input_unweighted"])
        assert torch.equal(y, reference.rms_norm(x, None, 1e-6, variant=VARIANTS["input_unweighted"]))


def test_opcheck(kernels):
    x = torch.randn(4, 64, device=kernels, requires_grad=True)
    w = torch.randn(64, device=kernels, requires_grad=True)
    torch.library.opcheck(torch.ops.twinkle.rms_norm.default, (x, w, 1e-6, "llama", 1.0))
    torch.library.opcheck(
        torch.ops.twinkle.rms_norm.default, (x.transpose(0, 1)[:, :4], None, 1e-6, "unweighted", 1.0)
    )
    torch.library.opcheck(torch.ops.twinkle.rms_norm.default, (x, w, 1e-6, "normalize", 8.0))
    torch.library.opcheck(
        torch.ops.twinkle.rms_norm_backward.default,
        (x.detach(), x.detach(), w.detach(), 1e-6, "llama", 1.0, True),
    )


def test_the_op_equals_the_straight_call(kernels):
    x, w = torch.randn(4, 64, device=kernels), torch.randn(64, device=kernels)
    y, g, gradients = run(rms_norm, x, w)
    y2, _, gradients2 = run(lambda x, w, eps: torch.ops.twinkle.rms_norm(x, w, eps, "llama", 1.0), x, w, g)
    assert torch.equal(y, y2)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients2, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(kernels, dynamic):
    torch._dynamo.reset()
    x, w = torch.randn(4, 64, device=kernels), torch.randn(64, device=kernels)
    y, g, gradients = run(rms_norm, x, w)
    backend = "inductor" if kernels.type == "cuda" else "aot_eager"
    compiled = torch.compile(
        lambda x, w, eps: rms_norm(x, w, eps) * 1.0, fullgraph=True, dynamic=dynamic, backend=backend
    )
    y2, _, gradients2 = run(compiled, x, w, g)
    assert torch.equal(y, y2)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients2, strict=True))


def test_a_layer_for_the_names_of_any_class(kernels):
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.tiny = torch.nn.Parameter(torch.randn(64)), 1e-5

    made = layer_class(LLAMA, {"x": "states", "weight": "gain", "eps": "tiny"})
    norm, x = Norm().to(kernels), torch.randn(4, 64, device=kernels)
    assert torch.equal(made.forward(norm, states=x), rms_norm(x, norm.gain, 1e-5))
    assert "__init__" not in vars(made)
    assert made is layer_class(LLAMA, {"x": "states", "weight": "gain", "eps": "tiny"})


def test_without_a_device_for_triton_the_definition_runs():
    x = torch.randn(4, 64, device="cpu", dtype=torch.float64)
    w = torch.randn(64, dtype=torch.float64)
    assert torch.equal(rms_norm(x, w, 1e-6), reference.rms_norm(x, w, 1e-6, variant=LLAMA))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_than_2_to_the_31_elements():
    torch.manual_seed(0)
    rows = (1 << 31) // 4096 + 8
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = rms_norm(x, w, 1e-6)
    expected = reference.rms_norm(x[-4:], w, 1e-6, variant=LLAMA)
    assert ulps(y[-4:], expected) <= 2
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    (expected_dx,) = torch.autograd.grad(expected, x, torch.ones_like(expected))
    torch.testing.assert_close(dx[-4:], expected_dx[-4:], rtol=0.02, atol=0.02)
