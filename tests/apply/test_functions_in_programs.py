"""A program in plain PyTorch whose norm, activation and rotation are functions, with no configuration."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from .conftest import Program

if TYPE_CHECKING:
    from collections.abc import Sequence

GPT = """
import torch
from torch import nn
import torch.nn.functional as F


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    d = x.shape[3] // 2
    x1, x2 = x[..., :d], x[..., d:]
    return torch.cat([x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos], 3)


def swiglu(x):
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)

    def forward(self, x, cos, sin):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, -1).unbind(2)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class MLP(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(2 * d, d, bias=False)

    def forward(self, x):
        return self.down(F.dropout(swiglu(self.up(x)), 0.0, self.training))


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attention, self.mlp = Attention(d), MLP(d)

    def forward(self, x, cos, sin):
        x = x + self.attention(norm(x), cos, sin)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, d=32, vocab=64):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, d), nn.Linear(d, vocab, bias=False)
        self.blocks = nn.ModuleList(Block(d) for _ in range(2))
        angle = torch.outer(torch.arange(16.0), 0.1 ** torch.arange(4))
        self.register_buffer("cos", angle.cos()[None, :, None, :])
        self.register_buffer("sin", angle.sin()[None, :, None, :])

    def forward(self, tokens, targets):
        t = tokens.shape[1]
        x = norm(self.embed(tokens))
        for block in self.blocks:
            x = block(x, self.cos[:, :t], self.sin[:, :t])
        logits = self.head(norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
"""
STEPS = """
import torch, gpt
torch.manual_seed(0)
model = gpt.GPT()
tokens = torch.arange(16).view(2, 8)
run = {run}
for _ in range(3):
    model.zero_grad()
    loss = run(tokens, tokens)
    loss.backward()
grads = [p.grad.double().norm().item() for p in model.parameters()]
from twinkle.report import snapshot
found = sorted((b["target"], b["state"]) for b in snapshot()["bindings"])
print(json.dumps(dict(loss=loss.item(), grads=grads, found=found)))
"""
RUNS = {
    "eager": "model",
    "compiled": 'torch.compile(model, backend="aot_eager", fullgraph=True)',
}


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Program:
    program = Program(tmp_path_factory.mktemp("functions_in_programs"))
    (program.root / "site" / "gpt.py").write_text(GPT)
    return program


def steps(program: Program, run: str, **variables: str) -> dict[str, Any]:
    code = textwrap.dedent(STEPS.replace("{run}", RUNS[run]))
    made: dict[str, Any] = json.loads(program.run(code, **variables).stdout.splitlines()[-1])
    return made


def near(found: Sequence[float], expected: Sequence[float]) -> bool:
    return all(abs(a - b) <= 1e-4 * max(abs(b), 1e-3) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("run", RUNS)
def test_its_functions_have_kernels_and_its_steps_are_the_same(gpt: Program, run: str) -> None:
    plain = steps(gpt, "eager", TWINKLE_DISABLE="1")
    served = steps(gpt, run, TWINKLE_CONFIG="auto", TWINKLE_SIZES="all", TRITON_INTERPRET="1")
    assert plain["found"] == []
    assert {"gpt:norm", "gpt:rotate", "gpt:swiglu"} <= {target for target, _ in served["found"]}
    assert {state for _, state in served["found"]} == {"active"}
    assert near([served["loss"], *served["grads"]], [plain["loss"], *plain["grads"]])
