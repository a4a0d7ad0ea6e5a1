"""Recognition over every family of the installed transformers."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from twinkle.match.structure import check_instance, recognise

transformers = pytest.importorskip("transformers")

REPO = Path(__file__).parents[2]
# Families recognised in transformers 5.22.2; a change of the matcher may only raise them.
FLOOR = {
    "rms_norm": 183,
    "gated_mlp": 166,
    "rotary": 194,
    "causal_lm_loss": 327,
    "experts": 62,
    "residual_norm": 380,
    "qk_norm_rotary": 45,
    "layer_norm": 10,
    "activation": 2,
    "group_norm": 8,
    "modulated_norm": 3,
}
# Families in whose forwards a kernel takes the place.
WIRED = {"residual_norm": 378, "qk_norm_rotary": 29, "modulated_norm": 3}


newer = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5,
    reason="transformers 4 has not got it, or wrote it otherwise",
)


@pytest.fixture(scope="module")
def coverage(tmp_path_factory):
    out = tmp_path_factory.mktemp("coverage") / "coverage.json"
    command = [sys.executable, str(REPO / "benchmarks" / "coverage.py"), "--no-build", "--json", str(out)]
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert out.is_file(), done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    transformers.__version__ != "5.22.2", reason="the totals are those of transformers 5.22.2"
)
@pytest.mark.parametrize("op", FLOOR)
def test_totals_do_not_fall(coverage, op):
    assert coverage["totals"][op]["families"] >= FLOOR[op]
    assert coverage["totals"][op].get("wired", 0) >= WIRED.get(op, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_recognition_is_wrong(coverage):
    assert [row for module in coverage["modules"] for row in module["wrong"]] == []


@pytest.mark.parametrize(
    ("target", "op", "variant"),
    [
        ("llama:LlamaRMSNorm", "rms_norm", "llama"),
        ("gemma3:Gemma3RMSNorm", "rms_norm", "gemma"),
        ("t5:T5LayerNorm", "rms_norm", "t5"),
        pytest.param("gemma4:Gemma4RMSNorm", "rms_norm", "gemma4", marks=newer),
        ("phi3:Phi3MLP", "gated_mlp", "fused"),
        ("moonshine:MoonshineDecoderMLP", "gated_mlp", "fused_up_first"),
        ("t5:T5DenseGatedActDense", "gated_mlp", "t5"),
        ("llama:apply_rotary_pos_emb", "rotary", "half"),
        ("phi3:apply_rotary_pos_emb", "rotary", "partial"),
        ("qwen2_vl:apply_rotary_pos_emb_vision", "rotary", "vision"),
        pytest.param(
            "deepseek_v3:apply_rotary_pos_emb_interleave", "rotary", "interleaved_to_half", marks=newer
        ),
        pytest.param("nanochat:apply_rotary_pos_emb", "rotary", "inverse", marks=newer),
        pytest.param("mixtral:MixtralExperts", "experts", "plain", marks=newer),
        pytest.param("gpt_oss:GptOssExperts", "experts", "gpt_oss", marks=newer),
        ("gemma2:Gemma2ForCausalLM", "causal_lm_loss", "optional_softcap"),
        ("granite:GraniteForCausalLM", "causal_lm_loss", "divide"),
    ],
)
def test_known_families(target, op, variant):
    family, name = target.split(":")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    found = recognise(getattr(module, name))
    # Before transformers 5.18 experts have no room for a slot without one.
    assert (found.op, found.variant and found.variant.name.removesuffix("_unpadded")) == (op, variant)


def test_the_head_of_a_classifier_is_left_alone():
    import torch
    from transformers import BertConfig, BertForTokenClassification

    with torch.device("meta"):
        model = BertForTokenClassification(BertConfig(num_hidden_layers=1))
    refused = check_instance(recognise(BertForTokenClassification), model)
    assert not isinstance(refused, dict)
    assert "a classifier's" in str(refused)


def test_the_loss_of_a_masked_model_is_no_causal_one():
    from transformers.models.bert import modeling_bert

    assert recognise(modeling_bert.BertForMaskedLM).variant.loss == "cross_entropy"


def test_the_linear_layer_of_a_composed_head_is_found():
    import torch
    from transformers import BertConfig, BertLMHeadModel

    with torch.device("meta"):
        model = BertLMHeadModel(BertConfig(num_hidden_layers=1, is_decoder=True))
    facts = check_instance(recognise(BertLMHeadModel), model)
    assert facts["head"] == "cls.predictions.decoder"


def test_a_model_is_matched_in_little_more_time_than_its_file_is_parsed():
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    with torch.device("meta"):
        # The templates are made by the first model of a process.
        warm = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=1))
        model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2))
    for layer in warm.modules():
        recognise(type(layer))
    source = inspect.getsource(sys.modules[type(model).__module__])

    def parsed() -> float:
        started = time.thread_time()
        ast.parse(source)
        return time.thread_time() - started

    unit = min(parsed() for _ in range(5))
    started = time.thread_time()
    for layer in model.modules():
        recognise(type(layer))
    # Four times as long, 14 ms, where this was written; it is once in a process, so there is no best of five.
    assert time.thread_time() - started < 25 * unit


def test_the_command_prints_variant_and_facts(capsys):
    from twinkle.cli.match import main

    assert main(["transformers.models.llama", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    norm = next(row for row in rows if row["target"].endswith(":LlamaRMSNorm"))
    assert norm == {
        "target": "transformers.models.llama.modeling_llama:LlamaRMSNorm",
        "op": "rms_norm",
        "variant": "llama",
        "facts": {"x": "hidden_states", "eps": "variance_epsilon", "weight": "weight"},
    }


def test_the_command_reads_a_file_of_the_user(tmp_path, capsys):
    from twinkle.cli.match import main

    (tmp_path / "my_own_norm.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Mine(nn.Module):\n"
        "    def forward(self, x):\n"
        "        h = x.float()\n"
        "        return self.w * (h * torch.rsqrt(h.pow(2).mean(-2, keepdim=True) + self.e)).to(x.dtype)\n"
    )
    assert main([str(tmp_path / "my_own_norm.py")]) == 1
    assert "expected -1, found -2" in capsys.readouterr().out
