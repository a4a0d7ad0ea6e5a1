"""``my_kernels.layers.RMSNorm`` against transformers' own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

if TYPE_CHECKING:
    from types import ModuleType

SHAPES = [(2, 7, 64), (3, 5, 4, 32), (1, 1, 8), (6, 48), (0, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def norm(size: int, dtype: torch.dtype) -> Qwen3RMSNorm:
    torch.manual_seed(size)
    layer = Qwen3RMSNorm(size, eps=1e-5)
    layer.weight.data.uniform_(0.5, 1.5)
    return layer.to(dtype)


def forward_and_grads(
    call: Any, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_bit_exact(kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, x = norm(shape[-1], dtype), torch.randn(shape).to(dtype)
    assert torch.equal(kernels.layers.RMSNorm.forward(layer, x), layer(x))


def test_forward_of_a_transposed_input_is_bit_exact(kernels: ModuleType) -> None:
    layer, x = norm(32, torch.float32), torch.randn(2, 4, 9, 32).transpose(1, 2)
    assert torch.equal(kernels.layers.RMSNorm.forward(layer, x), layer(x))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_no_worse_than_the_originals(
    kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = norm(shape[-1], dtype)
    torch.manual_seed(1)
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    original = forward_and_grads(layer, x, layer.weight, grad)
    ours = forward_and_grads(lambda x: kernels.layers.RMSNorm.forward(layer, x), x, layer.weight, grad)

    weight = layer.weight.detach().double().requires_grad_()

    def exact(x: torch.Tensor) -> torch.Tensor:
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    truth = forward_and_grads(exact, x.double(), weight, grad.double())
    ulp = torch.finfo(dtype).eps
    for mine, theirs, true in zip(ours[1:], original[1:], truth[1:], strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        if mine.numel():
            scale = true.abs().max()
            allowed = 2 * (theirs.double() - true).abs().max() + 2 * ulp * scale
            assert (mine.double() - true).abs().max() <= allowed


def test_gradient_of_a_transposed_input(kernels: ModuleType) -> None:
    layer = norm(32, torch.float32)
    x, grad = torch.randn(2, 4, 9, 32).transpose(1, 2), torch.randn(2, 4, 9, 32).transpose(1, 2)
    original = forward_and_grads(layer, x, layer.weight, grad)
    ours = forward_and_grads(lambda x: kernels.layers.RMSNorm.forward(layer, x), x, layer.weight, grad)
    for mine, theirs in zip(ours, original, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_gets_no_gradient(kernels: ModuleType) -> None:
    layer, x = norm(16, torch.float32), torch.randn(3, 16, requires_grad=True)
    layer.weight.requires_grad_(False)
    kernels.layers.RMSNorm.forward(layer, x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None


def test_a_constant_input_gets_no_gradient(kernels: ModuleType) -> None:
    layer, x = norm(16, torch.float32), torch.randn(3, 16)
    kernels.layers.RMSNorm.forward(layer, x).sum().backward()
    assert layer.weight.grad is not None


def test_the_input_is_left_as_it_was(kernels: ModuleType) -> None:
    layer, x = norm(16, torch.float32), torch.randn(3, 16)
    before = x.clone()
    kernels.layers.RMSNorm.forward(layer, x)
    assert torch.equal(x, before)


def test_float32_weight_with_bfloat16_input_promotes_as_the_original_does(kernels: ModuleType) -> None:
    layer, x = norm(16, torch.float32), torch.randn(3, 16).bfloat16()
    ours, theirs = kernels.layers.RMSNorm.forward(layer, x), layer(x)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


def test_backward_inside_autocast_does_not_round_to_bfloat16(kernels: ModuleType) -> None:
    layer = norm(64, torch.float32)
    x, grad = torch.randn(5, 64), torch.randn(5, 64) + 3
    outside = forward_and_grads(lambda x: kernels.layers.RMSNorm.forward(layer, x), x, layer.weight, grad)
    with torch.autocast("cpu", torch.bfloat16):
        inside = forward_and_grads(lambda x: kernels.layers.RMSNorm.forward(layer, x), x, layer.weight, grad)
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one, other)


def test_compiles_in_one_graph(kernels: ModuleType) -> None:
    layer, x = norm(16, torch.float32), torch.randn(3, 16, requires_grad=True)
    torch._dynamo.reset()

    def call(x: torch.Tensor) -> torch.Tensor:
        return kernels.layers.RMSNorm.forward(layer, x)

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), layer(x))
