"""Numbers that are read while something is recorded: those that are the same at every call, and no others."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twinkle.capture.answers import Answer, answered, followed
from twinkle.capture.guard import Draw, Draws
from twinkle.capture.signature import call_of

from .emulated import EmulatedGraphs, put_in
from .nets import GPT, tokens
from .test_models import built, evaluated, trained

CPU = torch.device("cpu")


class Reads(nn.Module):
    """Reads numbers of several origins."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.calls = 0

    def forward(self, x: Tensor, read: Any) -> Tensor:
        self.calls += 1
        return x * float(read(self, x))


ORIGINS: dict[str, tuple[Any, bool]] = {
    "positions": (lambda self, x: (torch.arange(5, device=x.device).diff() == 1).all(), True),
    "a mask of ones": (lambda self, x: torch.ones(x.shape, device=x.device).bool().all(), True),
    "filled in place": (lambda self, x: torch.empty(3, device=x.device).fill_(2.0).add_(1).sum(), True),
    "the shape of the input": (lambda self, x: torch.zeros(x.shape, device=x.device).numel(), True),
    "the input": (lambda self, x: x.sum(), False),
    "a weight": (lambda self, x: self.weight.sum(), False),
    "random": (lambda self, x: torch.rand(2, device=x.device).sum(), False),
    "written to by the input": (lambda self, x: torch.zeros(x.shape, device=x.device).copy_(x).sum(), False),
    "a view that is written to": (
        lambda self, x: (lambda z: (z[:1].add_(x.flatten()[0]), z.sum())[1])(torch.zeros(3, device=x.device)),
        False,
    ),
    "out of a product with the input": (
        lambda self, x: torch.mul(torch.ones(3), x.flatten()[:3], out=torch.zeros(3)).sum(),
        False,
    ),
    "constants written into one another": (
        lambda self, x: torch.add(torch.ones(3), 1, out=torch.zeros(3)).sum(),
        True,
    ),
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_where_a_number_comes_from(origin: str) -> None:
    read, constant = ORIGINS[origin]
    module, x = Reads(), torch.arange(6.0).view(2, 3)
    call = call_of((x, None), {}, CPU, training=True)
    call.args = (x, read)
    state = torch.get_rng_state()
    found = followed(module, call, EmulatedGraphs(CPU)).answers
    assert [one.is_constant for one in found] == ([] if origin == "the shape of the input" else [constant])
    assert module.calls == 0, "no trace is left"
    assert torch.equal(torch.get_rng_state(), state)


def test_an_input_that_is_known_is_a_constant() -> None:
    module, x = Reads(), torch.ones(2, 3)
    call = call_of((x, None), {}, CPU, training=True)
    call.args = (x, ORIGINS["the input"][0])
    assert [one.is_constant for one in followed(module, call, EmulatedGraphs(CPU), [x]).answers] == [True]


@pytest.mark.parametrize("value", [1, 0])
def test_what_lies_beside_a_mask_is_not_known(value: int) -> None:
    class Asks(Reads):
        def forward(self, mask: Tensor, other: Any) -> Tensor:
            return mask * float(mask.all()) * float(other.all())

    packed = torch.ones(2, 2, 3, dtype=torch.int64)
    packed[0, 1, 2] = value
    mask, other = packed
    call = call_of((mask, other), {}, CPU, training=True)
    constants, masks = ([mask], []) if value else ([], [mask])
    found = followed(Asks(), call, EmulatedGraphs(CPU), constants, masks).answers
    assert [one.is_constant for one in found] == [True, False]


class Elsewhere(EmulatedGraphs):
    """Of a device that the CPU's numbers are not drawn on."""

    def __init__(self) -> None:
        super().__init__(torch.device("meta"))


DRAWN: dict[str, tuple[Any, list[Draw] | None]] = {
    "below 0": (lambda: bool(torch.rand([]) < 0.0), [Draw(1, torch.float32)]),
    "below 0, the integer": (lambda: bool(torch.rand([]) < 0), [Draw(1, torch.float32)]),
    "not below 0": (lambda: bool(torch.rand(3).ge(-1).all()), [Draw(3, torch.float32)]),
    "several": (lambda: [torch.rand([]) < 0 for _ in range(3)], [Draw(3, torch.float32)]),
    "of two dtypes": (
        lambda: (torch.rand(2) < 0, torch.rand([], dtype=torch.float64) < 0),
        [Draw(2, torch.float32), Draw(1, torch.float64)],
    ),
    "below something": (lambda: bool(torch.rand([]) < 0.1), None),
    "above 0": (lambda: bool(torch.rand([]) > 0), None),
    "a number": (lambda: torch.rand([]).item(), None),
    "twice itself": (lambda: bool(torch.rand([]) * 2 < 0), None),
    "written to": (lambda: bool(torch.rand([]).sub_(1) < 0), None),
    "below a number that was drawn": (lambda: bool(torch.rand([]) < torch.rand([])), None),
    "a generator of its own": (lambda: torch.rand(1, generator=torch.Generator()) < 0, None),
    "others": (lambda: torch.randn([]) < 0, None),
    "an order": (lambda: torch.randperm(4), None),
}


@pytest.mark.parametrize("what", DRAWN)
def test_numbers_that_are_drawn_on_the_cpu(what: str) -> None:
    draw, expected = DRAWN[what]
    module, x = Reads(), torch.ones(2, 3)
    call = call_of((x, None), {}, CPU, training=True)
    call.args = (x, lambda self, x: (draw(), 1.0)[1])
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert followed(module, call, Elsewhere()).draws == expected
    assert torch.equal(torch.get_rng_state(), state)
    if expected is not None:
        draws = Draws()
        draw()
        assert not draws.put_back(expected), "what was drawn, and no more"
        draw()
        torch.rand(1)
        assert draws.put_back(expected)
        draw()
        random.random()
        assert draws.put_back(expected)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("family", ["OPT", "Bart"])
def test_layers_that_are_never_left_out(family: str) -> None:
    plain, ours, [blocks, *_] = built(family)
    model = ours.model.decoder
    trunk = put_in([model], is_trunk=True)
    trunk.pool = blocks.pool
    for work in (trained, evaluated):
        # The gradients that an encoder's output gets are summed in another order.
        torch.testing.assert_close(work(ours), work(plain), rtol=1e-4, atol=1e-6)
    assert trunk.record.replays >= 2, trunk.record.calls


def test_the_answers_are_read_in_their_order() -> None:
    yes, three = Answer(True, torch.bool, True), Answer(3, torch.int64, True)
    with answered([yes, three], CPU):
        assert bool(torch.tensor(False))
        assert torch.tensor(8).item() == 3
    assert torch.tensor(8).item() == 8
    with pytest.raises(RuntimeError, match="another number"), answered([yes], CPU):
        torch.tensor(8).item()
    with pytest.raises(RuntimeError, match="fewer"), answered([yes], CPU):
        pass
    with (
        pytest.raises(RuntimeError, match="another number"),
        answered([yes._replace(is_constant=False)], CPU),
    ):
        bool(torch.tensor(True))
    assert "item" not in vars(Tensor)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is recorded may read a number."""
    monkeypatch.setattr(EmulatedGraphs, "waits", False)


class Asking(GPT):
    def __init__(self, constant: bool) -> None:
        super().__init__(3)
        self.constant = constant

    def forward(self, tokens: Tensor) -> Tensor:
        out = super().forward(tokens)
        asked = torch.arange(4) if self.constant else tokens
        return out * 2 if (asked >= 0).all() else out


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("constant", [True, False])
def test_a_trunk_that_reads(constant: bool) -> None:
    torch.manual_seed(0)
    plain = Asking(constant)
    ours = copy.deepcopy(plain)
    trunk, blocks = put_in([ours], is_trunk=True), put_in(ours.transformer.h)  # type: ignore[arg-type]
    for _ in range(6):
        found = []
        for model in (plain, ours):
            model(tokens()).square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            model.zero_grad()
        assert all(map(torch.equal, *found))
    assert trunk.record.replays == (4 if constant else 0)
    assert blocks.record.replays == (0 if constant else 4 * 3)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPT2"])
def test_models_that_ask_whether_their_positions_are_in_a_row(family: str) -> None:
    plain, ours, _ = built(family)
    trunk = put_in([ours.base_model], is_trunk=True)
    for model in (plain, ours):
        model.config.use_cache = False
        model.forward = without_mask(model.forward)
    for work in (trained, evaluated):
        assert all(map(torch.equal, work(ours), work(plain)))
    assert trunk.record.replays == 2 + 2, trunk.record.calls


def without_mask(forward: Any) -> Any:
    def call(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return call


MASKS: dict[str, tuple[Any, list[bool]]] = {
    "all of it": (lambda mask: mask.all(), [True]),
    "all of it as bool": (lambda mask: mask.bool().all(), [True]),
    "its count": (lambda mask: mask.bool().sum() == mask.numel(), [True]),
    "its count, of a copy": (lambda mask: mask.to(torch.bool).clone().sum() == mask.numel(), [True]),
    "all rows": (lambda mask: mask.bool()[:, : mask.shape[1]].sum() == mask.numel(), [True]),
    "some rows": (lambda mask: mask.bool()[:, :2].all(), [False]),
    "rows by index": (lambda mask: mask[:, torch.arange(3)].bool().all(), [False]),
    "another count": (lambda mask: mask.bool().sum() == 3, [False]),
    "the count itself": (lambda mask: mask.bool().sum(), [False]),
    "a sum of numbers": (lambda mask: mask.sum() == mask.numel(), [False]),
    "any": (lambda mask: mask.any(), [False]),
    "its opposite": (lambda mask: (~mask.bool()).all(), [False]),
    "a copy that is written to": (lambda mask: mask.bool().logical_not_().all(), [False]),
}


@pytest.mark.parametrize("what", MASKS)
def test_what_is_asked_of_a_mask_with_zeros(what: str) -> None:
    asked, constant = MASKS[what]

    class Asks(Reads):
        def forward(self, x: Tensor, read: Any) -> Tensor:
            return x * float(asked(x))

    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    call = call_of((mask, None), {}, CPU, training=True)
    found = followed(Asks(), call, EmulatedGraphs(CPU), (), [mask]).answers
    assert [one.is_constant for one in found] == constant


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPTNeoX"])
def test_masks_of_ones_and_masks_with_zeros_are_kinds(family: str) -> None:
    plain, ours, [blocks] = built(family)
    trunk = put_in([ours.base_model], is_trunk=True)
    trunk.pool = blocks.pool
    ids = torch.arange(2, 26).view(2, 12)
    padded = [at for at in range(20) if at % 3 == 1]
    replays = [0]
    for at in range(20):
        mask = torch.ones_like(ids)
        if at in padded:
            mask[0, 5 + at % 5 :] = 0
        found = []
        for model in (plain, ours):
            torch.manual_seed(at)
            loss = model.train()(input_ids=ids + at, attention_mask=mask, labels=ids).loss
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
            model.zero_grad(set_to_none=at % 2 == 0)
        assert all(map(torch.equal, *found)), at
        replays.append(trunk.record.replays)
    replayed = {at for at in range(20) if replays[at + 1] > replays[at]}
    assert replayed >= {*range(3, 20)}, (replays, trunk.record.calls)
    assert blocks.record.replays == 0, (blocks.record.calls, trunk.record.calls, replays)


@pytest.mark.usefixtures("strict")
def test_calls_without_a_mask_keep_what_was_recorded() -> None:
    plain, ours, [blocks] = built("Llama")
    trunk = put_in([ours.base_model], is_trunk=True)
    trunk.pool = blocks.pool
    ids = torch.arange(2, 26).view(2, 12)
    for model in (plain, ours):
        model.eval()
    with torch.no_grad():
        for at in range(16):
            given = {"input_ids": (ids + at) % 64}
            if at % 4 > 1:
                given["attention_mask"] = torch.ones_like(ids)
            assert torch.equal(ours(**given).logits, plain(**given).logits), at
    assert {key: one.most for key, one in trunk.record.signatures.items()} == {
        ("int64[2, 12]", "inference"): 1,
        ("int64[2, 12] and 1 more", "inference"): 1,
    }
    assert trunk.record.replays == 16 - 2 - 3, trunk.record.calls


def test_a_mask_is_waited_for_once() -> None:
    pool = put_in([nn.Linear(2, 2)]).pool
    assert pool is not None
    mask = torch.ones(2, 3, dtype=torch.int64)
    assert pool.contents(mask) == "ones"
    mask[0, 1] = 0
    assert pool.contents(mask) == "zeros"
    mask[0, 1] = 2
    assert pool.contents(mask) == "else"
    for other in (None, 3, torch.ones(2, 3), torch.ones(2, 3, 4, dtype=torch.int64)):
        assert pool.contents(other) == "else"
    assert pool.contents(torch.ones(1, 4, dtype=torch.bool)) == "ones"
    assert pool.contents(torch.zeros(1, 4, dtype=torch.bool)) == "zeros"
