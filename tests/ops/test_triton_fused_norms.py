"""Residual norm and QK norm with rotation in triton against their definitions."""

from __future__ import annotations

import pytest
import torch
from rounding import across_a_boundary, assert_near, terms

from twinkle.ops.qk_norm_rotary import reference as qk_reference
from twinkle.ops.qk_norm_rotary import triton_backend as qk
from twinkle.ops.residual_norm import reference as residual_reference
from twinkle.ops.residual_norm import triton_backend as residual
from twinkle.ops.rms_norm.reference import VARIANTS as NORMS
from twinkle.ops.rotary.reference import VARIANTS as ROTATIONS

NORM = {variant.name: variant for variant in NORMS}
ROTATION = {variant.name: variant for variant in ROTATIONS}


def compare(ours, theirs, wanted, operations, dtype=torch.float32):
    torch.manual_seed(1)
    gradients = [torch.randn(y.shape).to(y) for y in theirs]
    found = torch.autograd.grad(ours, wanted, gradients)
    expected = torch.autograd.grad(theirs, wanted, gradients)
    for a, b in zip((*ours, *found), (*theirs, *expected), strict=True):
        assert a.dtype == b.dtype
        assert_near(a, b, operations, dtype=dtype)


def residual_inputs(device, dtype=torch.float32, width=100):
    torch.manual_seed(0)
    x, r = (torch.randn(3, 5, width, dtype=dtype).to(device).requires_grad_() for _ in range(2))
    return x, r, torch.randn(width, dtype=dtype).to(device).requires_grad_()


@pytest.mark.parametrize("width", [100, 9000])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma", "olmo2", "unweighted", "t5"])
def test_residual_norm_equals_its_definition(kernels, name, scaled, width):
    variant = residual_reference.ResidualNormVariant("", NORM[name], scaled)
    x, r, w = residual_inputs(kernels, width=width)
    weight = None if NORM[name].weight == "none" else w
    ours = residual.residual_norm(x, r, weight, 1e-6, variant=variant, scale=0.22)
    theirs = residual_reference.residual_norm(x, r, weight, 1e-6, variant=variant, scale=0.22)
    assert type(ours[0].grad_fn).__name__ == "_ResidualNormBackward"
    compare(ours, theirs, [x, r] if weight is None else [x, r, w], 2 * terms(width) + 30)


def test_residual_norm_rounds_where_its_definition_rounds(kernels, half):
    x, r, w = residual_inputs(kernels, half)
    variant = residual_reference.ResidualNormVariant("", NORM["llama"])
    (h, y), (h2, y2) = (
        f(x, r, w, 1e-6, variant=variant) for f in (residual.residual_norm, residual_reference.residual_norm)
    )
    assert torch.equal(h, h2)
    torch.testing.assert_close(y, y2, rtol=2 * torch.finfo(half).eps, atol=0)
    assert float((y != y2).float().mean()) < across_a_boundary(half, terms(100) + 12)


@pytest.mark.parametrize("only", [0, 1])
@pytest.mark.parametrize("scaled", [False, True])
def test_residual_norm_with_one_result_used(kernels, only, scaled):
    variant = residual_reference.ResidualNormVariant("", NORM["llama"], scaled)
    x, r, w = residual_inputs(kernels)
    found, expected = (
        torch.autograd.grad(
            f(x, r, w, 1e-6, variant=variant, scale=0.5)[only].sin().sum(), (x, r, w), allow_unused=True
        )
        for f in (residual.residual_norm, residual_reference.residual_norm)
    )
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert_near(a, b, 2 * terms(100) + 30)


def test_residual_norm_second_derivatives(kernels):
    x, r, w = residual_inputs(kernels)
    variant = residual_reference.ResidualNormVariant("", NORM["llama"])

    def second(function):
        h, y = function(x, r, w, 1e-6, variant=variant)
        first = torch.autograd.grad((h.sin() + y.sin()).sum(), (x, r, w), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, r, w))

    for a, b in zip(second(residual.residual_norm), second(residual_reference.residual_norm), strict=True):
        assert_near(a, b, 4 * (2 * terms(100) + 30))


@pytest.mark.parametrize("scale", [None, 0.5])
def test_residual_norm_opcheck(kernels, scale):
    x, r, w = residual_inputs(kernels)
    torch.library.opcheck(torch.ops.twinkle.residual_norm.default, (x, r, w, 1e-6, "llama", scale))


def qk_inputs(
    device, over="head", dtype=torch.float32, tables=torch.float32, width=24, batch=2, heads=3, kv=2
):
    torch.manual_seed(0)
    q, k = (torch.randn(batch, 5, h * 24, dtype=dtype).to(device).requires_grad_() for h in (heads, kv))
    shapes = (24, 24) if over == "head" else (24 * heads, 24 * kv)
    qw, kw = (torch.randn(s, dtype=dtype).to(device).requires_grad_() for s in shapes)
    cos, sin = (torch.randn(1, 5, width, dtype=tables).to(device) for _ in range(2))
    return q, k, qw, kw, 1e-6, 1e-5, cos, sin


@pytest.mark.parametrize("over", ["head", "all"])
@pytest.mark.parametrize("rotation", ["half", "half_float32", "half_cast", "float32_tables", "split_half"])
@pytest.mark.parametrize("name", ["llama", "gemma", "olmo2", "unweighted", "t5", "statistics"])
def test_qk_norm_rotary_equals_its_definition(kernels, half, name, rotation, over):
    variant = qk_reference.QKNormRotaryVariant("", NORM[name], ROTATION[rotation], over)
    assert qk.supports(variant) is None
    width = 12 if rotation == "split_half" else 24
    for dtype, tables in ((torch.float32, torch.float32), (half, half), (half, torch.float32)):
        inputs = qk_inputs(kernels, over, dtype, tables, width)
        wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        if NORM[name].weight == "none":
            inputs, wanted = (*inputs[:2], None, None, *inputs[4:]), wanted[:2]
        ours, theirs = (
            f(*inputs, head_dim=24, variant=variant) for f in (qk.qk_norm_rotary, qk_reference.qk_norm_rotary)
        )
        assert type(ours[0].grad_fn).__name__ == "_QKNormRotaryBackward"
        assert [y.stride() for y in ours] == [y.stride() for y in theirs]
        # Half precision is rounded to after norm, weight, two products and their sum, there and back.
        normed = 24 if over == "head" else 24 * 3
        compare(ours, theirs, wanted, 2 * terms(normed) + 40 if dtype == torch.float32 else 10, dtype)


def test_qk_norm_rotary_opcheck_and_fullgraph(kernels):
    torch._dynamo.reset()
    inputs = qk_inputs(kernels)
    torch.library.opcheck(torch.ops.twinkle.qk_norm_rotary.default, (*inputs, 24, "llama", "half", False))
    backend = "inductor" if kernels.type == "cuda" else "aot_eager"
    compiled = torch.compile(lambda *a: qk.qk_norm_rotary(*a, head_dim=24), fullgraph=True, backend=backend)
    for a, b in zip(compiled(*inputs), qk.qk_norm_rotary(*inputs, head_dim=24), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", ["no tokens", "no batch"])
def test_qk_norm_rotary_of_nothing(kernels, shape):
    q, k, qw, kw, q_eps, k_eps, cos, sin = qk_inputs(kernels)
    q, k = ((x[:, :0] if shape == "no tokens" else x[:0]).detach().requires_grad_() for x in (q, k))
    cos, sin = (x[:, : q.shape[1]] for x in (cos, sin))
    y, _ = qk.qk_norm_rotary(q, k, qw, kw, q_eps, k_eps, cos, sin, head_dim=24)
    y.sum().backward()
    assert torch.equal(qw.grad, torch.zeros_like(qw))


def test_the_same_bits_every_time(kernels):
    inputs = qk_inputs(kernels)
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    runs = []
    for _ in range(3):
        results = qk.qk_norm_rotary(*inputs, head_dim=24)
        runs.append([*results, *torch.autograd.grad([y.sum() for y in results], wanted)])
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_device_of_the_tensors():
    x, r, w = residual_inputs("cuda:1")
    ours = residual.residual_norm(x, r, w, 1e-6)
    theirs = residual_reference.residual_norm(x, r, w, 1e-6, variant=residual.LLAMA)
    compare(ours, theirs, [x, r, w], 1e-4, 1e-5)
