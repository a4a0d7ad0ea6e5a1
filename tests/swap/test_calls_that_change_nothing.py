"""What Twinkle adds to calls of small models on a CPU, where no kernel of it runs: counted, not timed.

Two processes, one of them under Twinkle, count the functions of Python that a call of each family runs, once
it has been called some times. Per layer with a kernel there is one more, which stands in the place of its
forward; per model there are those that ask about labels.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
import torch, transformers
torch.set_num_threads(1)

BASE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
            pad_token_id=0, bos_token_id=1, eos_token_id=None)
GROUPED = dict(BASE, num_key_value_heads=2)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=None)
OPT = dict(BASE, ffn_dim=64, word_embed_proj_dim=32)
T5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0,
          pad_token_id=0, eos_token_id=None)
WHISPER = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
               decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99,
               num_mel_bins=8, max_source_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
               decoder_start_token_id=1)
VIT = dict(BASE, image_size=32, patch_size=8)
FAMILIES = {
    "GPT2LMHeadModel": ("GPT2", GPT2), "LlamaForCausalLM": ("Llama", GROUPED),
    "Qwen3ForCausalLM": ("Qwen3", dict(GROUPED, head_dim=8)),
    "Gemma3ForCausalLM": ("Gemma3Text", dict(GROUPED, head_dim=8)),
    "GPTNeoXForCausalLM": ("GPTNeoX", BASE), "OPTForCausalLM": ("OPT", OPT),
    "PhiForCausalLM": ("Phi", GROUPED), "BertForMaskedLM": ("Bert", BASE),
    "RobertaForMaskedLM": ("Roberta", BASE), "ViTForImageClassification": ("ViT", VIT),
    "T5ForConditionalGeneration": ("T5", T5), "WhisperForConditionalGeneration": ("Whisper", WHISPER),
}
TOKENS = 4

def count(call):
    for _ in range(3):
        call()
    found = 0
    def note(frame, event, argument):
        nonlocal found
        found += event == "call"
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found

def counted(name, config, sizes):
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config + "Config")(**sizes))
    ids = torch.arange(3, 11).view(2, 4)
    given, labels = {"input_ids": ids}, ids
    if config == "ViT":
        given, labels = {"pixel_values": torch.randn(2, 3, 32, 32)}, torch.tensor([0, 1])
    if config == "Whisper":
        given = {"input_features": torch.randn(2, 8, 32)}
    parallel = {} if config not in ("T5", "Whisper") else {"decoder_input_ids": ids}
    def train():
        model(**given, labels=labels).loss.backward()
        model.zero_grad()
    found = {"train": count(train)}
    model.eval()
    with torch.no_grad():
        found["evaluation"] = count(lambda: model(**given, **parallel))
        found["loss"] = count(lambda: model(**given, labels=labels))
    with torch.inference_mode():
        found["inference"] = count(lambda: model(**given, **parallel))
        if model.can_generate() and config not in ("Whisper", "ViT"):
            call = lambda: model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
            found["generate"] = count(call)
    found["layers"] = sum("_tw" in vars(module) for module in model.modules()) - ("_tw" in vars(model))
    found["rotations"] = sum("otary" in type(module).__name__ for module in model.modules()) and 2
    return found

print("@" + json.dumps({name: counted(name, *rest) for name, rest in FAMILIES.items()}))
"""
FAMILIES = [
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
    "GPTNeoXForCausalLM",
    "OPTForCausalLM",
    "PhiForCausalLM",
    "BertForMaskedLM",
    "RobertaForMaskedLM",
    "ViTForImageClassification",
    "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration",
]
ABOUT_LABELS = {"train": 16, "loss": 16, "evaluation": 2, "inference": 2, "generate": 2 * 4 + 12}
"""Calls beside those per layer: of the function for the model's forward, and of what it asks. In front of its
first token `generate()` reads the signature of the forward, past the function that stands there."""


@functools.cache
def counts(under_twinkle: bool) -> dict[str, dict[str, int]]:
    """The calls of each family and mode, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_")}
    environment.pop("TRITON_INTERPRET", None)
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TWINKLE_CACHE": "off"}
    # Kernels that a measurement chooses would run functions of their own.
    environment["TWINKLE_SIZES"] = "fixed"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    start = [sys.executable, *(["-m", "twinkle", "run"] if under_twinkle else [])]
    done = subprocess.run(
        [*start, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    lines = [line[1:] for line in done.stdout.splitlines() if line.startswith("@")]
    assert lines, done.stderr[-2000:]
    found: dict[str, dict[str, int]] = json.loads(lines[0])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_calls_have_a_function_more_per_layer_with_a_kernel(family: str) -> None:
    eager, ours = counts(False)[family], counts(True)[family]
    for mode, about_labels in ABOUT_LABELS.items():
        if mode not in eager:
            continue
        times = 4 if mode == "generate" else 1
        most = times * (ours["layers"] + ours["rotations"]) + about_labels
        assert ours[mode] - eager[mode] <= most, (mode, eager[mode], ours[mode])


@pytest.mark.slow
def test_some_layers_of_these_models_have_kernels() -> None:
    found: dict[str, Any] = {family: counts(True)[family]["layers"] for family in FAMILIES}
    assert found["LlamaForCausalLM"] == 5
    assert found["Qwen3ForCausalLM"] == 9
    assert not found["ViTForImageClassification"]
