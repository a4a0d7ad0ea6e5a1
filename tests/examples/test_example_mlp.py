"""``my_kernels.layers.GatedMLP`` and ``DenseGelu`` against transformers' own."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, Qwen3Config
from transformers.models.bert.modeling_bert import BertIntermediate
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

if TYPE_CHECKING:
    from types import ModuleType


def mlp(dtype: torch.dtype = torch.float32, activation: str = "silu") -> Qwen3MLP:
    torch.manual_seed(3)
    config = Qwen3Config(hidden_size=24, intermediate_size=56, hidden_act=activation)
    return Qwen3MLP(config).to(dtype)


def dense(activation: str = "gelu") -> BertIntermediate:
    torch.manual_seed(3)
    return BertIntermediate(BertConfig(hidden_size=24, intermediate_size=56, hidden_act=activation)).eval()


def results(call: Any, layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    y = call(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 7, 24), (5, 24), (1, 1, 24), (0, 24)])
def test_silu_results_and_gradients_are_bit_exact(
    kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer, x = mlp(dtype), torch.randn(shape).to(dtype)
    ours = results(lambda x: kernels.layers.GatedMLP.forward(layer, x), layer, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, results(layer, layer, x), strict=True))


def test_a_transposed_input_is_bit_exact(kernels: ModuleType) -> None:
    layer, x = mlp(), torch.randn(2, 24, 7).transpose(1, 2)
    ours = results(lambda x: kernels.layers.GatedMLP.forward(layer, x), layer, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, results(layer, layer, x), strict=True))


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_pytorch_tanh", "mish"])
def test_another_activation_is_honoured(kernels: ModuleType, activation: str) -> None:
    layer, x = mlp(activation=activation), torch.randn(4, 24)
    ours = results(lambda x: kernels.layers.GatedMLP.forward(layer, x), layer, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, results(layer, layer, x), strict=True))


def test_a_hook_on_the_activation_still_runs(kernels: ModuleType) -> None:
    layer = mlp()
    seen: list[torch.Tensor] = []
    layer.act_fn.register_forward_hook(lambda module, inputs, output: seen.append(output))
    kernels.layers.GatedMLP.forward(layer, torch.randn(4, 24))
    assert len(seen) == 1


def test_wrapped_projections_are_called(kernels: ModuleType) -> None:
    layer, x = mlp(), torch.randn(4, 24)
    layer.up_proj = nn.Sequential(layer.up_proj, nn.Tanh())
    assert torch.equal(kernels.layers.GatedMLP.forward(layer, x), layer(x))


def saved_bytes(call: Any, x: torch.Tensor) -> int:
    """Bytes of distinct memory that backward keeps."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = call(x)
    del keep
    return sum(kept.values())


def test_the_mlp_keeps_one_wide_tensor_less(kernels: ModuleType) -> None:
    layer, x = mlp(), torch.randn(100, 24, requires_grad=True)
    less = saved_bytes(layer, x) - saved_bytes(lambda x: kernels.layers.GatedMLP.forward(layer, x), x)
    assert less == 100 * 56 * 4


def test_the_norm_keeps_its_input_and_one_number_a_row(kernels: ModuleType) -> None:
    layer, x = Qwen3RMSNorm(24), torch.randn(100, 24, requires_grad=True)
    kept = saved_bytes(lambda x: kernels.layers.RMSNorm.forward(layer, x), x)
    assert kept == 4 * (100 * 24 + 24 + 100)


def test_the_mlp_compiles_in_one_graph(kernels: ModuleType) -> None:
    layer, x = mlp(), torch.randn(4, 24)
    torch._dynamo.reset()

    def call(x: torch.Tensor) -> torch.Tensor:
        return kernels.layers.GatedMLP.forward(layer, x)

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("name", ["GatedMLP", "RMSNorm", "DenseGelu"])
def test_forward_has_the_arguments_of_its_target(kernels: ModuleType, name: str) -> None:
    target = {"GatedMLP": Qwen3MLP, "RMSNorm": Qwen3RMSNorm, "DenseGelu": BertIntermediate}[name]
    kernel = getattr(kernels.layers, name)
    assert list(inspect.signature(kernel.forward).parameters) == list(
        inspect.signature(target.forward).parameters
    )
    assert "__init__" not in vars(kernel)


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new"])
def test_dense_gelu_is_bit_exact_without_gradients(kernels: ModuleType, activation: str) -> None:
    layer, x = dense(activation), torch.randn(3, 5, 24)
    with torch.no_grad():
        assert torch.equal(kernels.layers.DenseGelu.forward(layer, x), layer(x))


def test_dense_gelu_writes_over_its_own_tensor_only_without_gradients(kernels: ModuleType) -> None:
    layer, x = dense(), torch.randn(3, 5, 24)
    ours = results(lambda x: kernels.layers.DenseGelu.forward(layer, x), layer, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, results(layer, layer, x), strict=True))


def test_dense_gelu_leaves_alone_what_a_hook_may_hold(kernels: ModuleType) -> None:
    layer, x = dense(), torch.randn(3, 5, 24)
    held: list[torch.Tensor] = []
    layer.dense.register_forward_hook(lambda module, inputs, output: held.append(output))
    with torch.no_grad():
        kernels.layers.DenseGelu.forward(layer, x)
        assert torch.equal(held[0], nn.functional.linear(x, layer.dense.weight, layer.dense.bias))
