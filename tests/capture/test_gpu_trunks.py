"""Models of transformers by CUDA graphs, the module that calls the blocks in one: the numbers of eager."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from twinkle.capture.block import BlockCall
from twinkle.capture.kinds import Stack
from twinkle.capture.pool import Pool
from twinkle.capture.stacks import stacks_of
from twinkle.capture.state import StackRecord

from .test_gpu_replays import Block, Net
from .test_models import FAMILIES

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


def with_calls(model: Any) -> tuple[list[Stack], list[Stack]]:
    """Fill the slots of a model: the stacks of its trunks and those of its blocks."""
    pool = Pool(torch.device("cuda", torch.cuda.current_device()), 1 << 34)
    trunks, blocks = [], []
    found = stacks_of(model)
    for one in found:
        stack = Stack(StackRecord("Net", one.container, one.class_name, len(one.blocks)), pool, always=True)
        for block in one.blocks:
            block._compiled_call_impl = BlockCall(block, stack)
        blocks.append(stack)
    for module in {id(one.trunk[1]): one.trunk[1] for one in found if one.trunk is not None}.values():
        stack = Stack(StackRecord("Net", "", type(module).__name__, 1, is_trunk=True), pool, always=True)
        module._compiled_call_impl = BlockCall(module, stack)
        trunks.append(stack)
    return trunks, blocks


def given(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if hasattr(model.config, "image_size"):
        return {
            "pixel_values": torch.randn(2, 3, 16, 16, device="cuda"),
            "labels": torch.tensor([0, 1]).cuda(),
        }
    ids = torch.randint(2, 64, (2, 12), device="cuda")
    return {"input_ids": ids, "labels": ids}


def trained(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Losses, and gradients."""
    inputs = given(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(2)
    losses, grads = [], []
    for at in range(7):
        loss = model.train()(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
        grads += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad(set_to_none=at % 2 == 0)
    return losses, grads


@torch.no_grad()
def evaluated(model: Any) -> list[Tensor]:
    inputs = given(model)
    model.eval()
    if model.config.is_encoder_decoder:
        return [model(**inputs).logits for _ in range(5)]
    del inputs["labels"]
    seen = []
    for _ in range(5):
        out = model(**inputs)
        seen.append(out.logits)
        cache = getattr(out, "past_key_values", None)
        if cache is not None:
            seen.append(model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache).logits)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_it_computes(family: str) -> None:
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    plain = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**sizes)).cuda()
    ours = copy.deepcopy(plain)
    trunks, _ = with_calls(ours)
    (losses, grads), (expected, expected_grads) = trained(ours), trained(plain)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(losses[2], expected[2]), "the first replay"
    torch.testing.assert_close(grads, expected_grads, rtol=2e-3, atol=2e-5)
    for model in (ours, plain):
        model.load_state_dict(plain.state_dict())
    assert all(map(torch.equal, evaluated(ours), evaluated(plain)))
    for stack in trunks:
        assert stack.record.replays >= 5 + 3, stack.record.calls


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_layers_that_may_be_left_out(probability: float) -> None:
    name, sizes = FAMILIES["OPT"]
    config = transformers.OPTConfig(**sizes, layerdrop=probability)
    torch.manual_seed(0)
    plain = getattr(transformers, name)(config).cuda()
    ours = copy.deepcopy(plain)
    trunks, _ = with_calls(ours)
    inputs, found = given(plain), []
    for model in (plain, ours):
        torch.manual_seed(3)
        drawn = []
        for at in range(8):
            loss = model.train()(**inputs).loss
            loss.backward(retain_graph=at == 6)
            if at == 6:  # the second time it is called again, and draws again
                loss.backward()
            drawn.append(torch.rand(1))
        found.append([loss.detach().cpu(), *drawn, torch.rand(1)])
    torch.testing.assert_close(found[1][0], found[0][0])
    assert torch.equal(torch.stack(found[1][1:]), torch.stack(found[0][1:])), "the program's own numbers"
    assert (sum(stack.record.replays for stack in trunks) > 0) is (probability == 0)


class Asks(Block):
    """Goes another way where a graph is captured, and has numbers of the program on the device."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        if torch.cuda.is_current_stream_capturing():
            return y * 2
        return y * torch.tensor(0.5, device=x.device) + torch.tensor([1, 2], device=x.device).sum()


def test_what_is_recorded_is_what_runs() -> None:
    torch.manual_seed(0)
    plain = Net(Asks).cuda()
    ours = copy.deepcopy(plain)
    [trunk], _ = with_calls(ours)
    x = torch.randn(2, 16, 64, device="cuda")
    for _ in range(5):
        found = []
        for model in (plain, ours):
            torch.manual_seed(1)
            model(x).sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
            model.zero_grad()
        assert all(map(torch.equal, *found))
    assert trunk.record.replays == 3, trunk.record.calls


PROGRAM = """
import hashlib, sys
import torch, transformers
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = transformers.LlamaConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=8192, attention_dropout=0.1, tie_word_embeddings=TIED,
)
with torch.device("cuda"):
    model = transformers.LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
generator = torch.Generator("cuda").manual_seed(1)
torch.manual_seed(2)
said = []
def note(value):
    said.append(hashlib.sha256(value.detach().float().cpu().numpy().tobytes()).hexdigest()[:12])
for at in range(12):
    ids = torch.randint(0, 8192, (2, 128), device="cuda", generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, device="cuda", generator=generator) < 0.3, -100)
    out = model(input_ids=ids, labels=labels)
    loss = out.loss / 4
    if at == 8:
        note(out.logits)
    if at == 11:
        loss = loss + out.logits[:, -1].float().square().mean()
    loss.backward()
    note(loss)
    for weight in model.parameters():
        if at == 11:  # two gradients meet at the logits, or at the hidden states
            said.append(f"~{weight.grad.float().norm().item()}")
        else:
            note(weight.grad)
    if at % 3 != 1 and at != 11:
        optimizer.step()
        optimizer.zero_grad(set_to_none=at % 2 == 0)
model.eval()
with torch.no_grad():
    for _ in range(5):
        out = model(input_ids=ids)
        note(out.logits)
        note(model(input_ids=ids[:, :1], past_key_values=out.past_key_values).logits)
print(" ".join(said))
import twinkle.report
for one in twinkle.report.snapshot()["captures"]:
    print(one["container"], one["block"], one["replays"], one["eager"], file=sys.stderr)
"""


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_with_its_loss(tied: bool) -> None:
    found = {}
    for capture in ("off", "auto"):
        command = [sys.executable, "-m", "twinkle", "run", "-c", PROGRAM.replace("TIED", str(tied))]
        env = {**os.environ, "TWINKLE_CAPTURE": capture}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr
        found[capture] = done
    assert "LlamaForCausalLM 13 {" in found["auto"].stderr, found["auto"].stderr
    assert "LlamaModel 0 {" in found["auto"].stderr, "nothing inside is captured by itself"
    plain, ours = (found[capture].stdout.split() for capture in ("off", "auto"))
    assert len(plain) == len(ours) > 200
    for mine, theirs in zip(ours, plain, strict=True):
        if theirs.startswith("~"):
            assert float(mine[1:]) == pytest.approx(float(theirs[1:]), rel=0.02)
        else:
            assert mine == theirs, found["auto"].stderr
