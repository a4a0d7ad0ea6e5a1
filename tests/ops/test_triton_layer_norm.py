"""LayerNorm in triton against its definition."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_near, rounding_bound, terms
from torch import nn

from twinkle.ops.backends import backend_for
from twinkle.ops.layer_norm import reference, triton_backend
from twinkle.ops.layer_norm.samples import cases
from twinkle.ops.layer_norm.triton_backend import layer_class, layer_norm, supports
from twinkle.proof.compare import compare

VARIANTS = {variant.name: variant for variant in reference.VARIANTS if supports(variant) is None}
FUSED, COHERE = VARIANTS["fused"], VARIANTS["cohere"]


def operations(width: int) -> int:
    """Behind a number of a norm or its gradient: two sums over the row, one over few rows, a dozen others."""
    return 2 * terms(width) + 24


@pytest.fixture
def at_any_size(kernels, monkeypatch):
    """The device, with a kernel for small inputs as well."""
    monkeypatch.setattr(triton_backend, "LEAST", 0)
    return kernels


def run(function, x, w=None, b=None, g=None, variant=FUSED):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, w, b)]
    y = function(*leaves, 1e-5, variant=variant, normalized_shape=x.shape[-1:])
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) if g is None else g.to(y.dtype)
    return y, g, torch.autograd.grad(y, [t for t in leaves if t is not None], g)


def random(device, *shape, dtype=torch.float32):
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)


def used_kernel(y: torch.Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_LayerNormBackward"


def off(found, exact) -> float:
    return float(((found.double() - exact).norm() / exact.norm()).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_as_near_to_the_exact_result_as_its_definition(kernels, name, dtype):
    if kernels.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16")
    if kernels.type == "cpu" and name.startswith("out"):
        pytest.skip("the same kernel as for Cohere's")
    variant = VARIANTS[name]
    if kernels.type == "cpu" and (variant.nullable or (variant.weight_cast and variant.written == "fused")):
        pytest.skip("the same kernel as for the weight in float32")
    torch.manual_seed(0)
    for case in cases(VARIANTS[name], dtype, kernels):
        verdict = compare(case.original, case.kernel, case.args, {}, module=case.module, backward=True)
        assert verdict.ok, (case.shape, verdict)


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
def test_float32_equals_torch_to_a_few_ulps(at_any_size, affine):
    torch.manual_seed(0)
    x = random(at_any_size, 6, 200) * 3 + 5
    w = random(at_any_size, 200) if affine in ("both", "weight") else None
    b = random(at_any_size, 200) if affine in ("both", "bias") else None
    y, g, gradients = run(layer_norm, x, w, b)
    assert used_kernel(y)
    y2, _, gradients2 = run(reference.layer_norm, x, w, b, g)
    largest = 5 * y2.abs().max().item()  # what the mean of five is taken off
    assert_near(y, y2, operations(200), magnitude=largest)
    for a, b in zip(gradients, gradients2, strict=True):
        assert_near(a, b, operations(200), magnitude=largest)


@pytest.mark.parametrize("variant", ["fused", "fused_float32", "cohere"])
def test_half_precision_is_as_near_to_float64_as_the_definition(at_any_size, half, variant):
    torch.manual_seed(0)
    kept = torch.float32 if variant == "fused_float32" else half
    x, w, b = (random(at_any_size, *s) for s in ((64, 200), (200,), (200,)))
    x, w, b = x.to(half), w.to(kept), None if variant == "cohere" else b.to(kept)
    y, g, gradients = run(layer_norm, x, w, b, variant=VARIANTS[variant])
    assert used_kernel(y)
    y2, _, gradients2 = run(reference.layer_norm, x, w, b, g, variant=VARIANTS[variant])
    assert (y.dtype, y.stride()) == (y2.dtype, y2.stride())
    wide = [None if t is None else t.double() for t in (x, w, b)]
    exact, _, exact_gradients = run(reference.layer_norm, *wide, g)
    for ours, theirs, best in zip((y, *gradients), (y2, *gradients2), (exact, *exact_gradients), strict=True):
        assert ours.dtype == theirs.dtype
        # A rounding more than the definition's; in float32 sums in another order.
        room = rounding_bound(ours.dtype, operations(200) if ours.dtype == torch.float32 else 1)
        assert off(ours, best) <= off(theirs, best) + room


@pytest.mark.parametrize("width", [1, 3, 130, 768, 8192, 8200, 65536])
def test_every_width_up_to_65536(at_any_size, width):
    torch.manual_seed(0)
    x = random(at_any_size, 2, width) + 2
    w, b = random(at_any_size, width), random(at_any_size, width)
    y, g, gradients = run(layer_norm, x, w, b)
    assert used_kernel(y)
    y2, _, gradients2 = run(reference.layer_norm, x, w, b, g)
    root = (x.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    largest = (g * w * root).abs().max().item()  # before the parts along the input and its mean are taken off
    assert_near(y, y2, operations(width), magnitude=largest)
    for a, b in zip(gradients, gradients2, strict=True):
        assert_near(a, b, operations(width), magnitude=largest)


@pytest.mark.parametrize("width", [96, 9000])
@pytest.mark.parametrize("wanted", ["x", "w", "b", "wb"])
def test_gradients_that_nobody_wants_are_not_computed(at_any_size, width, wanted):
    torch.manual_seed(0)
    leaves = {
        "x": random(at_any_size, 9, width),
        "w": random(at_any_size, width),
        "b": random(at_any_size, width),
    }
    results = []
    for function in (layer_norm, reference.layer_norm):
        given = {name: t.clone().requires_grad_(name in wanted) for name, t in leaves.items()}
        y = function(*given.values(), 1e-5, variant=FUSED, normalized_shape=(width,))
        y.square().sum().backward()
        results.append([t.grad for t in given.values()])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_near(a, b, operations(width))


@pytest.mark.parametrize("width", [512, 20000])
def test_a_mean_far_from_zero_costs_no_digits(at_any_size, width):
    torch.manual_seed(0)
    x = random(at_any_size, 4, width) + 1000
    y, _, (dx,) = run(layer_norm, x)
    y2, _, (dx2,) = run(reference.layer_norm, x)
    exact, _, (exact_dx,) = run(reference.layer_norm, x.double())
    # Of numbers of a thousand and more, differences of one: these digits are lost before.
    room = rounding_bound(torch.float32, operations(width))
    assert off(y, exact) <= 2 * off(y2, exact) + room
    assert off(dx, exact_dx) <= 2 * off(dx2, exact_dx) + room


@pytest.mark.parametrize(
    "case", ["small", "wider", "two dimensions", "weight in float32", "float64", "one shape"]
)
def test_what_the_kernel_is_not_for_runs_the_definition(kernels, monkeypatch, half, case):
    monkeypatch.setattr(triton_backend, "LEAST", (1 << 30) if case == "small" else 0)
    x, w, b = (random(kernels, *s) for s in ((2, 4, 8), (8,), (8,)))
    shape: tuple[int, ...] = (8,)
    if case == "wider":
        x, w, b, shape = random(kernels, 1, 65537), None, None, (65537,)
    if case == "two dimensions":
        w, b, shape = random(kernels, 4, 8), random(kernels, 4, 8), (4, 8)
    if case == "float64":
        x, w, b = x.double(), w.double(), b.double()
    if case == "weight in float32":
        x = x.to(half)
        if kernels.type == "cuda":
            with pytest.raises(RuntimeError):
                layer_norm(x, w, b, 1e-5, variant=FUSED, normalized_shape=shape)
            return
    if case == "one shape":
        with pytest.raises(RuntimeError, match="normalized_shape"):
            layer_norm(x, w, b, 1e-5, variant=FUSED, normalized_shape=(9,))
        return
    y = layer_norm(x.requires_grad_(), w, b, 1e-5, variant=FUSED, normalized_shape=shape)
    assert not used_kernel(y)
    assert torch.equal(y, nn.functional.layer_norm(x, shape, w, b, 1e-5))


def test_a_nested_tensor_runs_the_definition(at_any_size):
    norm = nn.LayerNorm(8, device=at_any_size)
    x = torch.nested.nested_tensor([random(at_any_size, 3, 8), random(at_any_size, 5, 8)])
    y = layer_norm(x, norm.weight, norm.bias, 1e-5, variant=FUSED, normalized_shape=(8,))
    assert_near(y.unbind()[1], norm(x.unbind()[1]), operations(64))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_empty_inputs(at_any_size, shape):
    leaves = [random(at_any_size, *s).requires_grad_() for s in (shape, (64,), (64,))]
    y = layer_norm(*leaves, 1e-5, variant=FUSED, normalized_shape=(64,))
    y.sum().backward()
    assert used_kernel(y)
    assert y.shape == shape
    assert not leaves[1].grad.any()
    assert not leaves[2].grad.any()


@pytest.mark.parametrize(
    "kind",
    ["transposed", "sliced", "expanded", "strided channels", "channels first", "pixels", "one dimension"],
)
def test_inputs_that_are_not_contiguous(at_any_size, kind):
    torch.manual_seed(0)
    whole = random(at_any_size, 4, 6, 64)
    x = {
        "transposed": lambda: whole.transpose(0, 1),
        "sliced": lambda: whole[1:3, ::2, :32],
        "expanded": lambda: whole[:1].expand(5, -1, -1),
        "strided channels": lambda: whole[..., ::2],
        "channels first": lambda: whole.transpose(1, 2),
        "pixels": lambda: whole.view(2, 2, 6, 64).permute(0, 2, 3, 1),
        "one dimension": lambda: whole[0, 0],
    }[kind]().requires_grad_()
    w, b = random(at_any_size, x.shape[-1]), random(at_any_size, x.shape[-1])
    y = layer_norm(x, w, b, 1e-5, variant=FUSED, normalized_shape=x.shape[-1:])
    y2 = reference.layer_norm(x, w, b, 1e-5, variant=FUSED, normalized_shape=x.shape[-1:])
    assert used_kernel(y)
    assert_near(y, y2, operations(64))
    assert y.stride() == y2.stride()
    g = random(at_any_size, *reversed(y.shape)).permute(*reversed(range(y.dim())))
    (dx,), (dx2,) = torch.autograd.grad(y, x, g), torch.autograd.grad(y2, x, g)
    assert_near(dx, dx2, operations(64))


def test_a_gradient_that_is_expanded(at_any_size):
    x, w, b = (random(at_any_size, *s).requires_grad_() for s in ((3, 32), (32,), (32,)))
    ours, theirs = (
        torch.autograd.grad(f(x, w, b, 1e-5, variant=FUSED, normalized_shape=(32,)).sum(), (w, b))
        for f in (layer_norm, reference.layer_norm)
    )
    assert_near(ours, theirs, operations(32))


def test_inputs_are_left_as_they_were(at_any_size):
    given = [random(at_any_size, *s) for s in ((4, 64), (64,), (64,))]
    kept = [t.clone() for t in given]
    leaves = [t.requires_grad_() for t in given]
    y = layer_norm(*leaves, 1e-5, variant=FUSED, normalized_shape=(64,))
    g = torch.ones_like(y)
    y.backward(g)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    assert torch.equal(g, torch.ones_like(g))


@pytest.mark.parametrize("width", [64, 9000])
def test_the_same_bits_every_time(at_any_size, width):
    x, w, b = (random(at_any_size, *s) for s in ((300 if width == 64 else 5, width), (width,), (width,)))
    first, g, gradients = run(layer_norm, x, w, b)
    for _ in range(1 if at_any_size.type == "cpu" else 5):
        y, _, again = run(layer_norm, x, w, b, g)
        assert torch.equal(y, first)
        assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_without_gradients_the_same(at_any_size):
    x, w, b = random(at_any_size, 4, 64), random(at_any_size, 64).requires_grad_(), random(at_any_size, 64)
    with torch.no_grad():
        y = layer_norm(x, w, b, 1e-5, variant=FUSED, normalized_shape=(64,))
    assert torch.equal(y, layer_norm(x, w, b, 1e-5, variant=FUSED, normalized_shape=(64,)))
    assert not y.requires_grad


def test_the_function_transforms_of_torch_run_the_definition(at_any_size):
    x, w = random(at_any_size, 4, 64), random(at_any_size, 64)
    ours, theirs = (
        torch.func.grad(
            lambda x, f=f: f(x, w, None, 1e-5, variant=FUSED, normalized_shape=(64,)).square().sum()
        )(x)
        for f in (layer_norm, reference.layer_norm)
    )
    assert torch.equal(ours, theirs)


def test_second_derivatives_are_those_of_the_definition(at_any_size):
    x, w, b = (random(at_any_size, *s).requires_grad_() for s in ((4, 64), (64,), (64,)))

    def second(function):
        # The input depends on the weight as well: it must not be followed twice.
        y = function(x * w, w, b, 1e-5, variant=FUSED, normalized_shape=(64,)).sin().sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, w, b))

    for a, b2 in zip(second(layer_norm), second(reference.layer_norm), strict=True):
        assert_near(a, b2, 4 * operations(64))


def test_autocast_changes_no_dtype(at_any_size, half):
    for x, variant in ((random(at_any_size, 4, 64), FUSED), (random(at_any_size, 4, 64, dtype=half), COHERE)):
        w = random(at_any_size, 64)
        given = x, w, None, 1e-5
        with torch.autocast(at_any_size.type, dtype=torch.bfloat16):
            y = layer_norm(*given, variant=variant, normalized_shape=(64,))
            y2 = reference.layer_norm(*given, variant=variant, normalized_shape=(64,))
        assert y.dtype == y2.dtype
        assert_near(y, y2, operations(64) if y.dtype == torch.float32 else 2)


def test_autocast_of_torch_in_half_precision_runs_the_definition(at_any_size, half):
    norm, x = nn.LayerNorm(64, device=at_any_size, dtype=half), random(at_any_size, 4, 64, dtype=half)
    with torch.autocast(at_any_size.type, dtype=torch.bfloat16):
        y = layer_norm(x, norm.weight, norm.bias, 1e-5, variant=FUSED, normalized_shape=(64,))
        assert not used_kernel(y)
        assert y.dtype == norm(x).dtype


@pytest.mark.parametrize("given", ["both", "weight", "bias", "none"])
def test_opcheck(kernels, given):
    x = random(kernels, 3, 4, 64).requires_grad_()
    w = random(kernels, 64).requires_grad_() if given in ("both", "weight") else None
    b = random(kernels, 64).requires_grad_() if given in ("both", "bias") else None
    torch.library.opcheck(torch.ops.twinkle.layer_norm.default, (x, w, b, 1e-5))
    torch.library.opcheck(torch.ops.twinkle.layer_norm.default, (x.transpose(0, 1), w, b, 1e-5))
    y, stats = torch.ops.twinkle.layer_norm(x.detach(), w, b, 1e-5)
    plain = [None if t is None else t.detach() for t in (y, x, w, b, stats)]
    for wanted in ([True, True, True], [False, w is not None, False]):
        torch.library.opcheck(torch.ops.twinkle.layer_norm_backward.default, (*plain, wanted))


def test_the_op_equals_the_straight_call(at_any_size):
    x, w, b = (random(at_any_size, *s) for s in ((4, 64), (64,), (64,)))
    y, g, gradients = run(layer_norm, x, w, b)
    y2, _, gradients2 = run(lambda *a, **_: torch.ops.twinkle.layer_norm(*a)[0], x, w, b, g)
    assert torch.equal(y, y2)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients2, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(at_any_size, dynamic):
    torch._dynamo.reset()
    x, w, b = (random(at_any_size, *s) for s in ((4, 64), (64,), (64,)))
    y, g, gradients = run(layer_norm, x, w, b)
    backend = "inductor" if at_any_size.type == "cuda" else "aot_eager"
    compiled = torch.compile(
        lambda *a, **kwargs: layer_norm(*a, **kwargs) * 1.0, fullgraph=True, dynamic=dynamic, backend=backend
    )
    y2, _, gradients2 = run(compiled, x, w, b, g)
    assert torch.equal(y, y2)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients2, strict=True))


def test_a_compiler_sees_torchs_own_function_where_inputs_are_small(kernels):
    torch._dynamo.reset()
    x, w, b = (random(kernels, *s) for s in ((4, 64), (64,), (64,)))
    seen = []

    def backend(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(layer_norm, fullgraph=True, backend=backend)(
        x, w, b, 1e-5, variant=FUSED, normalized_shape=(64,)
    )
    assert seen == [nn.functional.layer_norm]


def test_a_layer_for_the_names_of_any_class(at_any_size):
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.shift, self.tiny = (
                nn.Parameter(torch.randn(64)),
                nn.Parameter(torch.randn(64)),
                1e-5,
            )

    facts = {"x": "states", "weight": "gain", "bias": "shift", "eps": "tiny", "normalized_shape": (64,)}
    made = layer_class(FUSED, facts)
    norm, x = Norm().to(at_any_size), random(at_any_size, 4, 64)
    y = made.forward(norm, states=x)
    assert used_kernel(y)
    assert torch.equal(y, layer_norm(x, norm.gain, norm.shift, 1e-5, variant=FUSED, normalized_shape=(64,)))
    assert made is layer_class(FUSED, facts)


def test_only_one_normalised_dimension_is_taken():
    assert supports(FUSED, "cuda", {"normalized_shape": (4, 8)}) == "it normalises over 2 dimensions"
    assert supports(FUSED, "cuda", {"normalized_shape": (8,)}) is None
    assert supports(FUSED, "cuda", {}) is None


def test_what_rounds_in_between_has_the_kernel_in_float32_alone(at_any_size, half):
    variant = VARIANTS["out_input_both_var_divide_after_weight"]
    w, b = torch.ones(2, 64, device=at_any_size)
    for dtype in (torch.float32, half):
        x = torch.randn(3, 64, device=at_any_size, dtype=dtype, requires_grad=True)
        y = layer_norm(x, w.to(dtype), b.to(dtype), 1e-5, variant=variant)
        assert (type(y.grad_fn).__name__ == "_LayerNormBackward") == (dtype == torch.float32)


def test_a_device_of_triton_gets_its_kernel_and_a_cpu_what_torch_has(kernels, monkeypatch):
    left = {
        variant.name
        for variant in reference.VARIANTS
        if backend_for("layer_norm", variant, kernels.type) is None
    }
    assert {backend_for("layer_norm", variant, kernels.type).name for variant in VARIANTS.values()} == {
        "triton_backend"
    }
    assert left == {name for name in left if name.startswith("std_")} != set()
    monkeypatch.setattr("twinkle.ops.launch.DEVICE_TYPES", frozenset())
    assert backend_for("layer_norm", FUSED, "cpu") is None
    assert backend_for("layer_norm", COHERE, "cpu").name == "torch_backend"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_than_2_to_the_31_elements():
    torch.manual_seed(0)
    rows = (1 << 31) // 4096 + 8
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w, b = (torch.randn(4096, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    y = layer_norm(x, w, b, 1e-5, variant=FUSED, normalized_shape=(4096,))
    assert used_kernel(y)
    expected = nn.functional.layer_norm(x[-4:], (4096,), w, b, 1e-5)
    torch.testing.assert_close(y[-4:], expected, rtol=0.02, atol=0.02)
    g = torch.randn_like(y[-4:])
    (dx,) = torch.autograd.grad(y, x, torch.cat((torch.zeros_like(y[:-4]), g)))
    (expected_dx,) = torch.autograd.grad(expected, x, g)
    torch.testing.assert_close(dx[-4:], expected_dx[-4:], rtol=0.02, atol=0.02)
