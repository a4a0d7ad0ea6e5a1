"""Written-out activations and GroupNorm in whole models, with no configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from rounding import assert_near
from torch import nn

from twinkle.apply.layers import kernelize_layers
from twinkle.kernel import unkernelize_model
from twinkle.ops.group_norm import triton_backend
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from twinkle.registry import Registry


@pytest.fixture
def device(kernels: torch.device, clean_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where triton runs, with the two ops wanted, at every size."""
    monkeypatch.setattr(triton_backend, "LEAST", 0)
    runtime.options.kernels = ("activation", "group_norm")
    runtime.options.verify = "auto"
    return kernels


class NewGELU(nn.Module):
    """As in GPT-2 and the programs that follow it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        cubed = input + 0.044715 * torch.pow(input, 3.0)
        return 0.5 * input * (1.0 + torch.tanh(0.7978845608028654 * cubed))


class Block(nn.Module):
    def __init__(self, act: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels, eps=0.1)
        self.grow, self.act = nn.Conv2d(channels, channels, 1), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.act(self.grow(self.norm(x)))


def step(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])]


def states(registry: Registry) -> dict[str, tuple[str, str]]:
    return {b.kernel: (b.state, b.proof.partition(":")[0]) for b in registry.bindings}


@pytest.mark.parametrize("channels", [8, 320], ids=["few channels", "more than a proof has tokens"])
def test_both_are_proven_and_run(device: torch.device, clean_registry: Registry, channels: int) -> None:
    torch.manual_seed(0)
    block = Block(NewGELU(), channels).to(device)
    x = torch.randn(2, channels, 5, 3, device=device)
    expected = step(block, x)
    kernelize_layers(block)
    found = step(block, x)
    assert states(clean_registry) == dict.fromkeys(("activation", "group_norm"), ("active", "proven"))
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, 400)
    block.norm.num_groups = 4
    other = block(x)
    unkernelize_model(block)
    assert_near(other, block(x), 400)


def test_torch_s_own_activations_are_left_alone(device: torch.device, clean_registry: Registry) -> None:
    for act in (nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Sigmoid()):
        block = nn.Sequential(nn.Linear(4, 4), act).to(device)
        kernelize_layers(block)
        block(torch.randn(2, 4, device=device))
    assert states(clean_registry) == {}


def test_gpt2(device: torch.device, clean_registry: Registry) -> None:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2Model(config).to(device).eval()
    tokens = torch.arange(10, device=device).view(2, 5)
    with torch.no_grad():
        expected = model(tokens).last_hidden_state
        kernelize_layers(model)
        found = model(tokens).last_hidden_state
    assert states(clean_registry) == {"activation": ("active", "proven")}
    assert_near(found, expected, 400)
