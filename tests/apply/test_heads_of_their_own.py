"""A head with a forward of its own (an adapter, a wrapped layer): only its logits are computed at once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from rounding import rounding_bound

if TYPE_CHECKING:
    from .conftest import Program

pytest.importorskip("transformers")
pytest.importorskip("peft")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

HEADS = ("plain", "adapter", "subclass", "wrapped", "sequence")
PROGRAM = """
import json, sys
import peft, torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


def build(head):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        {family!r}, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, intermediate_size=64, moe_intermediate_size=32, num_experts=4, num_local_experts=4,
        num_experts_per_tok=2, shared_expert_intermediate_size=32, vocab_size=96, tie_word_embeddings=False,
        pad_token_id=0,
    )).to({device!r})
    if head == "adapter":
        lora = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        return peft.get_peft_model(model, lora)
    if head == "subclass":
        model.lm_head.__class__ = Scaled
    elif head == "wrapped":
        given = model.lm_head.forward
        model.lm_head.forward = lambda x: given(x) * 0.5
    elif head == "sequence":
        model.lm_head = nn.Sequential(model.lm_head, nn.Dropout(0.0))
    return model


tokens = torch.arange(48, device={device!r}).view(2, 24) * 2
numbers, kinds = {{}}, {{}}
for head in {heads!r}:
    model = build(head)
    for _ in range(2):  # the first call of each kernel is compared
        model.zero_grad()
        output = model(input_ids=tokens, labels=tokens)
        (output.loss + output.logits.float().square().mean()).backward()
    gradients = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
    numbers[head], kinds[head] = [output.loss.item(), *gradients], type(output.logits).__name__
bindings = twinkle.report.snapshot()["bindings"]
active = [b["target"].rpartition(":")[2] for b in bindings if b["state"] == "active"]
print(json.dumps([numbers, kinds, active]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_a_gpu])])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_rest_of_the_model_has_its_kernels(program: Program, family: str, device: str) -> None:
    script = PROGRAM.format(family=family, heads=HEADS, device=device)
    plain, kinds, active = json.loads(
        program.run(script, TWINKLE_CONFIG="auto", TWINKLE_KERNELS="off").stdout
    )
    assert set(kinds.values()) == {"Tensor"}
    assert not active
    variables = {"TWINKLE_CONFIG": "auto", "TWINKLE_SIZES": "all", "TRITON_INTERPRET": "0"}
    ours, kinds, active = json.loads(program.run(script, **variables).stdout)
    assert kinds == {head: "DeferredLogits" if head == "plain" else "Tensor" for head in HEADS}
    assert any(name.endswith("RMSNorm") for name in active)
    # On a CPU the experts' own grouped products take the same time: they are left alone.
    assert any(name.endswith("Experts") for name in active) == (device == "cuda")
    for head in HEADS:
        assert len(ours[head]) == len(plain[head]) > 5
        # A loss over 64 wide layers in float32; the products of a GPU sum in another order.
        assert ours[head] == pytest.approx(plain[head], rel=20 * rounding_bound(torch.float32, 64), abs=1e-6)
