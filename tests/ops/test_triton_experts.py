"""Mixture of experts as an op, in triton and in plain torch, against its definition."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_near, rounding_bound

from twinkle.ops.experts import cpu_backend, products, reference
from twinkle.ops.experts.gating import gating_of
from twinkle.ops.experts.layer import experts, layer_class, supports
from twinkle.ops.gated_mlp.activation import ACTIVATIONS

# The kernels know no difference between a variant and its unpadded one.
VARIANTS = {
    variant.name: variant
    for variant in reference.VARIANTS
    if supports(variant) is None and "_unpadded" not in variant.name
}
PLAIN = VARIANTS["plain"]
EXPERTS, HIDDEN, INTER = 4, 20, 12
HERE = torch.device("cpu")
# Two products, back and forth, over the width, both halves between, and the tokens; two dozen others.
OPERATIONS = 24 + 2 * (HIDDEN + 2 * INTER) + 12


@pytest.fixture(params=["triton", "torch"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where a test runs: all in triton's kernels; or plain torch on the CPU, torch's products on a GPU."""
    if request.param == "torch" and not torch.cuda.is_available():
        return torch.device("cpu")
    if request.param == "triton":
        monkeypatch.setattr(products, "grouped_mm_of", lambda *_: None)
    else:
        monkeypatch.setattr(products, "is_few", lambda *_: False)
    found: torch.device = request.getfixturevalue("kernels")
    return found


@pytest.fixture
def half(device: torch.device, request: pytest.FixtureRequest) -> torch.dtype:
    """Where to test roundings: the interpreter rounds to float16, but truncates to bfloat16."""
    interpreted = device.type == "cpu" and "kernels" in request.fixturenames
    return torch.float16 if interpreted else torch.bfloat16


class Call:
    """Inputs of one call, and the call by the op and by the definition."""

    def __init__(self, variant=PLAIN, *, device, dtype=torch.float32, tokens=6, k=2, indices=None, seed=0):
        torch.manual_seed(seed)
        self.variant = variant

        def random(*shape, scale=1.0):
            return (torch.randn(shape) * scale).to(device, dtype).requires_grad_()

        def matrix(rows, columns):
            return random(EXPERTS, *((columns, rows) if variant.transposed else (rows, columns)), scale=0.25)

        if indices is None:
            indices = torch.rand(tokens, EXPERTS).topk(k).indices
        tokens, k = indices.shape
        self.indices = indices.to(device)
        self.x = random(tokens, HIDDEN)
        self.weights = torch.rand(tokens, k).to(device, dtype).requires_grad_()
        self.gate_up, self.down = matrix(2 * INTER, HIDDEN), matrix(HIDDEN, INTER)
        self.rest = {"limit": 0.4, "alpha": 1.7}
        if variant.bias:
            self.rest["gate_up_bias"] = random(EXPERTS, 2 * INTER)
            self.rest["down_bias"] = random(EXPERTS, HIDDEN)

    def leaves(self):
        given = (self.x, self.weights, self.gate_up, self.down, *self.rest.values())
        return [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]

    def ours(self, activation="silu", **more):
        given = (self.x, self.indices, self.weights, self.gate_up, self.down, EXPERTS, activation)
        return experts(*given, variant=self.variant, **self.rest, **more)

    def theirs(self, activation="silu"):
        given = (self.x, self.indices, self.weights, self.gate_up, self.down, EXPERTS)
        return reference.experts(*given, ACTIVATIONS[activation], variant=self.variant, **self.rest)

    def check(self, operations=OPERATIONS, **options):
        y, y2 = self.ours(**options), self.theirs(**options)
        assert type(y.grad_fn).__name__ == "_ExpertsBackward"
        leaves = self.leaves()
        for a, b in zip((y, *gradients(y, leaves)), (y2, *gradients(y2, leaves)), strict=True):
            assert a.dtype == b.dtype
            assert_near(a, b, operations)


def gradients(y, leaves):
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return torch.autograd.grad(y, leaves, g)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_equals_its_definition_in_float32(device, variant):
    Call(variant, device=device).check()


@pytest.mark.parametrize(
    "variant", [VARIANTS["float32_gating"], VARIANTS["gpt_oss"]], ids=lambda variant: variant.name
)
def test_half_precision_is_as_near_to_float32_as_the_definition(device, half, variant):
    call = Call(variant, device=device, dtype=half)
    ours = call.ours()
    ours = (ours, *gradients(ours, call.leaves()))
    theirs = call.theirs()
    theirs = (theirs, *gradients(theirs, call.leaves()))
    exact = Call(variant, device=device)
    for mine, original in zip(exact.leaves(), call.leaves(), strict=True):
        mine.data.copy_(original)
    best = exact.theirs()
    best = (best, *gradients(best, exact.leaves()))
    for a, b, c in zip(ours, theirs, best, strict=True):
        # The sum of what two experts give is rounded once for each.
        room = rounding_bound(half, 2, c.norm().item())
        assert (a.float() - c).norm() <= 2 * (b.float() - c).norm() + room


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_on_the_cpu(activation):
    Call(device=HERE).check(activation=activation)


@pytest.mark.parametrize(
    "variant", [VARIANTS["clamped"], VARIANTS["clamped_activated"]], ids=lambda variant: variant.name
)
def test_an_activation_behind_a_clamp(device, variant):
    Call(variant, device=device, tokens=3).check(activation="gelu_tanh")


ROUTINGS = {
    "an expert without tokens": torch.tensor([[0, 2], [3, 2], [2, 3]]),
    "all tokens to one expert": torch.full((5, 1), 2),
    "one token": torch.tensor([[1, 3, 0]]),
    "twice to one expert": torch.tensor([[1, 1], [1, 0]]),
    "more tokens than a tile": torch.cat([torch.full((37, 1), 1), torch.full((2, 1), 3)]),
    "slots without expert": torch.tensor([[0, 4], [4, 4], [3, 1]]),
}


@pytest.mark.filterwarnings("ignore:Deterministic behavior")
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(device, routing):
    # What nobody wrote reads as NaN here: rows of slots without expert must not be looked at.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        Call(device=device, indices=ROUTINGS[routing]).check()
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_slot_with_an_expert(device):
    call = Call(device=device, indices=torch.full((2, 2), EXPERTS))
    y = call.ours()
    assert not y.any()
    assert all(not g.any() for g in gradients(y, call.leaves()))


def test_no_tokens_at_all(device):
    call = Call(device=device, tokens=0)
    y = call.ours()
    assert y.shape == (0, HIDDEN)
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), call.leaves()))


def test_slots_without_expert_have_weights_that_count_nothing(device):
    call = Call(device=device, indices=torch.tensor([[0, EXPERTS], [2, 1]]))
    call.weights.data[0, 1] = float("nan")
    y = call.ours()
    assert y.isfinite().all()
    assert gradients(y, [call.weights])[0][0, 1] == 0


def test_inputs_of_any_layout(device):
    call = Call(device=device)
    call.x = call.x.detach().t().contiguous().t().requires_grad_()
    call.weights = call.weights.detach().repeat(1, 2)[:, ::2].requires_grad_()
    call.gate_up = call.gate_up.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    call.down = call.down.detach().repeat_interleave(2, 2)[..., ::2].requires_grad_()
    call.indices = call.indices.repeat(1, 2)[:, ::2]
    call.check()


def test_a_gradient_of_one_number_for_all(device):
    call = Call(device=device, tokens=4)
    for a, b in zip(
        torch.autograd.grad(call.ours().sum(), call.leaves()),
        torch.autograd.grad(call.theirs().sum(), call.leaves()),
        strict=True,
    ):
        assert_near(a, b, OPERATIONS)


def test_routing_weights_in_float32(device, half):
    call = Call(device=device, dtype=half)
    call.weights = call.weights.detach().float().requires_grad_()
    y, y2 = call.ours(), call.theirs()
    assert y.dtype == half
    assert_near(y, y2, 8, dtype=half)
    (mine,), (other,) = gradients(y, [call.weights]), gradients(y2, [call.weights])
    assert mine.dtype == torch.float32
    assert_near(mine, other, 8, dtype=half)


@pytest.mark.parametrize("name", ["x", "weights", "gate_up", "down"])
def test_a_gradient_for_one_input_alone(device, name):
    call = Call(device=device, tokens=4)
    for other in ("x", "weights", "gate_up", "down"):
        getattr(call, other).requires_grad_(other == name)
    call.check()


def test_nothing_is_kept_but_the_inputs_and_the_fused_projection(device):
    call = Call(device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call.ours()
    given = {id(t) for t in (*call.leaves(), call.indices)}
    own = sorted(tuple(t.shape) for t in kept if id(t) not in given)
    assert own == [(3, 12), (EXPERTS + 1,), (12, 2 * INTER)]


def test_the_same_bits_every_time_and_inputs_untouched(device, half):
    call = Call(device=device, dtype=half)
    before = [t.detach().clone() for t in (*call.leaves(), call.indices)]
    runs = []
    for _ in range(2):
        y = call.ours()
        runs.append((y, *gradients(y, call.leaves())))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((*call.leaves(), call.indices), before, strict=True))


def test_second_derivatives_are_those_of_the_definition(device):
    call = Call(device=device, tokens=3)

    def second(y):
        first = torch.autograd.grad(y.sin().sum(), call.leaves(), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), call.leaves())

    for a, b in zip(second(call.ours()), second(call.theirs()), strict=True):
        assert_near(a, b, 4 * OPERATIONS)


def test_under_a_transform_the_definition_runs(device):
    call = Call(device=device, tokens=3)

    def total(x):
        given = (x, call.indices, call.weights, call.gate_up, call.down, EXPERTS)
        return experts(*given).sum()

    (expected,) = torch.autograd.grad(call.theirs().sum(), [call.x])
    assert_near(torch.func.grad(total)(call.x), expected, OPERATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [PLAIN, VARIANTS["gpt_oss"]], ids=lambda variant: variant.name)
def test_opcheck(device, variant):
    call = Call(variant, device=device, tokens=3)
    biases = call.rest.get("gate_up_bias"), call.rest.get("down_bias")
    rest = (variant.name, *gating_of(variant, "silu", 0.4, 1.7))
    inputs = (call.x, call.indices, call.weights, call.gate_up, call.down, *biases)
    torch.library.opcheck(torch.ops.twinkle.experts.default, (*inputs, *rest))


@pytest.mark.slow
def test_compiled_without_a_graph_break(device):
    torch._dynamo.reset()
    call = Call(device=device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    y = torch.compile(call.ours, fullgraph=True, backend=backend)()
    y2 = call.ours()
    assert torch.equal(y, y2)
    for a, b in zip(gradients(y, call.leaves()), gradients(y2, call.leaves()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", [None, "grouped_mm"])
def test_under_autocast_grouped_mm_alone_keeps_the_dtype_of_the_weights(device, half, implementation):
    call = Call(device=device, tokens=4)
    with torch.autocast(device.type, dtype=half):
        y = call.ours(implementation=implementation)
    exact = call.theirs()
    assert y.dtype == torch.float32
    off = ((y - exact).norm() / exact.norm()).item()
    in_float32 = 2 * rounding_bound(torch.float32, OPERATIONS)
    assert off < in_float32 if implementation else in_float32 < off < 2 * rounding_bound(half, 8)


def test_a_layer_for_the_names_of_any_class(device):
    call = Call(VARIANTS["clamped"], device=device)
    facts = {
        "x": "h",
        "indices": "where",
        "weights": "how_much",
        "gate_up": "both",
        "down": "last",
        "num_experts": EXPERTS,
        "activation": "gelu",
        "limit": 0.4,
        "implementation": "eager",
    }
    made = layer_class(call.variant, facts)
    layer = torch.nn.Module()
    layer.both, layer.last = torch.nn.Parameter(call.gate_up), torch.nn.Parameter(call.down)
    y = made.forward(layer, call.x, where=call.indices, how_much=call.weights)
    assert_near(y, call.theirs("gelu"), OPERATIONS)
    assert layer_class(call.variant, dict(facts)) is made


def test_what_is_left_alone():
    assert "unknown:Swish" in supports(PLAIN, "cuda", {"activation": "unknown:Swish"})
    assert "sonicmoe" in supports(PLAIN, "cuda", {"implementation": "sonicmoe"})
    assert supports(PLAIN, "cuda", {"implementation": "grouped_mm"}) is None
    assert "grouped_mm" in cpu_backend.supports(PLAIN, "cpu", {"implementation": "grouped_mm"})
    assert cpu_backend.supports(PLAIN, "cpu", {"implementation": "eager"}) is None
    assert all(supports(variant) for variant in reference.VARIANTS if variant.norm or variant.float32)
    with pytest.raises(ValueError, match="no kernel for the activation 'unknown:Swish'"):
        layer_class(PLAIN, {"activation": "unknown:Swish"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("device", ["triton", "torch"], indirect=True)
@pytest.mark.parametrize(("hidden", "inter"), [(2048, 768), (200, 72)])
def test_many_experts_on_a_gpu(device, dtype, hidden, inter):
    torch.manual_seed(0)
    number, tokens, k = 64, 700, 4

    def random(*shape, scale=0.03):
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    x, gate_up, down = (
        random(tokens, hidden, scale=1),
        random(number, 2 * inter, hidden),
        random(number, hidden, inter),
    )
    indices = torch.rand(tokens, number, device=device).pow(3).topk(k).indices
    indices[indices == 7] = 8  # one expert gets none
    weights = torch.rand(tokens, k, device=device).to(dtype).requires_grad_()
    leaves = (x, weights, gate_up, down)
    y = experts(x, indices, weights, gate_up, down, number)
    y2 = reference.experts(x, indices, weights, gate_up, down, number, variant=PLAIN)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip((y, *gradients(y, leaves)), (y2, *gradients(y2, leaves)), strict=True):
        assert ((a.float() - b.float()).norm() / b.float().norm()).item() < bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["triton", "torch"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_host_never_waits_for_the_gpu(device, dtype):
    call = Call(device=device, dtype=dtype)
    gradients(call.ours(), call.leaves())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = call.ours()
        torch.autograd.grad(y, call.leaves(), torch.ones_like(y))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["triton", "torch"], indirect=True)
def test_more_than_2_to_the_31_weights(device):
    number, hidden, inter = 9, 8192, 16384
    gate_up = torch.empty(number, 2 * inter, hidden, device=device, dtype=torch.bfloat16).normal_(std=0.01)
    down = torch.empty(number, hidden, inter, device=device, dtype=torch.bfloat16).normal_(std=0.01)
    x = torch.randn(4, hidden, device=device, dtype=torch.bfloat16)
    indices = torch.tensor([[8], [8], [0], [7]], device=device)
    weights = torch.ones(4, 1, device=device, dtype=torch.bfloat16)
    y = experts(x, indices, weights, gate_up, down, number)
    y2 = reference.experts(x, indices, weights, gate_up, down, number, variant=PLAIN)
    assert ((y.float() - y2.float()).norm() / y2.float().norm()).item() < 1e-2


@pytest.mark.parametrize(
    ("rows", "dtype", "torchs"),
    [(64, torch.bfloat16, False), (65, torch.bfloat16, True), (64, torch.float32, True)],
    ids=["few", "many", "few in float32"],
)
def test_a_few_rows_for_an_expert_go_to_tritons_product(rows, dtype, torchs, monkeypatch):
    asked = []
    monkeypatch.setattr(products, "grouped_mm", lambda *given: asked.append(given))
    a, w = torch.randn(rows, 8).to(dtype), torch.randn(2, 8, 16).to(dtype)
    offsets = torch.tensor([0, rows // 2, rows], dtype=torch.int32)
    products.rows(a, w, offsets, rows)
    assert bool(asked) is torchs
