"""Gradients on their way from replays to the parameters: lent, summed, watched, left out, kept."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twinkle.capture.lent import Lent

from .emulated import put_in

if TYPE_CHECKING:
    from collections.abc import Callable

    Step = Callable[[Any, Tensor, list[Tensor]], None]


class Block(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks one after the other; some may be left out, and what is between them is kept if wanted."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor, kept: list[Tensor] | None = None, without: tuple[int, ...] = ()) -> Tensor:
        x = self.first(x)
        for at, block in enumerate(self.blocks):
            if at not in without:
                x = block(x)
                if kept is not None:
                    kept.append(x)
        return x


def drop(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)


def grads(model: nn.Module) -> list[Tensor]:
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]


def plain_step(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    model(x).square().mean().backward()
    seen += grads(model)
    drop(model)


def same(step: Step, *, replays: int = 12, warm: bool = True, whole: bool = False) -> None:
    """The same numbers, bit for bit, of a plain model and one with captured blocks.

    What several uses of a result give for its gradient is summed in another order: all of a block's first.
    """
    torch.manual_seed(0)
    plain = Net()
    ours = copy.deepcopy(plain)
    stack = put_in(ours.blocks)
    trunk = put_in([ours], is_trunk=True) if whole else None
    found = []
    for model in (plain, ours):
        generator, seen = torch.Generator().manual_seed(1), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for at in range(8):
            x = torch.randn(2, 5, 8, generator=generator)
            (plain_step if warm and at < 4 else step)(model, x, seen)
            plain_step(model, x, seen)
            if at < 4:
                continue
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen += [p.detach().clone() for p in model.parameters()]
        found.append(seen)
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        if step in (results_between, from_the_middle):
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other)
    if trunk is None:
        assert stack.record.replays >= replays
    else:
        assert trunk.record.replays >= 4


def test_gradients_are_the_memory_that_replays_write_to() -> None:
    places: list[set[int]] = []

    def step(model: Any, x: Tensor, seen: list[Tensor]) -> None:
        model(x).square().mean().backward()
        places.append({p.grad.data_ptr() for p in model.blocks.parameters()})
        seen += grads(model)
        drop(model)

    same(step)
    ours = places[-3:]
    assert len(set.intersection(*ours)) >= len(ours[0]) - 1, "but for the one that goes autograd's way"


def keep_gradients(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    """A program that has the gradients of the last step when it computes the next."""
    model(x).square().mean().backward()
    kept = [p.grad for p in model.parameters()]
    drop(model)
    model(x * 2).square().mean().backward()
    seen += [*grads(model), *(one.clone() for one in kept)]
    drop(model)


def keep_views(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    model(x).square().mean().backward()
    kept = [p.grad.view(-1)[:3] for p in model.parameters()]
    drop(model)
    model(x * 2).square().mean().backward()
    seen += [*grads(model), *(one.clone() for one in kept)]
    drop(model)


def keep_views_for_long(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    model(x).square().mean().backward()
    kept = [p.grad.view(-1)[:3] for p in model.parameters()]
    drop(model)
    for _ in range(4):
        plain_step(model, x * 2, seen)
    seen += [one.clone() for one in kept]


def accumulate(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    for part in range(3):
        model(x * (part + 1)).square().mean().backward()
    seen += grads(model)
    drop(model)


def zero_in_place(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    for _ in range(3):
        model(x).square().mean().backward()
        seen += grads(model)
        model.zero_grad(set_to_none=False)
    drop(model)


def zero_after_the_forward(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    """The gradients of the last step are there until just before the backward, as in Lightning's loop."""
    for at in range(4):
        loss = model(x * (at + 1)).square().mean()
        drop(model)
        loss.backward()
        seen += grads(model)
    drop(model)


def evaluate_before_the_step(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    model(x).square().mean().backward()
    with torch.no_grad():
        seen.append(model(x * 2))
    seen += grads(model)
    drop(model)


def another_forward_before_the_step(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    model(x).square().mean().backward()
    seen.append(model(x * 2).detach())
    seen += grads(model)
    drop(model)


def several_forwards(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    sum(model(x * n).square().mean() for n in (1, 2, 3)).backward()
    seen += grads(model)
    drop(model)


def weight_decay(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    loss = model(x).square().mean() + 0.1 * sum(p.square().sum() for p in model.parameters())
    loss.backward()
    seen += grads(model)
    drop(model)


def results_between(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    """An auxiliary loss of what is between the blocks, whose gradients are looked at."""
    kept: list[Tensor] = []
    out = model(x, kept)
    for one in kept:
        one.retain_grad()
    (out.square().mean() + kept[1].sum()).backward()
    seen += [one.grad for one in kept] + grads(model)
    drop(model)


def hooks_between(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    kept: list[Tensor] = []
    out = model(x, kept)
    kept[0].register_hook(seen.append)
    kept[2].register_hook(lambda grad: grad * 0.5)
    out.square().mean().backward()
    seen += grads(model)
    drop(model)


def part_of_the_way(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    """Gradients as far as a result between the blocks, then from there on."""
    kept: list[Tensor] = []
    out = model(x, kept)
    (middle,) = torch.autograd.grad(out.square().mean(), kept[1], retain_graph=True)
    kept[1].backward(middle)
    seen += [middle, *grads(model)]
    drop(model)


def of_single_weights(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    loss = model(x).square().mean()
    weights = (model.blocks[2].up.weight, model.blocks[1].norm.bias)
    seen += torch.autograd.grad(loss, weights, retain_graph=True)
    loss.backward(inputs=[model.blocks[0].down.weight, model.first.weight])
    seen += grads(model)
    drop(model)


def twice(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    seen += grads(model)
    drop(model)


def hook_on_a_weight(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    handle = model.blocks[1].up.weight.register_hook(lambda grad: grad * 2)
    model(x).square().mean().backward()
    handle.remove()
    seen += grads(model)
    drop(model)


def hook_after_the_forward(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    loss = model(x).square().mean()
    handle = model.blocks[1].up.weight.register_hook(lambda grad: grad * 2)
    loss.backward()
    handle.remove()
    seen += grads(model)
    drop(model)


def optimizer_in_the_backward(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    """Each gradient is used and dropped when it is there."""

    def use(weight: Tensor) -> None:
        with torch.no_grad():
            weight -= 0.01 * weight.grad  # type: ignore[operator]
        weight.grad = None

    handles = [p.register_post_accumulate_grad_hook(use) for p in model.parameters()]
    model(x).square().mean().backward()
    for handle in handles:
        handle.remove()
    seen += [p.detach().clone() for p in model.parameters()] + grads(model)


def without_some(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    for without in ((1,), (0, 3), (), (0, 1, 2, 3)):
        model(x, None, without).square().mean().backward()
        seen += grads(model)
        drop(model)


def no_backward(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    seen.append(model(x).detach())
    loss = model(x).square().mean()
    del loss
    plain_step(model, x, seen)


def from_the_middle(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    """One result goes through the blocks behind it twice."""
    kept: list[Tensor] = []
    out = model(x, kept)
    more = model.blocks[3](model.blocks[2](kept[1]))
    (out.square().mean() + more.sum()).backward()
    seen += grads(model)
    drop(model)


def changed_between(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    """The program writes into a block's result before the next one has it."""
    handle = model.blocks[1].register_forward_hook(lambda module, args, out: out.mul_(2))
    plain_step(model, x, seen)
    handle.remove()


def another_between(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    handle = model.blocks[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    plain_step(model, x, seen)
    handle.remove()


def scaled_between(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    y = model.first(x)
    for block in model.blocks:
        y = block(y) * 0.9
    y.square().mean().backward()
    seen += grads(model)
    drop(model)


def again_in_the_backward(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    y = model.first(x)
    y = checkpoint(model.blocks[0], y, use_reentrant=True)
    y = checkpoint(lambda z: model.blocks[2](model.blocks[1](z)), y, use_reentrant=True)
    model.blocks[3](y).square().mean().backward()
    seen += grads(model)
    drop(model)


def frozen(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    model.blocks[1].requires_grad_(False)
    for _ in range(4):
        plain_step(model, x, seen)
    model.blocks[1].requires_grad_(True)


def penalty(model: Any, x: Tensor, seen: list[Tensor]) -> None:
    x = x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
    seen.append(grad.detach())


STEPS = [
    *(
        keep_gradients,
        keep_views,
        keep_views_for_long,
        accumulate,
        zero_in_place,
        zero_after_the_forward,
        evaluate_before_the_step,
        another_forward_before_the_step,
        several_forwards,
        weight_decay,
    ),
    *(results_between, hooks_between, part_of_the_way, of_single_weights, twice),
    *(hook_on_a_weight, hook_after_the_forward, optimizer_in_the_backward, without_some, no_backward),
    *(from_the_middle, changed_between, another_between, scaled_between, again_in_the_backward, frozen),
    penalty,
]


@pytest.mark.parametrize("warm", [True, False], ids=["after plain steps", "from the start"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_the_same_numbers(step: Step, warm: bool) -> None:
    same(step, warm=warm, replays=4)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_the_same_numbers_of_a_whole(step: Step) -> None:
    same(step, whole=True)


def test_what_autograd_holds_a_moment_longer_is_not_taken_for_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As its thread does on a GPU while the first backward is recorded."""
    torch.manual_seed(0)
    plain = Net()
    ours = copy.deepcopy(plain)
    stack = put_in(ours.blocks)
    held: list[Tensor] = []
    made = Lent.__init__

    def hold(self: Lent, found: Any, *rest: Any) -> None:
        made(self, found, *rest)
        held.extend(one.detach() for one in found if one is not None)

    monkeypatch.setattr(Lent, "__init__", hold)
    found: list[list[Tensor]] = []
    for model in (plain, ours):
        seen: list[Tensor] = []
        for at in range(12):
            x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(at))
            model(x).square().mean().backward()
            held.clear()
            seen += grads(model)
            model.zero_grad(set_to_none=at % 3 == 0)
        found.append(seen)
    assert all(map(torch.equal, *found))
    assert stack.record.replays == 10 * 4
    assert stack.record.calls == {"before it was recorded": 2 * 4}


def test_autograd_gets_to_each_weight_that_is_asked_for() -> None:
    def step(model: Any, x: Tensor, seen: list[Tensor]) -> None:
        found = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
        assert all(p.grad is None for p in model.parameters())
        seen += found

    same(step)


def test_a_gradient_of_a_gradient_that_nobody_takes_is_not_held() -> None:
    torch.manual_seed(0)
    model, seen = Net(), []
    put_in(model.blocks)
    for _ in range(4):
        plain_step(model, torch.randn(2, 5, 8), seen)
    gc.collect()
    x = torch.randn(2, 5, 8).requires_grad_()
    kept: list[Tensor] = []
    out = model(x, kept)
    (grad,) = torch.autograd.grad(out.square().mean(), x, create_graph=True)
    assert grad.requires_grad
    alive = weakref.ref(kept[1].grad_fn)
    del out, grad, kept
    plain_step(model, x.detach(), seen)
    gc.collect()
    assert alive() is None


def test_one_node_for_the_weights_of_a_pass() -> None:
    torch.manual_seed(0)
    model, seen = Net(), []
    stack = put_in(model.blocks)
    x = torch.randn(2, 5, 8)
    for _ in range(4):
        plain_step(model, x, seen)
    out = model(x)
    assert stack.record.replays == 12
    nodes, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            left += [one for one, _ in node.next_functions]
    names = [type(node).__name__ for node in nodes]
    assert names.count("_WeightsBackward") == 1
    assert names.count("_ReplayBackward") == 4
