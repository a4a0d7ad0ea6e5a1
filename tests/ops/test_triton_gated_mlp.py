"""The gated activation in triton against plain torch."""

from __future__ import annotations

import pytest
import torch
from rounding import across_a_boundary, assert_near, rounding_bound
from torch import nn

from twinkle.ops.gated_mlp import activation as gated
from twinkle.ops.gated_mlp import reference
from twinkle.ops.gated_mlp.layer import GatedMLP
from twinkle.ops.gated_mlp.triton_backend import gated_mlp, layer_class

VARIANTS = {
    "plain": ("none", None, None, False),
    "clamped": ("inputs", 0.7, None, False),
    "clamped_activated": ("activated", 0.5, None, False),
    "scaled": ("none", None, 1.3, False),
    "float32": ("none", None, None, True),
}


OPERATIONS = 24
"""Behind an activation, its product and their gradients: a function of a library counts as four."""


def pair(device, dtype=torch.float32, shape=(3, 4, 70)):
    torch.manual_seed(0)
    return tuple(torch.randn(shape, dtype=dtype).to(device).requires_grad_() for _ in range(2))


def gradients(y, inputs):
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return torch.autograd.grad(y, inputs, g)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", gated.ACTIVATIONS)
def test_float32_equals_torch_to_a_few_ulps(kernels, name, variant):
    g, u = pair(kernels)
    y, y2 = (
        gated.gated_activation(g, u, name, *VARIANTS[variant]),
        gated.definition(g, u, name, *VARIANTS[variant]),
    )
    assert type(y.grad_fn).__name__ == "_GatedBackward"
    for a, b in zip((y, *gradients(y, (g, u))), (y2, *gradients(y2, (g, u))), strict=True):
        assert_near(a, b, OPERATIONS)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", gated.ACTIVATIONS)
def test_half_precision_is_within_one_rounding(kernels, half, name, variant):
    g, u = pair(kernels, half)
    y, y2 = (
        gated.gated_activation(g, u, name, *VARIANTS[variant]),
        gated.definition(g, u, name, *VARIANTS[variant]),
    )
    eps = torch.finfo(half).eps
    # One step to a neighbour, which among the smallest numbers of all is a step of theirs; where a factor is
    # rounded in before, that step may be one more.
    steps = 2 if variant == "scaled" else 1
    room = steps * eps + 2 * rounding_bound(torch.float32, OPERATIONS)
    torch.testing.assert_close(y, y2, rtol=room, atol=2 * torch.finfo(half).tiny * eps)
    assert float((y != y2).float().mean()) < max(2 / y.numel(), across_a_boundary(half, OPERATIONS))
    for a, b in zip(gradients(y, (g, u)), gradients(y2, (g, u)), strict=True):
        assert_near(a, b, 4)


@pytest.mark.parametrize("gate_half", [0, 1])
def test_the_halves_of_one_tensor_give_the_same_and_one_gradient(kernels, gate_half):
    g, u = pair(kernels)
    both = torch.cat((g, u) if gate_half == 0 else (u, g), -1).detach().requires_grad_()
    y, y2 = gated.gated_activation_fused(both, "silu", gate_half), gated.gated_activation(g, u)
    assert torch.equal(y, y2)
    expected = gradients(y2, (g, u))
    assert torch.equal(
        gradients(y, (both,))[0], torch.cat(expected if gate_half == 0 else expected[::-1], -1)
    )


@pytest.mark.parametrize("kind", ["transposed", "halves", "strided", "empty", "one dimension"])
def test_inputs_of_any_layout(kernels, kind):
    whole = torch.randn(4, 6, 64, device=kernels)
    g, u = {
        "transposed": lambda: (whole.transpose(0, 1), whole.transpose(0, 1) + 1),
        "halves": lambda: whole.chunk(2, -1),
        "strided": lambda: (whole[..., ::2], whole[..., 1::2]),
        "empty": lambda: (whole[:0], whole[:0]),
        "one dimension": lambda: (whole[0, 0], whole[0, 1]),
    }[kind]()
    g, u = g.requires_grad_(), u.requires_grad_()
    y, y2 = gated.gated_activation(g, u), gated.definition(g, u, "silu", "none", None, None, False)
    assert_near(y, y2, OPERATIONS)
    if kind in ("transposed", "halves"):
        assert y.stride() == y2.stride()
    for a, b in zip(gradients(y, (g, u)), gradients(y2, (g, u)), strict=True):
        assert_near(a, b, OPERATIONS)


def test_an_activation_without_kernel_is_refused(kernels):
    g, u = pair(kernels)
    with pytest.raises(ValueError, match="no kernel for the activation 'mish'"):
        gated.gated_activation(g, u, "mish")


def test_second_derivatives_are_those_of_torch(kernels):
    g, u = pair(kernels)

    def second(y):
        first = torch.autograd.grad(y.sin().sum(), (g, u), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), (g, u))

    ours = second(gated.gated_activation(g, u))
    theirs = second(gated.definition(g, u, "silu", "none", None, None, False))
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, 4 * OPERATIONS)


def test_opcheck(kernels):
    g, u = pair(kernels)
    both = torch.cat((g, u), -1).detach().requires_grad_()
    torch.library.opcheck(
        torch.ops.twinkle.gated_activation.default, (g, u, "silu", "none", None, None, False)
    )
    torch.library.opcheck(
        torch.ops.twinkle.gated_activation_fused.default, (both, "gelu", 1, "inputs", 0.7, None, False)
    )


def test_compiled_without_a_graph_break(kernels):
    torch._dynamo.reset()
    g, u = pair(kernels)
    backend = "inductor" if kernels.type == "cuda" else "aot_eager"
    y = torch.compile(gated.gated_activation, fullgraph=True, backend=backend)(g, u)
    y2 = gated.gated_activation(g, u)
    assert torch.equal(y, y2)
    assert all(torch.equal(a, b) for a, b in zip(gradients(y, (g, u)), gradients(y2, (g, u)), strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_behind_it_keeps_no_product(kernels, bias):
    g, u = pair(kernels)
    down = nn.Linear(70, 8, bias=bias).to(kernels)
    wanted = (g, u, *down.parameters())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = gated.gated_linear(g, u, down.weight, down.bias)
    assert {id(t) for t in kept} == {id(g), id(u), id(down.weight)}
    y2 = down(torch.nn.functional.silu(g) * u)
    for a, b in zip((y, *gradients(y, wanted)), (y2, *gradients(y2, wanted)), strict=True):
        assert_near(a, b, OPERATIONS + 70)


class MLP(nn.Module):
    def __init__(self, variant, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 24, bias=bias), nn.Linear(16, 24, bias=bias)
        self.gate_up_proj = nn.Linear(16, 48, bias=bias)
        self.down_proj, self.norm, self.dropout = (
            nn.Linear(24, 16, bias=bias),
            nn.LayerNorm(24),
            nn.Dropout(0.0),
        )

    def parts(self, variant):
        fused = variant.projections == "fused"
        return {
            "gate": None if fused else self.gate_proj,
            "up": None if fused else self.up_proj,
            "gate_up": self.gate_up_proj if fused else None,
            "down": self.down_proj if variant.down else None,
            "norm": self.norm if variant.norm else None,
            "dropout": self.dropout if variant.dropout else None,
            "last_dropout": self.dropout if variant.last_dropout else None,
            "factor": 1.25 if variant.factor else 1.0,
            "gate_last": True,
            "limit": 0.3 if variant.clamp != "none" else None,
            "gate_scale": 1.5,
            "output_scale": 0.5,
        }


@pytest.mark.parametrize("variant", reference.VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("hooked", [False, True])
def test_every_variant_equals_its_definition(kernels, variant, hooked):
    torch.manual_seed(0)
    mlp = MLP(variant).to(kernels)
    seen = []
    if hooked:
        mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 3, 16, device=kernels, requires_grad=True)
    parts = mlp.parts(variant)
    if variant.projections == "given":
        parts["other"] = torch.randn(2, 3, 16, device=kernels)
    y = gated_mlp(x, activation="silu", variant=variant, **parts)
    assert len(seen) == int(hooked and variant.down)
    y2 = reference.gated_mlp(x, activation=nn.functional.silu, variant=variant, **parts)
    used = [
        p
        for p in mlp.parameters()
        if torch.autograd.grad(y2.sum(), p, retain_graph=True, allow_unused=True)[0] is not None
    ]
    for a, b in zip((y, *gradients(y, (x, *used))), (y2, *gradients(y2, (x, *used))), strict=True):
        assert_near(a, b, 2 * OPERATIONS + 16 + 24 + 48)


def test_the_last_projection_is_called_where_its_class_has_another_forward(kernels, monkeypatch):
    mlp, called = MLP(reference.VARIANTS[0]).to(kernels), []
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: called.append(self) or plain(self, x))
    x = torch.randn(2, 3, 16, device=kernels, requires_grad=True)
    gated_mlp(x, activation="silu", variant=reference.VARIANTS[0], **mlp.parts(reference.VARIANTS[0]))
    assert len(called) == 3


def test_a_layer_for_the_names_of_any_class(kernels):
    facts = {"x": "h", "gate": "gate_proj", "up": "up_proj", "down": "down_proj", "activation": "gelu_tanh"}
    made = layer_class(reference.VARIANTS[0], facts)
    mlp, x = MLP(reference.VARIANTS[0]).to(kernels), torch.randn(2, 3, 16, device=kernels)
    expected = mlp.down_proj(nn.functional.gelu(mlp.gate_proj(x), approximate="tanh") * mlp.up_proj(x))
    assert_near(made.forward(mlp, h=x), expected, OPERATIONS + 16 + 24)
    assert_near(
        GatedMLP.forward(mlp, x),
        mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)),
        OPERATIONS + 16 + 24,
    )
    with pytest.raises(ValueError, match="no kernel for the activation"):
        layer_class(reference.VARIANTS[0], {**facts, "activation": "unknown:Swish"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_than_2_to_the_31_elements():
    g = torch.randn((1 << 31) + 4096, device="cuda", dtype=torch.bfloat16)
    y = gated.gated_activation(g, g)
    tail = gated.definition(g[-4096:], g[-4096:], "silu", "none", None, None, False)
    torch.testing.assert_close(y[-4096:], tail, rtol=0.008, atol=1e-6)
