"""``sizes = "all"``: a tiny model runs the kernels that a large one runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from .conftest import Program

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU small inputs have kernels")

TINY = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM

torch.manual_seed(0)
config = AutoConfig.for_model(
    "llama", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=32, vocab_size=64,
)
model = AutoModelForCausalLM.from_config(config)
tokens = torch.arange(10).view(2, 5)
for _ in range(2):  # the first call of a head is compared, and deferred from then on
    output = model(tokens, labels=tokens)
    norm = model.model.norm(torch.ones(2, 5, 32, requires_grad=True))
print(type(output.logits).__name__, "RMSNorm" in norm.grad_fn.name(), f"{output.loss.item():.4f}")
"""
CONFIG = '[twinkle]\nkernels = "auto"\nsizes = "{}"\n'
CPU = {"TRITON_INTERPRET": "0"}


def test_a_tiny_model_runs_the_kernels_where_a_file_or_a_variable_says_so(program: Program) -> None:
    plain = program.run(TINY, TWINKLE_CONFIG="auto", **CPU).stdout.split()
    assert plain[:2] == ["Tensor", "False"]
    (program.root / "all.toml").write_text(CONFIG.format("all"))
    for variables in (
        {"TWINKLE_CONFIG": "auto", "TWINKLE_SIZES": "all"},
        {"TWINKLE_CONFIG": str(program.root / "all.toml")},
    ):
        assert program.run(TINY, **variables, **CPU).stdout.split() == ["DeferredLogits", "True", plain[2]]
