"""Tiny models of many families generate the plain program's tokens: kernels at every size, in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

REPO = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the tokens are those of a CPU's operators"),
    pytest.mark.skipif(
        transformers.__version__ != "5.22.2", reason="the classes are those of transformers 5.22.2"
    ),
]

FAMILIES = (
    "BambaForCausalLM",
    "BartForConditionalGeneration",
    "BlenderbotForConditionalGeneration",
    "BloomForCausalLM",
    "CodeGenForCausalLM",
    "Cohere2ForCausalLM",
    "CohereForCausalLM",
    "DeepseekV3ForCausalLM",
    "Exaone4ForCausalLM",
    "FalconForCausalLM",
    "FalconMambaForCausalLM",
    "GPT2LMHeadModel",
    "GPTBigCodeForCausalLM",
    "GPTJForCausalLM",
    "GPTNeoForCausalLM",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "GlmForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "HeliumForCausalLM",
    "LlamaForCausalLM",
    "LongT5ForConditionalGeneration",
    "M2M100ForConditionalGeneration",
    "MBartForConditionalGeneration",
    "MT5ForConditionalGeneration",
    "MambaForCausalLM",
    "MiniMaxForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "MptForCausalLM",
    "NemotronForCausalLM",
    "OPTForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "OlmoForCausalLM",
    "OlmoeForCausalLM",
    "PegasusForConditionalGeneration",
    "PersimmonForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "SmolLM3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
    "T5ForConditionalGeneration",
    "XGLMForCausalLM",
)


def run(config: str | None) -> dict[str, Any]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_")}
    environ.update(PYTHONPATH=str(REPO), OMP_NUM_THREADS="1")
    environ.pop("TRITON_INTERPRET", None)
    if config is not None:
        environ.update(TWINKLE_CONFIG=config, TWINKLE_SIZES="all", TWINKLE_CACHE="off")
    command = [sys.executable, str(REPO / "tests" / "apply" / "generating.py"), *FAMILIES]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def found() -> dict[str | None, dict[str, Any]]:
    """By configuration, what each family generates."""
    return {config: run(config) for config in (None, "auto")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_the_plain_program(
    found: dict[str | None, dict[str, Any]], family: str
) -> None:
    plain = found[None][family]
    assert isinstance(plain["greedy"], list), plain
    assert found["auto"][family] == plain


def test_kernels_had_a_part_in_it(found: dict[str | None, dict[str, Any]]) -> None:
    assert found[None]["bindings"] == []
    states = {tuple(one) for one in found["auto"]["bindings"]}
    assert {("rms_norm", "active"), ("apply_rotary_pos_emb", "active")} <= states, states
    assert not {one for one in states if one[1] in ("failed", "quarantined")}, states
