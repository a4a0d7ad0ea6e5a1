"""What a GPU has besides: generators of its own, and graphs that are captured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from twinkle.proof.compare import compare

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def noisy(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rand_like(x)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_no_generator_of_a_gpu_moves(where: str) -> None:
    torch.cuda.init()
    torch.cuda.manual_seed_all(7)
    torch.rand(3, device="cuda")
    before = [torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())]
    seeds = [generator.initial_seed() for generator in torch.cuda.default_generators]
    assert compare(noisy, noisy, (torch.ones(64, 8, device=where),), {}, backward=True).ok
    after = [torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())]
    assert all(map(torch.equal, before, after))
    assert [generator.initial_seed() for generator in torch.cuda.default_generators] == seeds


def test_dropout_on_a_gpu_draws_the_same_for_both() -> None:
    drop = nn.Dropout(0.5).train()
    assert compare(
        nn.Dropout.forward, nn.Dropout.forward, (torch.ones(64, 64, device="cuda"),), {}, module=drop
    ).ok


def test_nothing_is_compared_while_a_graph_is_captured() -> None:
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        verdict = compare(torch.sin, torch.sin, (x,), {}, backward=True)
        y += 1
    assert str(verdict) == "not compared yet: while a CUDA graph is captured"
    graph.replay()
    assert torch.equal(y, torch.full((4,), 3.0, device="cuda"))
    assert compare(torch.sin, torch.sin, (x,), {}, backward=True).ok
