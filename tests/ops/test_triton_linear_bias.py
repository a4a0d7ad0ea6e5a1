"""The gradient of a linear layer's bias in triton against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rounding import rounding_bound

from twinkle.ops.linear_bias import reference, triton_backend
from twinkle.ops.linear_bias.triton_backend import addmm, linear

SHAPES = [((4, 40), 64), ((333,), 200), ((2, 1), 8), ((1, 100), 1000)]


@pytest.fixture
def at_any_size(kernels, monkeypatch):
    """The device, with a kernel for small results as well."""
    monkeypatch.setattr(triton_backend, "LEAST", 0)
    return kernels


def inputs(device, lead, width, dtype=torch.float32):
    torch.manual_seed(0)
    made = torch.randn(*lead, 24), torch.randn(width, 24), torch.randn(width), torch.randn(*lead, width)
    return [t.to(dtype).to(device) for t in made]


def run(function, x, w, b, g):
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    y = function(*leaves)
    return y, *torch.autograd.grad(y, leaves, g)


def summed(y):
    """Whether a gradient goes past the kernel's node."""
    names, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in names:
            names.add(node)
            left += [one for one, _ in node.next_functions]
    return "_BiasBackward" in {type(node).__name__ for node in names}


@pytest.mark.parametrize(("lead", "width"), SHAPES)
def test_all_but_the_bias_is_torch_s(at_any_size, lead, width):
    given = inputs(at_any_size, lead, width)
    ours, theirs = run(linear, *given), run(F.linear, *given)
    assert summed(ours[0])
    assert not summed(theirs[0])
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(ours[3], theirs[3], rtol=1e-5, atol=1e-4)


def test_addmm(at_any_size):
    x, w, b, g = inputs(at_any_size, (70,), 96)
    ours = run(lambda x, w, b: addmm(b, x, w), x, w.t().contiguous(), b, g)
    theirs = run(lambda x, w, b: torch.addmm(b, x, w), x, w.t().contiguous(), b, g)
    assert summed(ours[0])
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(ours[3], theirs[3], rtol=1e-5, atol=1e-4)


def test_half_precision_is_as_near_to_float64_as_torch(at_any_size, half):
    given = inputs(at_any_size, (3, 700), 136, half)
    exact = given[3].double().flatten(0, 1).sum(0)
    ours, theirs = (run(f, *given)[3] for f in (linear, F.linear))
    assert ours.dtype == half
    off = [float((t.double() - exact).norm() / exact.norm()) for t in (ours, theirs)]
    assert off[0] <= off[1] + rounding_bound(half, 1)
    assert off[0] <= rounding_bound(half, 1)


def test_under_autocast_the_gradient_is_of_the_dtype_of_the_bias(at_any_size):
    x, w, b, g = inputs(at_any_size, (50,), 64)
    device = torch.device(at_any_size).type
    with torch.autocast(device, torch.bfloat16):
        ours, theirs = run(linear, x, w, b, g.bfloat16()), run(F.linear, x, w, b, g.bfloat16())
    assert summed(ours[0])
    assert torch.equal(ours[0], theirs[0])
    assert ours[3].dtype == torch.float32
    exact = g.bfloat16().double().sum(0)
    assert (ours[3] - exact).abs().max() <= (theirs[3] - exact).abs().max() + 1e-5


def test_a_result_may_be_written_to(at_any_size):
    x, w, b, g = inputs(at_any_size, (2, 30), 64)
    written = [run(lambda *a, f=f: F.relu_(f(*a)), x, w, b, g) for f in (linear, F.linear)]
    for a, e in zip(*written, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-4)


def test_a_second_derivative(at_any_size):
    x, w, b, g = inputs(at_any_size, (20,), 16)
    found = []
    for f in (linear, F.linear):
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        first = torch.autograd.grad(f(*leaves).tanh(), leaves, g, create_graph=True)
        found.append(torch.autograd.grad(sum(t.square().sum() for t in first), leaves))
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)


def test_frozen_parts(at_any_size):
    x, w, b, g = inputs(at_any_size, (20,), 16)
    alone = b.clone().requires_grad_()
    y = linear(x, w, alone)
    assert summed(y)
    y.backward(g)
    torch.testing.assert_close(alone.grad, g.sum(0), rtol=1e-5, atol=1e-4)
    assert not summed(linear(x, w.clone().requires_grad_(), b))
    with torch.no_grad():
        assert linear(x, w, alone).grad_fn is None


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x.t().contiguous().t(), w, b),
        lambda x, w, b: (x[None, None], w, b),
        lambda x, w, b: (x[0], w, b),
        lambda x, w, b: (x, w, None),
        lambda x, w, b: (x.double(), w.double(), b.double()),
    ],
    ids=["not contiguous", "four dimensions", "a row", "no bias", "float64"],
)
def test_what_goes_to_torch(at_any_size, change):
    given = change(*inputs(at_any_size, (20,), 16)[:3])
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    y = linear(*leaves)
    assert not summed(y)
    assert torch.equal(y, F.linear(*leaves))


def test_rows_that_the_kernel_does_not_take(at_any_size):
    for lead, width in (((20,), 15), ((2, 9), 33)):
        given = inputs(at_any_size, lead, width)
        torch.testing.assert_close(
            run(linear, *given)[3], run(F.linear, *given)[3], rtol=1e-5, atol=1e-4, msg=f"{lead}"
        )
    x, w, b, g = inputs(at_any_size, (20,), 16)
    for gradient in (g.t().contiguous().t(), g[:, :1].expand(20, 16), torch.cat([g, g], 1)[:, 3:19]):
        torch.testing.assert_close(run(linear, x, w, b, gradient)[3], gradient.sum(0), rtol=1e-5, atol=1e-4)


def test_other_arguments_go_to_torch(at_any_size):
    x, w, b, _ = inputs(at_any_size, (20,), 16)
    bias = b.requires_grad_()
    assert not summed(addmm(bias, x, w.t(), beta=0.5))
    assert not summed(addmm(torch.zeros(20, 16, device=x.device, requires_grad=True), x, w.t()))


def test_small_and_wide_results_go_to_torch(kernels, monkeypatch):
    def takes(rows, width):
        return summed(linear(*[t.requires_grad_() for t in inputs(kernels, (rows,), width)[:3]]))

    assert not takes(20, 16)
    monkeypatch.setattr(triton_backend, "LEAST", 320)
    monkeypatch.setattr(triton_backend, "NARROW", 16)
    monkeypatch.setattr(triton_backend, "MOST", 640)
    assert [takes(19, 16), takes(20, 16), takes(200, 16), takes(20, 32), takes(21, 32)] == [
        *(False, True, True),
        *(True, False),
    ]


def test_the_variants_are_what_they_say():
    assert [variant.name for variant in reference.VARIANTS] == ["linear", "addmm"]
    x, w, b, _ = inputs("cpu", (20,), 16)
    expected = F.linear(x, w, b)
    assert torch.equal(reference.linear_bias(x, w, b, variant=reference.VARIANTS[0]), expected)
    assert torch.equal(reference.linear_bias(x, w.t(), b, variant=reference.VARIANTS[1]), expected)
