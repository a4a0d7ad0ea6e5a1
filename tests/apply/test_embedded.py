"""The embedded kernels in place with no configuration at all; ``match`` finds targets for a user's own."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING

import pytest
import torch
from rounding import rounding_bound
from torch import nn

from twinkle.kernel import kernelize_model, register_kernels

if TYPE_CHECKING:
    from twinkle.registry import Registry

    from .conftest import Program

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (its interpreter is used)"
)

MODEL = """
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
torch.manual_seed(0)
config = Qwen3Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                     head_dim=16, intermediate_size=64, vocab_size=32)
model = Qwen3ForCausalLM(config)
tokens = torch.arange(8)[None]
loss = model(tokens, labels=tokens).loss
loss.backward()
print(repr(loss.item()), repr(model.model.layers[0].mlp.up_proj.weight.grad.norm().item()))
"""


@needs_triton
@pytest.mark.slow
def test_layers_and_functions_are_found_proven_and_compute_the_same(program: Program) -> None:
    plain = program.run(MODEL, TWINKLE_CONFIG="auto", TWINKLE_KERNELS="off").stdout.split()
    variables = {"TWINKLE_CONFIG": "auto", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    numbers, report = program.run(MODEL + "report()\n", **variables).stdout.splitlines()
    for ours, theirs in zip(numbers.split(), plain, strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=2 * rounding_bound(torch.float32, 600))
    bindings = json.loads(report)["bindings"]
    found = {(b["target"].rpartition(":")[2], b["state"], b["proof"].partition(":")[0]) for b in bindings}
    assert {
        ("Qwen3RMSNorm", "active", "proven"),
        ("Qwen3MLP", "active", "proven"),
        ("Qwen3DecoderLayer", "active", "proven"),
        ("Qwen3Attention", "active", "proven"),
        ("Qwen3ForCausalLM", "active", "proven"),
    } <= found


OFF = "rms_norm,rotary,residual_norm,qk_norm_rotary"


@needs_triton
@pytest.mark.slow
def test_an_op_that_is_switched_off_is_left_alone(program: Program) -> None:
    variables = {"TWINKLE_CONFIG": "auto", "TRITON_INTERPRET": "1", "TWINKLE_DISABLE": OFF}
    bindings = program.bindings(MODEL, **variables)
    assert {b["kernel"] for b in bindings} == {"gated_mlp", "causal_lm_loss"}


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        wide = values.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.scale * wide.to(values.dtype)


class Other(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + 1


class Doubled(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * 2


def test_match_finds_a_users_own_layer_by_its_code(clean_registry: Registry) -> None:
    register_kernels({"layers": {"mine": {"match": "rms_norm", "layer_impl": Doubled, "verify": "off"}}})
    model = kernelize_model(nn.Sequential(Norm(), Other()))
    assert torch.equal(model(torch.ones(4)), torch.full((4,), 3.0))
    assert [(b.target.rpartition(":")[2], b.state) for b in clean_registry.bindings] == [("Norm", "active")]
