"""A model whose blocks are replayed computes what it computes without."""

from __future__ import annotations

import copy
import gc
import random
import time
import types
import weakref
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from .emulated import EmulatedGraphs, put_in


class Block(nn.Module):
    """Attention's shape without its cost: two layers, a sum, dropout, a mask."""

    def __init__(self, dim: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        inner = self.down(torch.relu(self.up(self.norm(x)))) * scale
        if mask is not None:
            inner = inner * mask
        return x + self.dropout(inner)


class Net(nn.Module):
    def __init__(self, depth: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block(dropout=dropout) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, mask, **kwargs)
        return x


def pair(**options: Any) -> tuple[Net, Net, Any]:
    """A plain net, the same with captured blocks, and their stack."""
    torch.manual_seed(0)
    plain = Net(**options)
    ours = copy.deepcopy(plain)
    return plain, ours, put_in(ours.blocks)


def steps(model: nn.Module, calls: list[dict[str, Any]], *, each: Any = None) -> list[Tensor]:
    """Losses, gradients and weights of training steps."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen = []
    for at, call in enumerate(calls):
        if each is not None:
            each(model, at)
        x = call["x"].clone().requires_grad_()
        loss = model(x, **{name: value for name, value in call.items() if name != "x"}).square().mean()
        loss.backward()
        seen += [loss.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return seen


def inputs(count: int, shape: tuple[int, ...] = (2, 5, 8)) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    return [{"x": torch.randn(shape, generator=generator)} for _ in range(count)]


def assert_same(ours: list[Tensor], plain: list[Tensor]) -> None:
    assert len(ours) == len(plain)
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one, other)


def test_training_is_the_same_bit_for_bit() -> None:
    plain, ours, stack = pair()
    calls = inputs(6)
    assert_same(steps(ours, calls), steps(plain, calls))
    assert stack.record.replays == 4 * 3
    assert stack.record.calls == {"before it was recorded": 2 * 3}


def test_dropout_draws_the_numbers_of_the_program() -> None:
    plain, ours, stack = pair(dropout=0.5)
    calls = inputs(6)
    assert_same(steps(ours, calls), steps(plain, calls))
    assert stack.record.replays == 12


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation(mode: Any) -> None:
    plain, ours, stack = pair()
    for call in inputs(5):
        with mode():
            assert torch.equal(ours.eval()(**call), plain.eval()(**call))
    assert stack.record.replays == 9


def test_masks_are_copied_once_for_all_blocks_and_anew_when_they_change() -> None:
    plain, ours, stack = pair()
    calls = inputs(8)
    shared = torch.rand(2, 5, 1)
    for at, call in enumerate(calls):
        call["mask"] = shared if at < 5 else torch.rand(2, 5, 1)
    assert_same(steps(ours, calls), steps(plain, calls))
    assert stack.record.replays == 18
    recordings = [one for block in stack.blocks for one in block._known.values()]
    assert len(recordings) == 3
    assert len({id(one.inputs[1].buffer) for one in recordings}) == 1
    with torch.no_grad():
        for value in (1.0, 2.0, 3.0, 4.0):
            shared.data.fill_(value)
            assert torch.equal(ours(calls[0]["x"], shared), plain(calls[0]["x"], shared))


def test_plain_values_and_shapes_are_kinds_of_their_own() -> None:
    plain, ours, stack = pair()
    calls = [
        {**one, "scale": scale}
        for few in zip(inputs(4), inputs(4, (1, 5, 8)), strict=True)
        for one in few
        for scale in (1.0, 2.0)
    ]
    assert_same(steps(ours, calls), steps(plain, calls))
    assert stack.record.replays == 4 * 2 * 3
    assert len(stack.record.signatures) == 2


def freeze(model: Any, at: int) -> None:
    if at == 4:
        model.blocks[1].up.weight.requires_grad_(False)


def replace_data(model: Any, at: int) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def replace_once(model: Any, at: int) -> None:
    if at == 4:
        model.blocks[0].down.weight.data = model.blocks[0].down.weight.data * 2


def load(model: Any, at: int) -> None:
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})


def other_part(model: Any, at: int) -> None:
    if at == 4:
        model.blocks[2].norm = nn.Identity()


def other_number(model: Any, at: int) -> None:
    if at == 4:
        model.blocks[2].norm.eps = 0.5


def other_mode(model: Any, at: int) -> None:
    model.train(at % 2 == 0)


def other_part_mode(model: Any, at: int) -> None:
    if at >= 4:
        model.blocks[0].dropout.eval()


def hook_inside(model: Any, at: int) -> None:
    if at == 4:
        model.blocks[1].up.register_forward_hook(lambda m, a, y: y * 2)


def hook_on_it(model: Any, at: int) -> None:
    if at == 4:
        model.blocks[1].register_forward_pre_hook(lambda m, a: (a[0] * 2, *a[1:]))


def backward_hook(model: Any, at: int) -> None:
    if at == 4:
        model.blocks[1].register_full_backward_hook(lambda m, i, o: (i[0] * 2, *i[1:]))


def forward_of_its_own(model: Any, at: int) -> None:
    if at == 4:
        given = model.blocks[1].up.forward
        model.blocks[1].up.forward = lambda x: given(x) * 2


def another_class(model: Any, at: int) -> None:
    if at == 4:
        model.blocks[1].norm.__class__ = type("Norm", (nn.LayerNorm,), {"forward": lambda self, x: x * 3})


CHANGES = [
    freeze,
    replace_data,
    replace_once,
    load,
    other_part,
    other_number,
    other_mode,
    other_part_mode,
    hook_inside,
    hook_on_it,
    backward_hook,
    forward_of_its_own,
    another_class,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_is_changed_computes_what_it_is_now(change: Any) -> None:
    plain, ours, stack = pair(dropout=0.5)
    calls = inputs(9)
    assert_same(steps(ours, calls, each=change), steps(plain, calls, each=change))
    assert stack.record.replays or change is replace_data


def test_gradients_accumulate_over_steps() -> None:
    plain, ours, stack = pair()
    for model in (plain, ours):
        for call in inputs(7):
            model(**call).square().sum().backward()
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in plain.parameters()])
    assert stack.record.replays == 15


def test_two_forwards_before_their_backwards() -> None:
    plain, ours, stack = pair(dropout=0.5)
    found = []
    for model in (plain, ours):
        torch.manual_seed(3)
        for one, other in zip(inputs(8)[::2], inputs(8)[1::2], strict=True):
            (model(**one) * model(**other)).sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert_same(*found)
    assert stack.record.calls["the call before waits for its backward"] >= 3


def test_a_backward_twice_and_through_a_backward() -> None:
    plain, ours, _ = pair()
    found = []
    for model in (plain.double(), ours.double()):
        seen = []
        for call in inputs(8):
            x = call["x"].double().requires_grad_()
            out = model(x).square().sum()
            (first,) = torch.autograd.grad(out, x, create_graph=True)
            first.square().sum().backward()
            seen += [first.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
        for call in inputs(5):
            loss = model(call["x"].double()).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
            seen += [p.grad.clone() for p in model.parameters()]
        found.append(seen)
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_autograd_says_what_it_says() -> None:
    plain, ours, stack = pair()
    steps(ours, inputs(4))
    for model in (plain, ours):
        loss = model(**inputs(1)[0]).sum()
        with torch.no_grad():
            model.blocks[0].down.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        loss = model(**inputs(1)[0]).sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert stack.record.replays > 6


def test_a_forward_without_a_backward_blocks_nothing() -> None:
    plain, ours, stack = pair()
    calls = inputs(12)
    for call in calls:
        assert torch.equal(ours(**call), plain(**call))
    assert stack.record.replays == 30
    kept = [ours(**call) for call in calls]  # all of them are alive
    assert_same(kept, [plain(**call) for call in calls])
    assert_same(steps(ours, calls), steps(plain, calls))


def test_results_stay_what_they_were() -> None:
    _, ours, _ = pair()
    with torch.no_grad():
        for call in inputs(3):
            ours(**call)
        first, second = (ours.blocks[0](call["x"]) for call in inputs(2))
        assert not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    torch.manual_seed(0)
    plain = Checkpointed(dropout=0.5)
    ours = copy.deepcopy(plain)
    stack = put_in(ours.blocks)
    calls = inputs(6)
    assert_same(steps(ours, calls), steps(plain, calls))
    assert bool(stack.record.replays) is reentrant


class Counter(Block):
    def __init__(self) -> None:
        super().__init__()
        self.count, self.seen = 0, []

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.count += 1
        return super().forward(x) * self.count


class Lists(Counter):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.seen.append(x.shape)
        return Block.forward(self, x) * len(self.seen)


class InPlace(Counter):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return Block.forward(self, x.mul_(2))


class Same(Counter):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x[:, :3]


class Strange(Counter):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(x=Block.forward(self, x))


class Draws(Counter):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return Block.forward(self, x) * random.random() * float(numpy.random.rand())


class Collects(Block):
    """Adds to a list and a dictionary of its caller's."""

    def forward(self, x: Tensor, kept: list[Tensor], named: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        y = Block.forward(self, x)
        kept.append(y)
        named["last"] = y
        return y


@pytest.mark.parametrize("grad", [False, True])
def test_lists_and_dictionaries_of_the_caller_get_what_is_put_in(grad: bool) -> None:
    torch.manual_seed(0)
    plain = Collects()
    ours = copy.deepcopy(plain)
    stack = put_in([ours])
    for _ in range(6):
        x = torch.randn(2, 5, 8)
        found = []
        for model in (plain, ours):
            kept: list[Tensor] = []
            named = {"first": x}
            with torch.set_grad_enabled(grad):
                model(x, kept, named)
            assert [*named] == ["first", "last"]
            assert kept[0] is named["last"]
            found.append(kept[0].detach())
        assert torch.equal(*found)
    assert stack.record.replays == 0
    assert stack.record.calls["its forward changes a list or dictionary that it is given"] == 4


class Beside(Counter):
    """Its weight is kept in a list as well, as those of recurrent layers are."""

    def __init__(self) -> None:
        super().__init__()
        self._flat = [self.up.weight]

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return Block.forward(self, x) + self._flat[0].sum()


@pytest.mark.parametrize("kind", [Counter, Lists, InPlace, Same, Strange, Draws])
def test_blocks_that_do_more_than_compute_are_left_alone(kind: Any) -> None:
    torch.manual_seed(0)
    plain, x = kind(), torch.randn(2, 5, 8)
    ours = copy.deepcopy(plain)
    stack = put_in([ours])
    with torch.no_grad():
        for at in range(7):
            random.seed(at)
            numpy.random.seed(at)
            one = ours(x.clone())
            random.seed(at)
            numpy.random.seed(at)
            other = plain(x.clone())
            one, other = (one.x, other.x) if kind is Strange else (one, other)
            assert torch.equal(one, other)
    assert stack.record.replays == 0
    if kind not in (Lists, Draws):
        assert ours.count == plain.count
    assert len(stack.record.calls) == 2


def test_a_weight_that_is_kept_twice_has_its_gradients() -> None:
    torch.manual_seed(0)
    plain, x = Beside(), torch.randn(2, 5, 8)
    ours = copy.deepcopy(plain)
    ours._flat, stack = [ours.up.weight], put_in([ours])
    for model in (plain, ours):
        for _ in range(5):
            model(x).sum().backward()
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in plain.parameters()])
    assert stack.record.replays == 0


def test_an_exception_leaves_the_block_as_it_was() -> None:
    class Fails(Block):
        fails = False

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            if self.fails:
                raise ValueError("on purpose")
            return super().forward(x)

    torch.manual_seed(0)
    block, x = Fails(), torch.randn(2, 5, 8)
    stack = put_in([block])
    with torch.no_grad():
        for at in range(10):
            block.fails = at in (2, 5)
            if block.fails:
                with pytest.raises(ValueError, match="on purpose"):
                    block(x)
            else:
                assert torch.equal(block(x), block._call_impl(x))
    assert stack.record.replays


def test_copies_and_pickles_have_no_recordings(tmp_path: Any) -> None:
    _, ours, _ = pair()
    steps(ours, inputs(4))
    for copied in (copy.deepcopy(ours), copy.copy(ours.blocks[0])):
        assert all(m._compiled_call_impl is None for m in copied.modules() if m is not ours.blocks[0])
    torch.save(ours, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert torch.equal(loaded(**inputs(1)[0]), ours(**inputs(1)[0]))
    assert ours.state_dict().keys() == loaded.state_dict().keys()


def test_recordings_go_with_their_model() -> None:
    _, ours, stack = pair()
    steps(ours, inputs(4))
    held = stack.record.held
    assert held > 0
    gone = weakref.ref(ours.blocks[0])
    del ours
    gc.collect()
    assert gone() is None
    assert stack.record.held == 0
    assert stack.pool.used == 0


def test_no_more_memory_than_allowed() -> None:
    plain, ours, _ = pair()
    stack = put_in(ours.blocks, limit=2500)
    calls = inputs(6)
    assert_same(steps(ours, calls), steps(plain, calls))
    assert stack.pool.used <= 2500
    assert 0 < stack.record.replays < 12
    assert any("memory" in reason for reason in stack.record.calls)


@pytest.mark.parametrize("times", [1, 2])
def test_all_is_given_back_where_memory_ran_short(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing where somebody else had it, who has given it back since."""
    plain, ours, stack = pair()
    calls = inputs(12)

    def each(model: nn.Module, at: int) -> None:
        time.sleep(0.06)  # more than between two looks
        if at == 6 and model is ours:
            monkeypatch.setattr(EmulatedGraphs, "short", times)

    assert_same(steps(ours, calls, each=each), steps(plain, calls, each=each))
    gc.collect()
    if times == 2:
        assert stack.record.replays == 10 * 3
        return
    assert stack.record.replays == 4 * 3
    assert (stack.record.held, stack.pool.used) == (0, 0)
    assert stack.record.calls["given back: the device ran out of memory"] == 4 * 3


def test_calls_that_are_never_replayed_cost_little() -> None:
    plain, ours, stack = pair()
    x = inputs(1)[0]["x"]
    with torch.no_grad():
        for at in range(60):
            options = {"scale": 1.0 + at}
            assert torch.equal(ours(x, **options), plain(x, **options))
        assert len(stack.kinds) <= 64
        for _ in range(60):
            assert torch.equal(ours(x), plain(x))
    assert stack.record.replays > 3 * 20


class Quantity(float):
    """No plain number: what it does to a tensor is its own."""


def test_after_calls_that_cannot_be_replayed_the_others_are_again() -> None:
    plain, ours, stack = pair()
    x = inputs(1)[0]["x"]
    with torch.no_grad():
        for _ in range(4):
            ours(x)
        before = stack.record.replays
        for _ in range(50):
            assert torch.equal(ours(x, scale=Quantity(2)), plain(x, scale=2))
        assert stack.record.calls["an argument is a Quantity"] == 50 * 3
        for _ in range(60):
            assert torch.equal(ours(x), plain(x))
    assert stack.record.replays >= before + 3 * 25


def test_more_kinds_than_are_kept_in_mind() -> None:
    plain, ours, stack = pair()
    with torch.no_grad():
        for length in range(1, 150):
            x = torch.ones(1, length, 8)
            assert torch.equal(ours(x), plain(x))
        for _ in range(4):
            assert torch.equal(ours(x), plain(x))
    assert stack.record.replays == 3 * 3


def test_weights_that_are_frozen_between_a_forward_and_its_backward() -> None:
    plain, ours, stack = pair()
    for model in (plain, ours):
        for _ in range(4):
            model(inputs(1)[0]["x"]).sum().backward()
        model.zero_grad()
        loss = model(inputs(1)[0]["x"]).sum()
        model.blocks[1].norm.weight.requires_grad_(False)
        loss.backward()
    others = [[p.grad for n, p in m.named_parameters() if n != "blocks.1.norm.weight"] for m in (ours, plain)]
    assert_same(*others)
    assert stack.record.replays == 9


class Moody(Block):
    """Has two results, of which a caller may use either."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        y = Block.forward(self, x)
        return y * 2, y * 3


def test_backwards_of_other_results_and_what_they_held() -> None:
    torch.manual_seed(0)
    plain, x = Moody(), torch.randn(2, 5, 8)
    ours = copy.deepcopy(plain)
    stack = put_in([ours])
    for model in (plain, ours):
        for at in range(12):
            model(x)[at % 2].sum().backward()
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in plain.parameters()])
    assert stack.record.replays > 3
    assert stack.record.calls["its backward is not the same again and again"]
    gc.collect()
    assert (stack.record.held, stack.pool.used) == (0, 0)


def test_the_report_counts_the_memory_of_backwards() -> None:
    _, ours, stack = pair()
    with torch.no_grad():
        for call in inputs(4):
            ours(**call)
    forwards = stack.record.held
    steps(ours, inputs(4))
    assert stack.record.held == stack.pool.used
    assert stack.record.held > 2 * forwards
