"""The embedded kernels on a machine without a GPU or triton's interpreter: plain torch, or the original."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING

import pytest
import torch
from rounding import rounding_bound, terms

if TYPE_CHECKING:
    from .conftest import Program

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
    pytest.mark.slow,
]

CPU = {"TWINKLE_CONFIG": "auto", "TRITON_INTERPRET": "0"}
MODEL = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM

def build(family, dtype):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, hidden_size=512, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=128, intermediate_size=128, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)

def step(model, **inputs):
    tokens = torch.randint(3, 64, (2, 160), generator=torch.Generator().manual_seed(1))
    loss = model(tokens, labels=tokens, **inputs).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().float() for p in model.parameters()])
"""
# Large enough to take the ways that pay: 2 x 160 x 512 elements a norm.
STEPS = """
for family in ("qwen3", "gemma3_text"):
    for dtype in (torch.float32, torch.bfloat16):
        loss, gradient = step(build(family, dtype))
        torch.save((loss, gradient), f"{NAME}-{family}-{dtype}.pt")
"""


def kernels_of(bindings):
    return {(b["target"].rpartition(":")[2], b["source"], b["state"], b["proof"][:6]) for b in bindings}


def test_losses_and_gradients_of_whole_models_are_those_of_the_original(program: Program) -> None:
    program.run(MODEL + "NAME = 'plain'" + STEPS, **CPU, TWINKLE_KERNELS="off")
    bindings = program.bindings(MODEL + "NAME = 'ours'" + STEPS, **CPU)
    found = kernels_of(bindings)
    assert {
        ("Qwen3RMSNorm", "embedded rms_norm (llama), plain torch", "active", "proven"),
        ("Gemma3RMSNorm", "embedded rms_norm (gemma), plain torch", "active", "proven"),
        ("apply_rotary_pos_emb", "embedded rotary (half), plain torch", "active", "proven"),
    } <= found
    assert not any(b["kernel"] == "gated_mlp" for b in bindings)
    files = sorted(program.root.glob("plain-*.pt"))
    assert len(files) == 4
    for file in files:
        exact = torch.load(str(file).replace("bfloat16", "float32"))[1]
        loss, gradient = torch.load(file)
        our_loss, our_gradient = torch.load(file.with_name(file.name.replace("plain", "ours")))
        off = float((our_gradient - exact).norm() / exact.norm())
        if "float32" in file.name:
            # A dozen products over 64 to 512 terms, there and back.
            same = 2 * rounding_bound(torch.float32, 24 * terms(512))
            assert our_loss == pytest.approx(loss, rel=same)
            assert off < same
        else:
            # What a proof allows a kernel: twice the error of the original.
            assert our_loss == pytest.approx(loss, rel=rounding_bound(torch.bfloat16, 6))
            assert off <= 2 * float((gradient - exact).norm() / exact.norm())


def test_autocast_and_a_compiler_see_the_same_model(program: Program) -> None:
    text = """
    model = build("qwen3", torch.float32)
    plain = step(model)[1]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        low = step(model)[1]
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens).logits
    print(json.dumps([float((low - plain).norm() / plain.norm()), float((compiled - expected).abs().max())]))
    """
    done = program.run(MODEL + textwrap.dedent(text), **CPU)
    low, compiled = json.loads(done.stdout.splitlines()[-1])
    assert low < rounding_bound(torch.bfloat16, 16)
    assert compiled < 2 * rounding_bound(torch.float32, 12 * terms(512))


def test_ops_are_taken_one_by_one(program: Program) -> None:
    calls = "".join(f"\nstep(build({family!r}, torch.float32))\n" for family in ("llama", "cohere"))
    bindings = program.bindings(MODEL + calls, **CPU, TWINKLE_DISABLE="rms_norm")
    found = kernels_of(bindings)
    assert "rms_norm" not in {b["kernel"] for b in bindings}
    assert ("CohereLayerNorm", "embedded layer_norm (cohere), plain torch", "active", "proven") in found


TWO_DTYPES = """
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
config = Qwen3Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                     head_dim=16, intermediate_size=64, vocab_size=32)
x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
for dtype in ORDER:
    torch.set_default_dtype(dtype)
    model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    y = model.model.norm(x)
    assert y.dtype is torch.float32
"""


@pytest.mark.parametrize("order", ["torch.float32, torch.bfloat16", "torch.bfloat16, torch.float32"])
def test_layers_of_two_dtypes_are_each_proven_with_inputs_of_one(program: Program, order: str) -> None:
    code = TWO_DTYPES.replace("ORDER", f"({order})")
    bindings = program.bindings(code, **CPU, TWINKLE_SIZES="all", TWINKLE_CACHE="off")
    proven = [
        b for b in bindings if b["target"].endswith(":Qwen3RMSNorm") and b["proof"].startswith("proven")
    ]
    assert len(proven) == 2
