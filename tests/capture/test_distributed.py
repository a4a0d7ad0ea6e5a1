"""Blocks in what spreads a model over processes: one process of gloo stands for all."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import distributed, nn

from .emulated import put_in
from .test_replays import Net, inputs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def losses(model: nn.Module, parameters: Any) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    found = []
    for call in inputs(6):
        loss = model(call["x"]).square().mean()
        loss.backward()
        found.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("unused", [False, True])
def test_ddp_has_the_gradients_of_replayed_blocks(group: None, unused: bool) -> None:
    torch.manual_seed(0)
    plain = Net()
    ours = copy.deepcopy(plain)
    stack = put_in(ours.blocks)
    found = []
    for model in (plain, ours):
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        reduced: list[int] = []
        wrapped.register_comm_hook(reduced, counted)
        found.append([*losses(wrapped, model.parameters()), torch.tensor(len(reduced))])
    assert all(torch.equal(*both) for both in zip(*found, strict=True))
    assert stack.record.replays == 4 * 3


def counted(seen, bucket):  # type: ignore[no-untyped-def]  # torch reads the annotations
    seen.append(1)
    future: Any = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_blocks_of_fsdp2_are_left_to_it(group: None) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("torch has no FSDP2")
    torch.manual_seed(0)
    plain = Net()
    ours = copy.deepcopy(plain)
    stack = put_in(ours.blocks)
    mesh = distributed.init_device_mesh("cpu", (1,))
    found = []
    for model in (plain, ours):
        for block in model.blocks:
            fsdp.fully_shard(block, mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)
        found.append(losses(model, model.parameters()))
    assert all(torch.equal(*both) for both in zip(*found, strict=True))
    assert stack.record.replays == 0
    assert any("hook" in why or "weight" in why for why in stack.record.calls), stack.record.calls
