"""Gradients of biases on a GPU: a recording sums them by the kernel, and all else is as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from twinkle.runtime import runtime

from .test_gpu_trunks import with_calls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu_(self.up(x)))


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def gradients(model: Any, x: Tensor, *, autocast: bool) -> dict[str, Tensor]:
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = model(x).float().square().mean()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("width", [512, 502])
def test_the_kernel_sums_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch, autocast: bool, width: int
) -> None:
    monkeypatch.setattr(runtime.options, "kernels", "auto")
    torch.manual_seed(0)
    plain = Net(width).cuda().to(torch.float32 if autocast else torch.bfloat16)
    ours = copy.deepcopy(plain)
    trunks, _ = with_calls(ours)
    x = torch.randn(4, 1024, width, device="cuda", dtype=next(plain.parameters()).dtype)
    for _ in range(5):
        found, expected = (gradients(model, x, autocast=autocast) for model in (ours, plain))
        for name, one in found.items():
            if name.endswith("bias"):
                assert one.dtype == expected[name].dtype
                torch.testing.assert_close(one, expected[name], rtol=2e-2, atol=1e-7)
            else:
                assert torch.equal(one, expected[name]), name
    assert trunks[0].record.replays == 3, trunks[0].record.calls
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        gradients(ours, x, autocast=autocast)
    assert any(event.name == "_partial" for event in seen.events()) is (width % 8 == 0)
