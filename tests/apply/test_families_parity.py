"""Tiny models of many families: loss and gradients with ``kernels = "auto"`` are those without.

A sample runs here; ``TWINKLE_TEST_FAMILIES=all`` runs every class that `benchmarks/tiny_models.py` can build.
"""

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
    pytest.mark.timeout(1800),
    pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks/families.py runs them on a GPU"),
    pytest.mark.skipif(
        transformers.__version__ != "5.22.2", reason="the classes are those of transformers 5.22.2"
    ),
]
# What has to be in place in each; a class whose shapes or code no kernel is for has none.
NORM, ROTARY, LOSS = "rms_norm", "rotary", "causal_lm_loss"
SAMPLE: dict[str, set[str]] = {
    "BambaForCausalLM": {NORM, LOSS},
    "BloomForCausalLM": {LOSS},
    "CohereForCausalLM": {LOSS},
    "DeepseekV3ForCausalLM": {NORM, LOSS},
    "Exaone4ForCausalLM": {NORM, ROTARY, LOSS},
    "FalconMambaForCausalLM": {LOSS},
    "Gemma2ForCausalLM": {NORM, ROTARY, LOSS},
    "Gemma3ForCausalLM": {NORM, ROTARY, LOSS},
    "Gemma3ForConditionalGeneration": {NORM, ROTARY, LOSS},
    "Gemma4ForCausalLM": {NORM, LOSS},
    "Glm4ForCausalLM": {NORM, LOSS},
    "GPT2LMHeadModel": {LOSS},
    "GptOssForCausalLM": {LOSS},
    "GraniteForCausalLM": {NORM, ROTARY, LOSS},
    "LlamaForCausalLM": {NORM, ROTARY, LOSS},
    "Llama4ForCausalLM": {LOSS},
    "MiniMaxForCausalLM": {NORM, LOSS},
    "MistralForCausalLM": {NORM, ROTARY, LOSS},
    "MixtralForCausalLM": {NORM, ROTARY, LOSS},
    "NemotronForCausalLM": {LOSS},
    "Olmo2ForCausalLM": {ROTARY, LOSS},
    "Phi3ForCausalLM": {NORM, LOSS},
    "Qwen2VLForConditionalGeneration": {NORM, LOSS},
    "Qwen3ForCausalLM": {NORM, ROTARY, LOSS},
    "Qwen3NextForCausalLM": {NORM, LOSS},
    "Step3p7ForConditionalGeneration": {NORM, LOSS},
    "T5ForConditionalGeneration": {NORM},
}


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("families") / "families.json"
    command = [
        sys.executable,
        str(REPO / "benchmarks" / "families.py"),
        "--device",
        "cpu",
        "--json",
        str(out),
    ]
    if os.environ.get("TWINKLE_TEST_FAMILIES") != "all":
        command += ["--classes", *SAMPLE]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_")}
    environ.update(PYTHONPATH=str(REPO), TWINKLE_CACHE="off", TWINKLE_SIZES="fixed")
    environ.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert out.is_file(), done.stderr[-2000:]
    (run,) = json.loads(out.read_text())["runs"].values()
    return run


def test_no_family_differs(parity: dict[str, Any]) -> None:
    assert [result for result in parity["results"] if not result["ok"]] == []


def test_no_kernel_fails_its_proof(parity: dict[str, Any]) -> None:
    told = {result["class"]: result["not_active"] for result in parity["results"]}
    failed = {name: [line for line in lines if " failed: " in line] for name, lines in told.items()}
    assert {name: lines for name, lines in failed.items() if lines} == {}


@pytest.mark.parametrize("name", SAMPLE)
def test_the_kernels_of_a_family_are_in_place(parity: dict[str, Any], name: str) -> None:
    assert name not in parity["left_out"], parity["left_out"][name]
    active = next(result["active"] for result in parity["results"] if result["class"] == name)
    assert SAMPLE[name] <= set(active)


@pytest.mark.skipif(
    os.environ.get("TWINKLE_TEST_FAMILIES") != "all", reason="TWINKLE_TEST_FAMILIES=all builds all of them"
)
def test_two_hundred_and_fifty_classes_are_built_and_compared(parity: dict[str, Any]) -> None:
    assert len(parity["results"]) >= 250
