"""Gradients of biases in what is recorded: by a kernel that is proven, or as torch sums them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinkle.capture import biases
from twinkle.capture.biases import OP, biases_by_kernel
from twinkle.ops.linear_bias import triton_backend
from twinkle.runtime import runtime

from .emulated import put_in
from .nets import Block

SUMS: list[tuple[int, ...]] = []


@pytest.fixture
def kernel(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel's module, by triton's interpreter and at every size; its sums are noted."""
    if kernels.type != "cpu":
        pytest.skip("recordings are emulated on a CPU")
    from twinkle.ops.linear_bias import triton

    theirs = triton.sum_rows

    def sum_rows(dy: Tensor, dtype: torch.dtype) -> Tensor:
        SUMS.append(tuple(dy.shape))
        return theirs(dy, dtype)

    SUMS.clear()
    runtime.of(biases.Proven).verdicts.clear()
    monkeypatch.setattr(triton, "sum_rows", sum_rows)
    monkeypatch.setattr(triton_backend, "LEAST", 0)
    monkeypatch.setattr(runtime.options, "kernels", "auto")
    monkeypatch.setattr(runtime.session, "remarks", [])
    yield triton
    runtime.of(biases.Proven).verdicts.clear()


class Addmm(nn.Module):
    """As ``Conv1D`` of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.other = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, 8), self.weight)
        return self.other(y.view(x.shape).relu_())


def trained(model: nn.Module, steps: int = 5) -> list[Tensor]:
    torch.manual_seed(1)
    found = []
    for _ in range(steps):
        x = torch.randn(2, 9, 8)
        model(x).square().sum().backward()
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
    return found


@pytest.mark.parametrize("kind", [Block, Addmm])
def test_a_recording_sums_them_by_the_kernel(kernel: Any, kind: Any) -> None:
    torch.manual_seed(0)
    plain = kind()
    ours = copy.deepcopy(plain)
    stack = put_in([ours])
    torch.testing.assert_close(trained(ours), trained(plain), rtol=1e-5, atol=1e-5)
    assert stack.record.replays == 3
    assert (18, 8) in SUMS
    assert any(text.startswith(f"{OP} of float32 sums the gradients") for text in runtime.session.remarks)
    assert F.linear.__module__ != biases.__name__


def test_a_frozen_bias_has_none(kernel: Any) -> None:
    torch.manual_seed(0)
    model = Block()
    for name, one in model.named_parameters():
        one.requires_grad_(name.endswith("weight"))
    put_in([model])
    trained(model)
    assert {*SUMS} <= {(4096, 264)}, "those of the proof"


@pytest.mark.parametrize("setting", [("kernels", "off"), ("kernels", ("rms_norm",)), ("disabled", (OP,))])
def test_not_where_it_is_not_asked_for(
    kernel: Any, monkeypatch: pytest.MonkeyPatch, setting: tuple[str, Any]
) -> None:
    monkeypatch.setattr(runtime.options, *setting)
    torch.manual_seed(0)
    plain = Block()
    ours = copy.deepcopy(plain)
    stack = put_in([ours])
    assert all(map(torch.equal, trained(ours), trained(plain)))
    assert stack.record.replays == 3
    assert not SUMS
    assert not runtime.session.remarks


@pytest.mark.parametrize("fault", ["scaled", "raises", "a row too few", "NaN"])
def test_a_wrong_kernel_is_left_alone(kernel: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def wrong(dy: Tensor, dtype: torch.dtype) -> Tensor:
        if fault == "raises":
            raise RuntimeError("no such instruction")
        if fault == "scaled":
            return dy.sum(0).mul(1.01).to(dtype)
        return dy[1:].sum(0).to(dtype) if fault == "a row too few" else dy.sum(0).mul(float("nan")).to(dtype)

    monkeypatch.setattr(kernel, "sum_rows", wrong)
    torch.manual_seed(0)
    plain = Block()
    ours = copy.deepcopy(plain)
    put_in([ours])
    assert all(map(torch.equal, trained(ours), trained(plain)))
    [text] = runtime.session.remarks
    assert text.startswith(f"{OP} of float32 is left alone: ")


def test_other_threads_call_torch_s(kernel: Any) -> None:
    layer = nn.Linear(8, 8)
    seen: list[Any] = []

    def call() -> None:
        seen.append(layer(torch.ones(2, 8)).grad_fn)

    with biases_by_kernel([*layer.parameters()], torch.device("cpu"), None):
        other = threading.Thread(target=call)
        other.start()
        other.join()
        call()
    call()
    names = [type(node).__name__ for node in seen]
    assert names == ["AddmmBackward0", "ViewBackward0", "AddmmBackward0"]


INSIDE = """
import collections, sys
import torch, transformers
from twinkle.capture.biases import biases_by_kernel
from twinkle.ops.linear_bias import triton_backend
triton_backend.LEAST = 0
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "num_key_value_heads": 4}
model = getattr(transformers, sys.argv[1])(getattr(transformers, sys.argv[2])(**sizes)).train()
ids = torch.arange(48).view(2, 24)
def nodes():
    left, seen = [model(input_ids=ids, labels=ids).loss.grad_fn], set()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [one for one, _ in node.next_functions]
    return collections.Counter(type(node).__name__ for node in seen)
for _ in range(2):
    model(input_ids=ids, labels=ids).loss.backward()
outside = nodes()
with biases_by_kernel(model.parameters(), torch.device("cpu"), None):
    inside = nodes()
assert nodes() == outside
assert outside["DeferredHeadBackward"] == 1, outside
print(inside.pop("_BiasBackward"), inside == outside)
"""


@pytest.mark.parametrize(
    ("model", "config", "biases_in_it"),
    [
        ("BertForMaskedLM", "BertConfig", 13),
        ("GPT2LMHeadModel", "GPT2Config", 8),
        ("Qwen2ForCausalLM", "Qwen2Config", 6),
    ],
)
def test_all_other_kernels_and_deferred_logits_stay(
    kernels: torch.device, model: str, config: str, biases_in_it: int
) -> None:
    """Its head was no longer deferred in recordings: torch's linear function had another in its place."""
    pytest.importorskip("transformers")
    env = {**os.environ, "TWINKLE_CONFIG": "auto", "TWINKLE_SIZES": "all", "TRITON_INTERPRET": "1"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", INSIDE, model, config]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(biases_in_it), "True"], done.stdout
