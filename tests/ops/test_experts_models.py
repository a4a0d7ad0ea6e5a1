"""Whole tiny models with the experts' op in place of what they run by themselves."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rounding import assert_near, rounding_bound

transformers = pytest.importorskip("transformers")

from twinkle.fit.layer import check_layer  # noqa: E402
from twinkle.match.structure import check_instance, recognise  # noqa: E402
from twinkle.ops.experts.layer import layer_class, supports  # noqa: E402
from twinkle.proof.compare import compare  # noqa: E402

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "olmoe")
IMPLEMENTATIONS = ("eager", "grouped_mm")
OPERATIONS = 600
"""Behind a number of a model and its gradients: ten products over 8 to 48 columns, there and back."""


def build(family, implementation):
    if family not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SMALL)
    given = {"attn_implementation": "eager"}
    if hasattr(config, "_experts_implementation"):
        given["experts_implementation"] = implementation
    elif implementation != "eager":
        pytest.skip("this transformers has one implementation of experts")
    model = transformers.AutoModelForCausalLM.from_config(config, **given)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def found_in(model):
    """The layers that are recognised as experts, with their recognition and their facts."""
    found = []
    for module in model.modules():
        recognition = recognise(type(module))
        if recognition.op == "experts" and supports(recognition.variant) is None:
            facts = check_instance(recognition, module)
            assert isinstance(facts, dict), facts
            found.append((module, recognition.variant, facts))
    if not found:
        pytest.skip("the experts of this transformers are no 3-D parameters")
    return found


def put_in(model):
    """Run the op instead of the layers' own forwards."""
    for module, variant, facts in found_in(model):
        module.forward = layer_class(variant, facts).forward.__get__(module)
    return model


def step(model, call=None):
    torch.manual_seed(1)
    ids = torch.randint(3, 99, (2, 12))
    model.zero_grad()
    loss = (model if call is None else call)(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    assert_near(ours[0], theirs[0], OPERATIONS)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        off = (ours[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert off < 2 * rounding_bound(torch.float32, OPERATIONS), name


@pytest.fixture(params=["torch", "triton"])
def kinds(request: pytest.FixtureRequest) -> str:
    """With plain torch, and with triton's kernels in its interpreter."""
    if request.param == "triton" and request.getfixturevalue("kernels").type != "cpu":
        pytest.skip("these models are on the CPU")
    return str(request.param)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(family, implementation, kinds):
    if kinds == "triton" and implementation == "eager":
        pytest.skip("the same op: once is enough in the interpreter")
    model = build(family, implementation)
    theirs = step(model)
    assert_same(step(put_in(model)), theirs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_the_models_own(family, implementation):
    model = build(family, implementation).bfloat16()
    module, variant, facts = found_in(model)[0]
    kernel = layer_class(variant, facts).forward
    torch.manual_seed(2)
    x = torch.randn(24, 32, dtype=torch.bfloat16)
    indices = torch.rand(24, 4).topk(2).indices
    weights = torch.rand(24, 2, dtype=torch.bfloat16)
    verdict = compare(type(module).forward, kernel, (x, indices, weights), {}, module=module, backward=True)
    assert verdict.ok, verdict


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_fits_the_arguments_of_the_models_own(family):
    module, variant, facts = found_in(build(family, "eager"))[0]
    check_layer(layer_class(variant, facts), type(module), instances=[module])


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_goes_where_the_models_own_goes(family):
    for implementation in IMPLEMENTATIONS:
        model = build(family, implementation)
        ours = put_in(copy.deepcopy(model))
        ids = torch.arange(3, 15)[None]
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            mine, theirs = (m(input_ids=ids).logits.float() for m in (ours, model))
            module, variant, facts = found_in(model)[0]
            x = torch.randn(12, 32)
            indices, weights = torch.rand(12, 4).topk(2).indices, torch.rand(12, 2)
            result = module(x, indices, weights)
            assert layer_class(variant, facts).forward(module, x, indices, weights).dtype == result.dtype
        # Two layers of three products in bfloat16; norms are in float32.
        assert (mine - theirs).norm() <= rounding_bound(torch.bfloat16, 6, theirs.norm().item())


@pytest.mark.slow
def test_the_whole_model_compiles_without_a_graph_break():
    torch._dynamo.reset()
    model = put_in(build("qwen3_moe", "grouped_mm"))
    expected = step(model)
    assert_same(step(model, torch.compile(model, fullgraph=True, backend="aot_eager")), expected)


PROGRAM = f"""
import json
import twinkle
twinkle.activate()
import torch, transformers
torch.manual_seed(0)
for implementation in ("grouped_mm", "eager"):
    config = transformers.AutoConfig.for_model("qwen3_moe", **{SMALL!r})
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    ids = torch.arange(3, 27).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    print(json.dumps(twinkle.report.snapshot()))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_on_the_cpu_a_loop_is_replaced_and_proven_and_grouped_mm_is_left_alone(tmp_path):
    found_in(build("qwen3_moe", "grouped_mm"))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_")}
    environ |= {"TWINKLE_CONFIG": "auto", "TWINKLE_CACHE": "off", "TRITON_INTERPRET": "0"}
    environ["TWINKLE_SIZES"] = "fixed"
    environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    assert [remark for remark in first["remarks"] if "Qwen3MoeExperts is left alone: its own" in remark]
    assert "experts" not in {binding["kernel"] for binding in first["bindings"]}
    (ours,) = (binding for binding in second["bindings"] if binding["kernel"] == "experts")
    assert (ours["state"], ours["proof"].partition(":")[0]) == ("active", "proven"), ours
