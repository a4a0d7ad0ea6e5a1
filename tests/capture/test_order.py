"""What lies in the memory of graphs is overwritten by the replays of earlier ones, and by no others."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twinkle.capture.block import BlockCall
from twinkle.capture.buffers import Shared
from twinkle.capture.kinds import Stack
from twinkle.capture.order import Order
from twinkle.capture.pool import Pool
from twinkle.capture.signature import IN_USE
from twinkle.capture.state import StackRecord

from .emulated import EmulatedGraphs
from .nets import Block


class Kept:
    def __init__(self, index: int, *, is_needed: bool) -> None:
        self.index, self.is_needed, self.asked = index, is_needed, 0

    def is_let_go(self) -> bool:
        self.asked += 1
        return not self.is_needed


def test_an_earlier_graph_must_not_write_over_what_is_in_use() -> None:
    order = Order()
    one, other = Kept(3, is_needed=True), Kept(5, is_needed=False)
    order.claims += [one, other]
    order.last = 5
    assert not order.rewind(2)
    assert (order.rewinds, order.last) == (0, 5)
    assert order.rewind(4), "it has been recorded after what is in use"
    assert (order.rewinds, order.last) == (1, 4)
    one.is_needed = False
    assert order.rewind(2)
    assert (one.asked, other.asked) == (3, 1)
    assert order.claims == []


def test_a_buffer_has_nothing_any_more_after_a_rewind() -> None:
    order, tensor = Order(), torch.ones(2)
    result, still = Shared(torch.ones(2), order), Shared(torch.ones(2))
    for one in (result, still):
        one.note(tensor, 0)
    assert result.has(tensor, 0)
    order.rewind(1)
    assert not result.has(tensor, 0)
    assert still.has(tensor, 0)
    result.note(tensor, 0)
    assert result.has(tensor, 0)


def chains(count: int, depth: int = 3) -> tuple[list[nn.ModuleList], list[nn.ModuleList], Pool]:
    """Plain chains of blocks, and the same with recordings in one pool."""
    torch.manual_seed(0)
    pool = Pool(torch.device("cpu"), 1 << 40, EmulatedGraphs)
    plain = [nn.ModuleList(Block() for _ in range(depth)) for _ in range(count)]
    ours = copy.deepcopy(plain)
    for chain in ours:
        stack = Stack(StackRecord("Net", "blocks", "Block", depth), pool)
        for block in chain:
            block._compiled_call_impl = BlockCall(block, stack)
    return plain, ours, pool


def replays(chain: Any) -> int:
    count: int = chain[0]._compiled_call_impl._stack.record.replays
    return count


def through(chain: Any, x: Tensor) -> Tensor:
    for block in chain:
        x = block(x)
    return x


def in_step(models: Any, x: Tensor) -> list[Tensor]:
    """The blocks of several models in turns: the first of each, then the second of each."""
    values = [x for _ in models]
    for blocks in zip(*models, strict=True):
        values = [block(value) for block, value in zip(blocks, values, strict=True)]
    return values


@pytest.mark.parametrize("grad", [False, True])
def test_models_whose_blocks_take_turns(grad: bool) -> None:
    plain, ours, _ = chains(3)
    for at in range(10):
        x = torch.randn(2, 5, 8)
        found = []
        for models in (plain, ours):
            with torch.set_grad_enabled(grad):
                if at < 4:
                    outs = [through(chain, x * (n + 1)) for n, chain in enumerate(models)]
                else:
                    outs = in_step(models, x)
                if grad:
                    torch.stack([out.square().mean() for out in outs]).sum().backward()
            found.append([out.detach() for out in outs])
            found[-1] += [p.grad.clone() for chain in models for p in chain.parameters() if grad]
            for chain in models:
                chain.zero_grad(set_to_none=at % 2 == 0)
        assert all(map(torch.equal, *found)), at
    assert sum(map(replays, ours)) > 3 * 3 * (2 if grad else 6)


def test_a_result_that_is_used_after_another_model_has_been_at_work() -> None:
    plain, ours, _ = chains(2)
    for at in range(8):
        x = torch.randn(2, 5, 8)
        found = []
        for first, second in (plain, ours):
            seen = []
            if at < 4:
                for chain in (first, second):
                    through(chain, x).square().mean().backward()
            else:
                y = second[0](x)
                y.sum().backward()
                through(first, x).square().mean().backward()
                z = second[1](y.detach())
                z = second[2](z)
                z.square().mean().backward()
                seen += [y.detach(), z.detach()]
            for chain in (first, second):
                seen += [p.grad.clone() for p in chain.parameters() if p.grad is not None]
                chain.zero_grad()
            found.append(seen)
        assert all(map(torch.equal, *found)), at


def test_what_was_given_by_one_backward_and_is_read_after_another_model() -> None:
    """A hook on a gradient between two blocks runs another model."""
    plain, ours, _ = chains(2)

    def note(chain: Any, seen: list[Tensor], grad: Tensor) -> None:
        seen.append(through(chain, grad).detach())

    for at in range(8):
        x = torch.randn(2, 5, 8)
        found = []
        for first, second in (plain, ours):
            seen: list[Tensor] = []
            through(first, x).square().mean().backward()
            y = second[1](second[0](x))
            if at > 3:
                y.register_hook(
                    lambda grad, first=first, seen=seen: seen.append(through(first, grad).detach())
                )
            second[2](y).square().mean().backward()
            for chain in (first, second):
                seen += [p.grad.clone() for p in chain.parameters()]
                chain.zero_grad()
            found.append(seen)
        assert all(map(torch.equal, *found)), at


def with_gradients(chain: Any, grad: Tensor) -> Tensor:
    """The gradient itself, after a forward of other blocks that is recorded for training."""
    with torch.enable_grad():
        through(chain, grad)
    return grad


def test_gradients_on_their_way_after_a_backward_that_took_others() -> None:
    """Another model runs while gradients of the last blocks wait to be taken; those of the first were."""
    plain, ours, _ = chains(2, depth=4)
    for at in range(8):
        x = torch.randn(2, 5, 8)
        found = []
        for first, second in (plain, ours):
            through(first, x).square().mean().backward()
            y = second[1](second[0](x))
            if at > 3:
                y.register_hook(lambda grad, first=first: with_gradients(first, grad))
            loss = second[3](second[2](y)).square().mean()
            if at > 3:
                y.sum().backward(retain_graph=True)
            loss.backward()
            found.append([p.grad.clone() for chain in (first, second) for p in chain.parameters()])
            for chain in (first, second):
                chain.zero_grad()
        assert all(map(torch.equal, *found)), at


def test_views_of_gradients_that_are_kept_have_all_recorded_anew_once() -> None:
    (plain,), (ours,), pool = chains(1)
    kept: list[list[Tensor]] = [[], []]
    for at in range(16):
        x = torch.randn(2, 5, 8)
        for chain, views in zip((plain, ours), kept, strict=True):
            through(chain, x).square().mean().backward()
            if at > 3:
                views += [p.grad.view(-1)[:2] for p in chain.parameters()]
            chain.zero_grad()
    assert all(map(torch.equal, *kept))
    record = ours[0]._compiled_call_impl._stack.record
    assert record.calls[IN_USE] == 1, "the first block after the first views"
    assert record.calls["before it was recorded"] == 2 * 2 * 3 - 1
    assert record.replays == 3 * 16 - 2 * 2 * 3
    assert not pool.lends


def test_a_block_that_is_recorded_anew_does_not_leave_the_others_behind() -> None:
    (plain,), (ours,), _ = chains(1)
    record = ours[0]._compiled_call_impl._stack.record
    for at in range(20):
        x = torch.randn(2, 5, 8)
        for chain in (plain, ours):
            if at == 5:
                chain[0].norm.eps *= 2
            through(chain, x).square().mean().backward()
        assert all(
            torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), plain.parameters(), strict=True)
        )
        if at == 15:
            before = record.replays
    assert record.replays - before == 3 * 4, record.calls


def test_memory_of_lent_gradients_goes_with_the_blocks() -> None:
    _, (ours,), pool = chains(1)
    for _ in range(5):
        through(ours, torch.randn(2, 5, 8)).square().mean().backward()
        ours.zero_grad()
    assert len(pool.order(training=True).claims) == 3
    lent = [weakref.ref(one) for one in pool.order(training=True).claims]
    del ours
    gc.collect()
    assert [one() for one in lent] == [None] * 3
    assert pool.used == 0


def test_gradients_that_outlive_their_blocks_are_not_overwritten() -> None:
    plain, ours, _ = chains(2)
    found = []
    for models in (plain, ours):
        generator = torch.Generator().manual_seed(3)
        for at in range(6):
            x = torch.randn(2, 5, 8, generator=generator)
            for chain in models:
                through(chain, x).square().mean().backward()
                if at < 5:
                    chain.zero_grad()
        parameters = [*models[1].parameters()]
        del models[1], chain
        gc.collect()
        through(models[0], x).square().mean().backward()
        found.append([p.grad for p in (*parameters, *models[0].parameters())])
    assert all(map(torch.equal, *found))
