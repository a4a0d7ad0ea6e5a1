"""Activations that are written out, in triton against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from rounding import across_a_boundary, assert_near
from torch import nn

from twinkle.match.structure import recognise
from twinkle.ops.activation import reference
from twinkle.ops.activation.samples import cases
from twinkle.ops.activation.triton_backend import activation, layer_class
from twinkle.ops.plain import at_every_size
from twinkle.proof.compare import compare

VARIANTS = {variant.name: variant for variant in reference.VARIANTS}
OPERATIONS = 40
"""Behind a number: a dozen operators, two of them with a function of the device behind."""


@pytest.fixture(autouse=True)
def at_any_size(request):
    """Small inputs take the kernel as well, but where a test is about them."""
    if "small" in request.node.name:
        yield
        return
    with at_every_size():
        yield


def inputs(device, dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(7, 301) * 3).to(dtype).to(device).requires_grad_()


@pytest.mark.parametrize("name", VARIANTS)
def test_float32_equals_the_definition_to_a_few_ulps(kernels, name):
    x = inputs(kernels)
    ours, theirs = (f(x, variant=VARIANTS[name]) for f in (activation, reference.activation))
    assert type(ours.grad_fn).__name__ == "_ActivationBackward"
    dy = torch.randn_like(ours)
    largest = float(dy.abs().max() * x.abs().max())
    assert_near(ours, theirs, OPERATIONS, magnitude=float(x.abs().max()))
    assert_near(
        *(torch.autograd.grad(y, x, dy)[0] for y in (ours, theirs)), 4 * OPERATIONS, magnitude=largest
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_is_rounded_where_the_definition_rounds(kernels, half, name):
    x = inputs(kernels, half)
    with torch.no_grad():
        ours, theirs = (f(x, variant=VARIANTS[name]) for f in (activation, reference.activation))
    assert ours.dtype == half
    share = float((ours != theirs).float().mean())
    assert share < 2 * across_a_boundary(half, OPERATIONS)
    once = activation(x.detach().float(), variant=VARIANTS[name]).to(half)
    if name != "relu2":
        assert float((once != theirs).float().mean()) > 10 * share, "rounding once would be something else"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_as_near_to_the_exact_result_as_its_definition(kernels, name, dtype):
    if kernels.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16")
    if kernels.type == "cpu" and (name, dtype) != ("quick_gelu", torch.float16):
        pytest.skip("the interpreter takes half a minute for a variant")
    torch.manual_seed(0)
    for case in cases(VARIANTS[name], dtype, kernels):
        verdict = compare(case.original, case.kernel, case.args, {}, module=case.module, backward=True)
        assert verdict.ok, (case.shape, verdict)


@pytest.mark.parametrize("name", VARIANTS)
def test_extreme_values(kernels, name):
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 50.0, -50.0], device=kernels)
    ours, theirs = (f(x, variant=VARIANTS[name]) for f in (activation, reference.activation))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_what_is_not_contiguous_or_not_floating_goes_through_the_definition(kernels):
    variant = VARIANTS["quick_gelu"]
    x = inputs(kernels)[:, ::2]
    y = activation(x, variant=variant)
    assert type(y.grad_fn).__name__ == "MulBackward0"
    assert torch.equal(y, reference.activation(x, variant=variant))
    whole = torch.arange(5, device=kernels)
    assert torch.equal(activation(whole, variant=variant), reference.activation(whole, variant=variant))


@pytest.mark.parametrize(("name", "kernel"), [("relu2", False), ("quick_gelu", False), ("gelu_erf", True)])
def test_small_inputs_of_few_operators_are_torch_s(kernels, name, kernel):
    y = activation(inputs(kernels), variant=VARIANTS[name])
    assert (type(y.grad_fn).__name__ == "_ActivationBackward") is kernel


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), ()])
def test_of_nothing_and_of_one_number(kernels, shape):
    x = torch.randn(shape, device=kernels).requires_grad_()
    y = activation(x, variant=VARIANTS["gelu_tanh_cubed"])
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_second_derivatives(kernels):
    x = inputs(kernels)[:2, :9].detach().requires_grad_()

    def second(function):
        y = function(x, variant=VARIANTS["gelu_tanh_cubed"])
        first = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), x)[0]

    assert_near(second(activation), second(reference.activation), 8 * OPERATIONS, magnitude=1.0)


def test_opcheck(kernels):
    x = inputs(kernels)[:2, :9].detach().requires_grad_()
    torch.library.opcheck(torch.ops.twinkle.activation.default, (x, "gelu_tanh_cubed"))


class Cubed(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


class Factored(nn.Module):
    def forward(self, x):
        return x * 0.5 * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))


class Quick(nn.Module):
    def forward(self, input):
        return torch.sigmoid(input * 1.702) * input


class Erf(nn.Module):
    def forward(self, x):
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class ErfTimes(nn.Module):
    """A product with the root's inverse: another rounding."""

    def forward(self, x):
        return x * 0.5 * (1.0 + torch.erf(x * 0.7071067811865476))


class Erfc(nn.Module):
    def forward(self, x):
        return x * 0.5 * (1.0 + torch.erfc(x / math.sqrt(2.0)))


class Squared(nn.Module):
    def forward(self, x):
        return nn.functional.relu(x) ** 2


class OtherFactor(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044714 * x**3)))


class OtherPower(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**2)))


class OtherOrder(nn.Module):
    """The half is applied last: another rounding in half precision, near the smallest numbers."""

    def forward(self, x):
        return 0.5 * (x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3))))


class Minus(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 - torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


class QuickOther(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.7 * x)


class QuickTwo(nn.Module):
    def forward(self, x, y):
        return x * torch.sigmoid(1.702 * y)


class Cast(nn.Module):
    def forward(self, x):
        return (x.float() * torch.sigmoid(1.702 * x.float())).to(x.dtype)


@pytest.mark.parametrize(
    ("cls", "variant"),
    [
        (Cubed, "gelu_tanh_cubed"),
        (Factored, "gelu_tanh_factored"),
        (Quick, "quick_gelu"),
        (Squared, "relu2"),
        (Erf, "gelu_erf"),
        (ErfTimes, None),
        (Erfc, None),
        (OtherFactor, None),
        (OtherPower, None),
        (OtherOrder, None),
        (Minus, None),
        (QuickOther, None),
        (QuickTwo, None),
        (Cast, None),
        (nn.GELU, None),
        (nn.SiLU, None),
        (nn.Mish, None),
        (nn.Sigmoid, None),
    ],
)
def test_forms_and_look_alikes(cls, variant):
    found = recognise(cls)
    assert (found.variant and found.variant.name) == variant
    assert found.op == (variant and "activation")


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("NewGELUActivation", "gelu_tanh_cubed"),
        ("QuickGELUActivation", "quick_gelu"),
        ("FastGELUActivation", "gelu_tanh_factored"),
        ("AccurateGELUActivation", None),
        ("ReLUSquaredActivation", "relu2"),
        ("GELUActivation", None),
        ("LaplaceActivation", None),
    ],
)
def test_the_activations_of_transformers(name, variant):
    activations = pytest.importorskip("transformers.activations")
    found = recognise(getattr(activations, name))
    assert (found.variant and found.variant.name) == variant


def test_a_layer_takes_its_argument_by_its_name(kernels):
    kernel = layer_class(VARIANTS["quick_gelu"], {"x": "input"})
    x = inputs(kernels)
    assert torch.equal(kernel.forward(Quick(), input=x), activation(x, variant=VARIANTS["quick_gelu"]))
