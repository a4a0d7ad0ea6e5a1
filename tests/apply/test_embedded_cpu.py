"""The embedded kernels on a machine without a GPU or triton's interpreter: plain torch, or the original."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from .conftest import Program

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")

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
CPU = {"TWINKLE_CONFIG": "auto", "TRITON_INTERPRET": "0"}


@pytest.mark.slow
def test_the_loss_is_deferred_on_the_cpu_as_well(program: Program) -> None:
    bindings = program.bindings(MODEL, **CPU)
    assert ("Qwen3ForCausalLM", "active") in {(b["target"].rpartition(":")[2], b["state"]) for b in bindings}
