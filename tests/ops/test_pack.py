"""The embedded kernels are a kernel repository like any other: registered through the public API."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from rounding import assert_near
from torch import nn

import twinkle.ops
from twinkle.kernel import kernelize_model, register_external_layer, register_kernels, register_layer_kernel
from twinkle.kernel.function import apply_function_kernel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from twinkle.registry import Registry

PACK = Path(twinkle.ops.__file__).parent
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": None,
}


OPERATIONS = 400
"""Behind a number of a tiny model and its gradients: a dozen products over the width, there and back."""


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))


def states(registry: Registry) -> list[tuple[str, str, str]]:
    """What was met; an op of the document that no layer of the model is has a record of its own."""
    met = [binding for binding in registry.bindings if not binding.target.startswith("match:")]
    return sorted((b.target.rpartition(":")[2], b.state, b.proof or "") for b in met)


@pytest.mark.parametrize(
    "where",
    [
        {"package_name": "twinkle.ops"},
        {"repo_path": str(PACK.parent), "package_name": "ops"},
        {"repo_path": str(PACK), "package_name": "ops"},
    ],
    ids=["installed", "local", "local, the package itself"],
)
def test_a_layer_is_bound_by_name(clean_registry: Registry, where: dict[str, str]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ids = torch.arange(8)[None]
    expected = llama()(ids).logits
    register_layer_kernel(kernel_name="Norm", layer_name="RMSNorm", **where)
    register_external_layer(LlamaRMSNorm, "Norm")
    model = kernelize_model(llama(), device="cpu", use_fallback=False)
    assert_near(model(ids).logits, expected, OPERATIONS)
    [binding] = clean_registry.bindings
    assert (binding.state, binding.instances) == ("active", 3)


def test_a_function_is_bound_by_name(clean_registry: Registry) -> None:
    ids = torch.arange(8)[None]
    expected = llama()(ids).logits
    module = "transformers.models.llama.modeling_llama"
    register_kernels(
        {"functions": {"apply_rotary_pos_emb": {"target_module": module, "package_name": "twinkle.ops"}}}
    )
    apply_function_kernel(target_module=module)
    assert_near(llama()(ids).logits, expected, OPERATIONS)
    assert [binding.state for binding in clean_registry.bindings] == ["active"]


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Phi3", "Olmo2"])
def test_its_document_fits_the_kernels_to_any_family(clean_registry: Registry, family: str) -> None:
    config = {
        "Llama": transformers.LlamaConfig,
        "Gemma3": transformers.Gemma3TextConfig,
        "Phi3": transformers.Phi3Config,
        "Olmo2": transformers.Olmo2Config,
    }[family](**TINY)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return getattr(transformers, f"{family}ForCausalLM")(config).eval()

    ids = torch.arange(8)[None]
    plain = build()
    expected = plain(ids, labels=ids).loss
    expected.backward()
    register_kernels(tomllib.loads((PACK / "twinkle.toml").read_text()))
    model = kernelize_model(build(), device="cpu", use_fallback=False)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert_near(loss, expected, OPERATIONS)
    largest = max(p.grad.abs().max().item() for p in plain.parameters())
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert_near(one.grad, other.grad, OPERATIONS, magnitude=largest)
    assert {(target.endswith("MLP"), state) for target, state, _ in states(clean_registry)} == {
        (True, "active"),
        (False, "active"),
    }
    assert all(proof.startswith("proven") for *_, proof in states(clean_registry))


class Wrong(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 1.01 * hidden_states

    @staticmethod
    def for_variant(variant: object, facts: object) -> type[nn.Module] | None:
        return Wrong


class None_(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    @staticmethod
    def for_variant(variant: object, facts: object) -> type[nn.Module] | None:
        return None


def test_what_was_bound_by_structure_is_proven_first(clean_registry: Registry) -> None:
    ids = torch.arange(8)[None]
    expected = llama()(ids).logits
    register_kernels({"layers": {"wrong": {"match": "rms_norm", "layer_impl": Wrong}}})
    model = kernelize_model(llama(), device="cpu")
    with pytest.warns(match="does not compute the same"):
        result = model(ids).logits
    assert torch.equal(result, expected)
    assert [state for _, state, _ in states(clean_registry)] == ["failed"]


def test_a_repository_may_lack_a_variant(clean_registry: Registry) -> None:
    ids = torch.arange(8)[None]
    expected = llama()(ids).logits
    register_kernels({"layers": {"none": {"match": "rms_norm", "layer_impl": None_}}})
    with pytest.warns(match="no kernel for the variant 'llama' of rms_norm"):
        model = kernelize_model(llama(), device="cpu")
    assert torch.equal(model(ids).logits, expected)
