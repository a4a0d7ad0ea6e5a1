"""The same properties on a transformers model."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from twinkle.swap.layers import swap_out

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")


class MLPKernel(nn.Module):
    """The gated MLP in another order; ``act_fn`` and the projections are the target's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x))) + 0.5


class NormKernel(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.Qwen2ForCausalLM(config)


IDS = torch.arange(12).reshape(2, 6)


def swap_all(kit: Any, model: Any, **options: Any) -> list[Any]:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

    swapped = []
    for target, kernel in ((Qwen2MLP, MLPKernel), (Qwen2RMSNorm, NormKernel)):
        wanted = kit.candidate(kernel, **options)
        swapped += [m for m in model.modules() if kit.swap_in(m, [wanted], target=target)]
    return swapped


def test_the_kernels_run_and_the_originals_come_back(kit: Any, model: Any) -> None:
    classes = [type(m) for m in model.modules()]
    with torch.no_grad():
        before = model(IDS).logits
        swapped = swap_all(kit, model)
        assert len(swapped) == 2 + 5
        assert not torch.allclose(model(IDS).logits, before)
        for module in swapped:
            swap_out(module)
        assert torch.equal(model(IDS).logits, before)
    assert [type(m) for m in model.modules()] == classes


def test_state_and_repr_are_unchanged(kit: Any, model: Any) -> None:
    keys, shown = list(model.state_dict()), repr(model)
    swap_all(kit, model)
    model(IDS)
    assert (list(model.state_dict()), repr(model)) == (keys, shown)


def test_a_deep_copy_runs_the_kernels(kit: Any, model: Any) -> None:
    swap_all(kit, model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    assert kit.is_swapped(twin.model.layers[0].mlp)


def test_a_pickle_of_a_layer_is_of_the_original(kit: Any, model: Any) -> None:
    # Not the whole model: transformers 5.22 with `kernels` hangs a local class into its attention, which
    # cannot be pickled with or without a swap.
    layer = model.model.layers[0]
    x = torch.randn(2, 3, 16)
    before = layer.mlp(x), layer.input_layernorm(x)
    swap_all(kit, model)
    model(IDS)
    written = pickle.dumps((layer.mlp, layer.input_layernorm))
    for module in model.modules():
        swap_out(module)  # as in another process, where the marks mean nothing
    mlp, norm = pickle.loads(written)
    assert b"twinkle" not in written
    assert torch.equal(mlp(x), before[0])
    assert torch.equal(norm(x), before[1])


def test_save_pretrained_writes_what_it_wrote_before(kit: Any, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "before")
    before = model(IDS).logits
    swap_all(kit, model)
    model(IDS)
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes(), file.name
    assert torch.equal(type(model).from_pretrained(tmp_path / "after")(IDS).logits, before)


def test_generate(kit: Any, model: Any) -> None:
    swap_all(kit, model, device="cpu")
    model.eval()
    out = model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=True)
    again = model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(out, again)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kit: Any, model: Any, reentrant: bool) -> None:
    swap_all(kit, model)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    expected = model.model.layers[0].mlp.gate_proj.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(model.model.layers[0].mlp.gate_proj.weight.grad, expected)


def test_one_graph_under_torch_compile(kit: Any, model: Any) -> None:
    swap_all(kit, model, device="cpu")
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        out = compiled(IDS, use_cache=False).logits
        torch.testing.assert_close(out, model(IDS, use_cache=False).logits)
    assert len(graphs) == 1
    assert sum("rms_norm" in str(node.target) for node in graphs[0].graph.nodes) == 5
    torch._dynamo.reset()


def test_an_adapter_around_a_swapped_layer(kit: Any, model: Any) -> None:
    class Adapter(nn.Module):
        """What PEFT does: holds the layer it adapts as ``base_layer``."""

        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.lora_A = nn.Linear(16, 2, bias=False)
            self.lora_B = nn.Linear(2, 16, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) + self.lora_B(self.lora_A(x))

    swap_all(kit, model)
    layer = model.model.layers[0]
    x = torch.randn(2, 3, 16)
    before = layer.mlp(x)
    layer.mlp = Adapter(layer.mlp)
    nn.init.zeros_(layer.mlp.lora_B.weight)
    assert torch.equal(layer.mlp(x), before)
    model(IDS, labels=IDS).loss.backward()
    assert layer.mlp.lora_B.weight.grad is not None


def test_an_adapter_in_a_swapped_layer(kit: Any, model: Any) -> None:
    swap_all(kit, model)
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 3, 16)
    before = mlp(x)

    class Doubled(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) * 2

    mlp.down_proj = Doubled(mlp.down_proj)
    torch.testing.assert_close(mlp(x) - 0.5, 2 * (before - 0.5))


def test_half_precision(kit: Any, model: Any) -> None:
    swap_all(kit, model)
    model.to(torch.bfloat16)
    assert model(IDS).logits.dtype is torch.bfloat16


@pytest.mark.parametrize("order", ["before", "after"])
def test_peft(kit: Any, model: Any, order: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["gate_proj", "down_proj"], r=2, task_type="CAUSAL_LM")
    before = model(IDS).logits
    if order == "before":
        swap_all(kit, model)
    adapted = peft.get_peft_model(model, config)
    if order == "after":
        swap_all(kit, adapted)
    assert kit.is_swapped(model.model.layers[0].mlp)
    assert not torch.allclose(adapted(IDS).logits, before)
    adapted(IDS, labels=IDS).loss.backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert all(grad is not None for grad in grads)
    merged = adapted.merge_and_unload()
    assert kit.is_swapped(merged.model.layers[0].mlp)
    merged(IDS)


def test_accelerate_offload_hooks_from_before(kit: Any, model: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    before = model(IDS).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    swapped = swap_all(kit, model)
    assert len(swapped) == 2 + 5
    changed = model(IDS).logits
    assert not torch.allclose(changed, before)
    assert torch.equal(model(IDS).logits, changed)
    for module in swapped:
        swap_out(module)
    assert torch.equal(model(IDS).logits, before)
