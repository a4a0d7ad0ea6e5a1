"""Models whose code comes with the checkpoint: recognised by what it computes, like any other."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING

import pytest
import torch
from rounding import rounding_bound

if TYPE_CHECKING:
    from .conftest import Program

pytestmark = pytest.mark.slow
pytest.importorskip("transformers")

# A dozen products over some tens of terms, there and back.
SAME = 2 * rounding_bound(torch.float32, 600)
CONFIGURATION = """
from transformers import PretrainedConfig

class MineConfig(PretrainedConfig):
    model_type = "mine"
    def __init__(self, vocab_size=64, hidden_size=32, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
"""
MODELING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_mine import MineConfig

class Wobble(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.tiny = 1e-6
    def forward(self, signal):
        kept = signal.dtype
        signal = signal.to(torch.float32)
        power = signal.pow(2).mean(-1, keepdim=True)
        return self.scale * (signal * torch.rsqrt(power + self.tiny)).to(kept)

class Feed(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.one, self.two = nn.Linear(size, 64, bias=False), nn.Linear(size, 64, bias=False)
        self.three = nn.Linear(64, size, bias=False)
        self.bend = nn.SiLU()
    def forward(self, signal):
        return self.three(self.bend(self.one(signal)) * self.two(signal))

class MineForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MineConfig
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wobble, self.feed = Wobble(config.hidden_size), Feed(config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0.0, 0.1)
    def forward(self, input_ids, labels=None, **kwargs):
        hidden = self.words(input_ids)
        hidden = hidden + self.feed(self.wobble(hidden))
        logits = self.out(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)
"""
AUTO_MAP = """{
 "model_type": "mine", "architectures": ["MineForCausalLM"],
 "auto_map": {"AutoConfig": "configuration_mine.MineConfig",
              "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
}
"""
PROGRAM = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.manual_seed(0)
config = AutoConfig.from_pretrained("mine", trust_remote_code=True)
AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained("mine/weights")
import os
os.replace("mine/weights/model.safetensors", "mine/model.safetensors")
model = AutoModelForCausalLM.from_pretrained("mine", trust_remote_code=True).train()
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
tokens = torch.arange(24).reshape(2, 12)
loss = model(input_ids=tokens, labels=tokens).loss
loss.backward()
norms = [p.grad.norm().item() for p in model.parameters()]
print("RESULT", loss.item(), *norms)
"""


@pytest.fixture
def checkpoint(program: Program, monkeypatch: pytest.MonkeyPatch) -> Program:
    folder = program.root / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(AUTO_MAP)
    (folder / "configuration_mine.py").write_text(CONFIGURATION)
    (folder / "modeling_mine.py").write_text(MODELING)
    monkeypatch.setenv("HF_HOME", str(program.root / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return program


def _numbers(output: str) -> list[float]:
    line = next(line for line in output.splitlines() if line.startswith("RESULT"))
    return [float(word) for word in line.split()[1:]]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_code_of_a_checkpoint_gets_kernels_and_computes_the_same(checkpoint: Program) -> None:
    auto = {"TWINKLE_CONFIG": "auto", "TRITON_INTERPRET": "1"}
    plain = checkpoint.run(PROGRAM, **auto, TWINKLE_KERNELS="off")
    ours = checkpoint.run(PROGRAM + "report()\n", **auto)
    assert _numbers(ours.stdout) == pytest.approx(_numbers(plain.stdout), rel=SAME)
    bindings = json.loads(ours.stdout.splitlines()[-1])["bindings"]
    active = {(b["target"].rpartition(":")[2], b["kernel"]) for b in bindings if b["state"] == "active"}
    assert {
        ("Wobble", "rms_norm"),
        ("Feed", "gated_mlp"),
        ("MineForCausalLM", "causal_lm_loss"),
    } <= active
    assert all(b["target"].startswith("transformers_modules.") for b in bindings if b["kernel"] == "rms_norm")
