"""DDP and FSDP2 over a swapped layer and under it (one process, gloo)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from twinkle.modes import Mode
from twinkle.swap.layers import matches, original_class, swap_out

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def mesh(tmp_path: Any) -> Iterator[Any]:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def expected_of(kit: Any, model: nn.Module) -> torch.Tensor:
    """The output with kernels: each of the two layers doubles."""
    twin = copy.deepcopy(model)
    for gate in twin.children():
        gate.forward = lambda x, gate=gate: kit.GateKernel.forward(gate, x)
    return twin(kit.x)


def test_ddp(kit: Any, mesh: Any) -> None:
    model = kit.Model()
    expected = expected_of(kit, model)
    for gate in model.children():
        kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    wrapped = nn.parallel.DistributedDataParallel(model)
    out = wrapped(kit.x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert model.first.proj.weight.grad is not None


@pytest.mark.parametrize("ran", [True, False])
def test_fully_shard_after_the_swap(kit: Any, mesh: Any, ran: bool) -> None:
    model = kit.Model()
    expected = expected_of(kit, model)
    for gate in model.children():
        kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    if ran:
        model(kit.x)
    for gate in model.children():
        fully_shard(gate, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(model(kit.x), expected)
    model(kit.x).sum().backward()
    assert kit.is_swapped(model.first)
    assert model.first.proj.weight.grad is not None


def test_fully_shard_before_the_swap(kit: Any, mesh: Any) -> None:
    model = kit.Model()
    expected = expected_of(kit, model)
    for gate in model.children():
        fully_shard(gate, mesh=mesh)
    sharded = type(model.first)
    assert matches(model.first, kit.Gate)
    wanted = kit.candidate(kit.GateKernel)
    for gate in model.children():
        assert kit.swap_in(gate, [wanted], target=kit.Gate)
    torch.testing.assert_close(model(kit.x), expected)
    model(kit.x).sum().backward()
    assert type(model.first) is type(model.second)
    assert type(model.first).__name__ == sharded.__name__
    assert original_class(model.first) is sharded
    for gate in model.children():
        swap_out(gate)
    assert type(model.first) is sharded


def test_a_class_that_fsdp_made_over_ours_goes_with_the_kernel(kit: Any, mesh: Any) -> None:
    plain, model = kit.Model(), kit.Model()
    fully_shard(plain.first, mesh=mesh)
    kit.swap_in(model.first, [kit.candidate(kit.GateKernel)])
    fully_shard(model.first, mesh=mesh)
    model(kit.x)
    assert swap_out(model.first)
    assert type(model.first) is type(plain.first)
    model(kit.x).sum().backward()


def test_swapping_twice_under_fsdp_is_swapping_once(kit: Any, mesh: Any) -> None:
    gate = kit.Gate()
    fully_shard(gate, mesh=mesh)
    before = type(gate)
    first, second = kit.candidate(kit.kernel_times(3)), kit.candidate(kit.kernel_times(5))
    kit.swap_in(gate, [first])
    once = type(gate)
    kit.swap_in(gate, [first])
    assert type(gate) is once
    kit.swap_in(gate, [second])
    torch.testing.assert_close(gate(kit.x), 5 * torch.sigmoid(gate.proj(kit.x)) * kit.x)
    swap_out(gate)
    assert type(gate) is before


def test_a_pin_ends_under_fsdp(kit: Any, mesh: Any) -> None:
    gate = kit.Gate()
    kernels = [
        kit.candidate(kit.kernel_times(3), mode="train"),
        kit.candidate(kit.kernel_times(5), mode="inference"),
    ]
    kit.swap_in(gate, kernels, pinned=Mode.parse("inference"))
    fully_shard(gate, mesh=mesh)
    first = gate(kit.x)
    gate.train()
    torch.testing.assert_close(gate(kit.x) / first, torch.full((3, 4), 0.6))
    assert type(gate).__name__ == "FSDPGate"
