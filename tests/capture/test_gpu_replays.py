"""The same by CUDA graphs: bit for bit, with the program's random numbers and the device's limits."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twinkle.capture.block import BlockCall
from twinkle.capture.graphs import CudaGraphs
from twinkle.capture.kinds import Stack
from twinkle.capture.pool import Pool
from twinkle.capture.state import StackRecord

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


class Block(nn.Module):
    def __init__(self, dim: int = 64, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        y = self.out(y.transpose(1, 2).flatten(2))
        return x + nn.functional.dropout(y, self.dropout, self.training)


class Net(nn.Module):
    def __init__(self, kind: Any = Block, depth: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(kind() for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, mask)
        return x


def put_in(model: Any) -> Stack:
    device = torch.device("cuda", torch.cuda.current_device())
    record = StackRecord("Net", "blocks", "Block", len(model.blocks))
    stack = Stack(record, Pool(device, 1 << 32), always=True)
    for block in model.blocks:
        block._compiled_call_impl = BlockCall(block, stack)
    return stack


def pair(kind: Any = Block) -> tuple[Any, Any, Stack]:
    torch.manual_seed(0)
    plain = Net(kind).cuda()
    ours = copy.deepcopy(plain)
    return plain, ours, put_in(ours)


def steps(
    model: Any, count: int = 7, *, each: Any = None, autocast: bool = False, shapes: Any = None
) -> list[Any]:
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator("cuda").manual_seed(2)
    seen = []
    for at in range(count):
        if each is not None:
            each(model, at)
        shape = (2, 16, 64) if shapes is None else shapes[at % len(shapes)]
        x = torch.randn(shape, device="cuda", generator=generator, requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(x).float().square().mean()
        loss.backward()
        seen += [loss.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad(set_to_none=at % 2 == 0)
    return [*seen, torch.rand(1, device="cuda")]


def assert_same(ours: list[Any], plain: list[Any]) -> None:
    assert [torch.equal(one, other) for one, other in zip(ours, plain, strict=True)] == [True] * len(plain)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shapes", [[(2, 16, 64)], [(2, 16, 64), (3, 8, 64)]])
def test_training_with_dropout(autocast: bool, shapes: Any) -> None:
    plain, ours, stack = pair()
    count = 6 * len(shapes)
    mine = steps(ours, count, autocast=autocast, shapes=shapes)
    assert_same(mine, steps(plain, count, autocast=autocast, shapes=shapes))
    assert stack.record.replays == 4 * 4 * len(shapes), stack.record.calls


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_training_steps(mode: Any) -> None:
    plain, ours, stack = pair()

    def each(model: Any, at: int) -> None:
        model.eval()
        with mode():
            model.seen = [*getattr(model, "seen", []), model(torch.ones(1, 16, 64, device="cuda"))]
        model.train()

    assert_same(steps(ours, 8, each=each), steps(plain, 8, each=each))
    assert_same(ours.seen, plain.seen)
    assert stack.record.replays == 2 * 4 * 6, stack.record.calls


def test_a_second_backward_calls_the_block_with_the_same_random_numbers() -> None:
    plain, ours, stack = pair()
    found = []
    for model in (plain, ours):
        torch.manual_seed(3)
        seen = []
        for at in range(6):
            loss = model(torch.full((2, 16, 64), 0.1 * at, device="cuda")).square().mean()
            loss.backward(retain_graph=at == 4)
            if at == 4:
                loss.backward()
            seen += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
            model.zero_grad(set_to_none=at % 2 == 0)
        found.append([*seen, torch.rand(3, device="cuda")])
    assert_same(*found)
    assert stack.record.replays == 4 * 4, stack.record.calls


class Waits(Block):
    """Asks the device for a number, which nothing that is recorded can."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * (1 + (x.sum() > 0).item())


class WaitsInBackward(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * (1 + (grad.sum() > 0).item()))
        return y


@pytest.mark.parametrize("kind", [Waits, WaitsInBackward])
def test_what_cannot_be_recorded_runs_as_it_is(kind: Any) -> None:
    plain, ours, stack = pair(kind)
    assert_same(steps(ours, 9), steps(plain, 9))
    assert any("recorded" in reason or "backward" in reason for reason in stack.record.calls), (
        stack.record.calls
    )


def test_other_streams_run_as_they_are() -> None:
    plain, ours, stack = pair()
    steps(ours)
    steps(plain)
    before = stack.record.replays
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = steps(ours)
        expected = steps(plain)
    torch.cuda.current_stream().wait_stream(side)
    assert_same(found, expected)
    assert stack.record.replays == before


def test_a_graph_of_the_program_records_the_block_itself() -> None:
    _, ours, stack = pair()
    ours.eval()
    x = torch.randn(2, 16, 64, device="cuda")
    with torch.no_grad():
        for _ in range(4):
            expected = ours(x)
        before = stack.record.replays
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ours(x)
        graph.replay()
    assert torch.equal(out, expected)
    assert stack.record.replays == before


def test_threads() -> None:
    plain, ours, _ = pair()
    ours.eval()
    plain.eval()
    inputs = [torch.randn(2, 16, 64, device="cuda") for _ in range(40)]
    found: dict[int, Tensor] = {}

    def work(part: int) -> None:
        with torch.no_grad():
            for at in range(part, 40, 4):
                found[at] = ours(inputs[at])

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    with torch.no_grad():
        assert_same([found[at] for at in range(40)], [plain(x) for x in inputs])


def test_memory_goes_with_the_model() -> None:
    _, ours, stack = pair()
    steps(ours)
    assert stack.record.held > 0, stack.record.calls
    block = ours.blocks[0]
    gc.disable()
    try:
        recordings = [*block._compiled_call_impl._known.values()]
        assert recordings
        del recordings, ours, block
        assert stack.record.held == 0
    finally:
        gc.enable()


def test_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        reentrant = True

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            return x

    for reentrant in (True, False):
        torch.manual_seed(0)
        plain: Any = Checkpointed().cuda()
        plain.reentrant = reentrant
        ours = copy.deepcopy(plain)
        stack = put_in(ours)
        assert_same(steps(ours), steps(plain))
        assert bool(stack.record.replays) is reentrant, stack.record.calls


def test_a_recording_that_fails_leaves_no_trace() -> None:
    graphs = CudaGraphs(torch.device("cuda", 0))
    x = torch.ones(4, device="cuda")
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with pytest.raises(Exception, match="captur"):
            graphs.record(lambda: nn.functional.dropout(x).sum().item())
    torch.manual_seed(3)
    first = torch.rand(3, device="cuda")
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3, device="cuda"), first)
    assert torch.cuda.memory_allocated() <= before + 4096


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_random_numbers_after_a_recording_that_the_device_broke_off(place: str) -> None:
    plain, ours, stack = pair()
    found = []
    for model in (plain, ours):
        other = Net(Waits if place == "forward" else WaitsInBackward).cuda()
        blocks = put_in(other) if model is ours else None
        seen = steps(model, 5)
        steps(other, 5)
        seen += steps(model, 5)
        found.append(seen)
        assert blocks is None or blocks.record.calls
    assert_same(*found)
    assert stack.record.replays >= 4 * 3, stack.record.calls


def test_models_one_after_the_other_in_one_pool() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    pool = Pool(device, 1 << 32)
    for _ in range(4):
        torch.manual_seed(0)
        plain: Any = Net().cuda()
        ours = copy.deepcopy(plain)
        stack = Stack(StackRecord("Net", "blocks", "Block", 4), pool, always=True)
        for block in ours.blocks:
            block._compiled_call_impl = BlockCall(block, stack)
        assert_same(steps(ours, 5), steps(plain, 5))
        assert stack.record.replays == 12, stack.record.calls
        del ours, block, stack
        gc.collect()
        torch.cuda.empty_cache()
        assert pool.used == 0
