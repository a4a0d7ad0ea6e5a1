"""The module that calls the blocks is recorded with all of them, or they are."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twinkle.capture import block as the_module
from twinkle.capture.kinds import Kind
from twinkle.capture.recording import GIVEN, NO_ROOM
from twinkle.capture.results import flattened
from twinkle.capture.stacks import stacks_of
from twinkle.capture.surroundings import as_if_run

from .emulated import put_in
from .nets import GPT, UNet, VisionTransformer, tokens
from .test_models import FAMILIES, adapted, built, evaluated, generated, looked_at, trained

transformers = pytest.importorskip("transformers")


def with_trunks(family: str) -> tuple[Any, Any, list[Any], list[Any]]:
    """A plain model, the same with captured trunks, the stacks of these and those of the blocks in them."""
    plain, ours, blocks = built(family)
    trunks = {id(stack.trunk[1]): stack.trunk[1] for stack in stacks_of(ours) if stack.trunk is not None}
    return plain, ours, [put_in([one], is_trunk=True) for one in trunks.values()], blocks


def same(model: Any, found: list[Tensor], expected: list[Tensor]) -> bool:
    """Bit for bit, but for the sums of gradients of what a decoder and its encoder are both given."""
    if model.config.is_encoder_decoder:
        return all(torch.allclose(*both, 1e-4, 1e-5) for both in zip(found, expected, strict=True))
    return all(torch.equal(*both) for both in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_it_computes(family: str) -> None:
    plain, ours, trunks, blocks = with_trunks(family)
    for work in (trained, evaluated):
        assert same(plain, work(ours), work(plain))
    for stack in trunks:
        assert stack.record.replays >= 2 + 2, stack.record.calls
        assert not any("cannot be recorded" in reason for reason in stack.record.calls), stack.record.calls
    if not plain.config.is_encoder_decoder:
        mine = {"training": 2, "evaluation": 2}
        assert sum(stack.record.replays for stack in trunks) == sum(mine.values())
        assert all(stack.record.replays == 0 for stack in blocks), "they are called within it"


def test_a_cache_that_is_given_is_left_to_the_blocks() -> None:
    plain, ours, [trunk], [stack] = with_trunks("Llama")
    found = []
    for model in (plain, ours):
        model.eval()
        seen = []
        with torch.no_grad():
            for _ in range(5):
                cache = transformers.DynamicCache(config=model.config)
                ids = torch.arange(2, 10)[None]
                seen.append(model(input_ids=ids, past_key_values=cache).logits)
                seen.append(model(input_ids=ids[:, :1], past_key_values=cache).logits)
        found.append(seen)
    assert all(map(torch.equal, *found))
    assert trunk.record.replays == 0
    assert trunk.record.calls[GIVEN] > 0
    assert stack.record.replays > 0


def test_two_caches_of_replays_are_two() -> None:
    plain, ours, [trunk], _ = with_trunks("Gemma3Text")
    ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        for _ in range(4):
            first = ours.eval()(input_ids=ids).past_key_values
        assert trunk.record.replays == 2
        second = ours(input_ids=ids + 1).past_key_values
        assert first.layers[0] is not second.layers[0]
        for cache, shift in ((first, 0), (second, 1)):
            expected = plain.eval()(input_ids=ids + shift).past_key_values
            assert [type(layer) for layer in cache.layers] == [type(layer) for layer in expected.layers]
            for mine, theirs in zip(cache.layers, expected.layers, strict=True):
                assert vars(mine).keys() == vars(theirs).keys()
                for name, value in vars(theirs).items():
                    mine_value = vars(mine)[name]
                    is_same = torch.equal if isinstance(value, Tensor) else lambda one, other: one == other
                    assert is_same(mine_value, value), name


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True}, {"num_beams": 2}])
@pytest.mark.parametrize("family", ["Llama", "GPT2", "T5", "Gemma3Text"])
def test_generate(family: str, arguments: dict[str, Any]) -> None:
    plain, ours, _, _ = with_trunks(family)
    assert torch.equal(generated(ours, arguments), generated(plain, arguments))


@pytest.mark.parametrize("work", [looked_at, adapted])
def test_what_is_asked_for_later(work: Any) -> None:
    plain, ours, _, _ = with_trunks("Llama")
    assert all(map(torch.equal, work(ours), work(plain)))


def steps(model: Any, count: int = 6, change: Any = None) -> list[Tensor]:
    torch.manual_seed(4)
    seen = []
    for at in range(count):
        if change is not None:
            change(model, at)
        loss = model(tokens()).square().mean()
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        model.zero_grad(set_to_none=at % 2 == 0)
    return seen


def plain_models() -> tuple[Any, Any, Any, Any]:
    """nanoGPT's form, whose trunk is the model: plain, captured, and the stacks of trunk and blocks."""
    torch.manual_seed(0)
    plain: Any = GPT(3)
    ours = copy.deepcopy(plain)
    return plain, ours, put_in([ours], is_trunk=True), put_in(ours.transformer.h)


def test_a_model_may_be_its_own_trunk() -> None:
    plain, ours, trunk, blocks = plain_models()
    assert all(map(torch.equal, steps(ours), steps(plain)))
    assert (trunk.record.replays, blocks.record.replays) == (4, 0)


@pytest.mark.parametrize("place", ["trunk", "block", "part"])
def test_hooks_are_called(place: str) -> None:
    plain, ours, trunk, _ = plain_models()
    calls: list[str] = []

    def change(model: Any, at: int) -> None:
        if at == 4:
            module = {"trunk": model, "block": model.transformer.h[1], "part": model.transformer.h[1].up}[
                place
            ]
            module.register_forward_hook(lambda *given: calls.append(place))

    assert all(map(torch.equal, steps(ours, change=change), steps(plain, change=change)))
    assert len(calls) == 2 * 2
    assert trunk.record.replays == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.transformer.h.__delitem__(1),
        lambda model: model.transformer.h[0].requires_grad_(False),
        lambda model: setattr(model.transformer.h[2].norm, "eps", 0.1),
        lambda model: setattr(model, "lm_head", nn.Linear(8, 16, bias=False).requires_grad_(False)),
        lambda model: model.double(),
    ],
    ids=["block gone", "frozen", "number", "head", "dtype"],
)
def test_a_model_that_is_changed_computes_what_it_is_now(change: Any) -> None:
    plain, ours, trunk, _ = plain_models()

    def at_four(model: Any, at: int) -> None:
        if at == 4:
            torch.manual_seed(5)
            change(model)

    assert all(map(torch.equal, steps(ours, 9, at_four), steps(plain, 9, at_four)))
    assert trunk.record.replays >= 2 + 2, trunk.record.calls


def test_several_forwards_before_their_backwards_take_the_blocks_as_well() -> None:
    plain, ours, trunk, blocks = plain_models()
    found = []
    for model in (plain, ours):
        seen: list[Tensor] = []
        for _ in range(8):
            sum(model(tokens() // n).square().mean() for n in (1, 2)).backward()
            seen += [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
        found.append(seen)
    assert all(map(torch.equal, *found))
    assert trunk.record.replays > 4
    assert blocks.record.replays > 4


def test_where_it_has_no_room_the_blocks_have() -> None:
    plain, ours, trunk, blocks = plain_models()
    size = sum(p.nbytes for p in ours.parameters())
    trunk.pool.limit = size - 1
    assert all(map(torch.equal, steps(ours), steps(plain)))
    assert trunk.record.replays == 0
    assert trunk.record.calls[NO_ROOM] == 4
    assert blocks.record.replays == 3 * 4


def test_where_the_device_is_the_wall_in_all_of_it_the_blocks_are_left_alone_as_well() -> None:
    plain, ours, trunk, blocks = plain_models()
    why = "not faster here: the device takes 2.00 ms, the host 1.00 ms"

    def at_the_wall(kind: Kind) -> str:
        kind.leave_to_device(why)
        return why

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kind, "decide", at_the_wall)
        expected, found = steps(plain), steps(ours)
    assert all(map(torch.equal, found, expected))
    assert trunk.record.replays == blocks.record.replays == 0
    assert trunk.record.calls[why] == 4
    assert blocks.record.calls[why] == 4 * 3, "what was found of the whole, without a decision of their own"
    assert all(kind.device_is_wall for kind in blocks.kinds.values())


def test_gradients_that_somebody_waits_for_come_block_by_block() -> None:
    plain, ours, trunk, blocks = plain_models()
    found = []
    for model in (plain, ours):
        order: list[str] = []
        for name, weight in model.named_parameters():
            weight.register_post_accumulate_grad_hook(
                lambda weight, name=name, order=order: order.append(name)
            )
        found.append([*steps(model)])
        assert len(order) == 6 * len([*model.parameters()])
    assert all(map(torch.equal, *found))
    assert trunk.record.replays == 0
    assert blocks.record.replays == 3 * 4


@pytest.mark.parametrize(
    ("model", "places"),
    [
        (GPT(3), [""]),
        (VisionTransformer(3), [""]),
        (nn.ModuleList([GPT(2), GPT(2)]), ["0", "1"]),
        (UNet(), [""]),
    ],
    ids=["lists", "a chain", "models in a list", "stages"],
)
def test_who_calls_the_blocks(model: Any, places: list[str]) -> None:
    trunks = [stack.trunk for stack in stacks_of(model)]
    assert list(dict.fromkeys(place for place, _ in trunks)) == places
    assert all(model.get_submodule(place) is trunk for place, trunk in trunks)


def test_results_in_dictionaries_and_outputs_are_made_anew() -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    one, other, given = torch.ones(2), torch.zeros(2), torch.ones(1)
    tensors: list[Tensor] = []
    result = BaseModelOutputWithPast(last_hidden_state=one, hidden_states=(given, {"a": other, "b": 3}))
    rebuild = flattened(result, tensors, {id(given): 0})
    assert len(tensors) == 2
    made = rebuild([one + 1, other + 1], [given + 1])
    assert type(made) is BaseModelOutputWithPast
    assert [*made] == ["last_hidden_state", "hidden_states"]
    assert torch.equal(made.last_hidden_state, one + 1)
    assert made.hidden_states[1]["b"] == 3
    assert made[1][0].item() == 2


def test_a_program_that_is_recorded_is_told_what_it_is_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    theirs, number = torch.cuda.is_current_stream_capturing, torch.tensor
    with as_if_run():
        assert not torch.cuda.is_current_stream_capturing()
        assert torch.equal(torch.tensor([1.0, 2.0]), number([1.0, 2.0]))
    assert torch.cuda.is_current_stream_capturing is theirs
    assert torch.tensor is number


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (0.1, None),
        (0.1, torch.bfloat16),
        (3, None),
        (True, None),
        ([1, 2, 3], None),
        ([[1.5, 2], [3, 4]], torch.float16),
        (-3, torch.float32),
        ([True, False], None),
    ],
)
def test_numbers_that_are_filled_in_are_those_that_would_be_copied(data: Any, dtype: Any) -> None:
    from twinkle.capture import surroundings

    made: list[Any] = []

    def on_the_cpu(*args: Any, **kwargs: Any) -> Tensor:
        kwargs["device"] = "cpu"
        made.append(kwargs)
        return full(*args, **kwargs)

    full = torch.full
    tensor = surroundings.filled(torch.tensor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "full", on_the_cpu)
        found = tensor(data, dtype=dtype, device="cuda")
    expected = torch.tensor(data, dtype=dtype)
    assert made, "it was filled"
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected)


def test_tokens_that_are_a_part_of_others() -> None:
    plain, ours, trunk, _ = plain_models()
    for at in range(5):
        data = torch.arange(at, at + 12)[None] % 16
        with torch.no_grad():
            assert torch.equal(ours(data[:, 1:]), plain(data[:, 1:]))
    assert trunk.record.replays == 3, trunk.record.calls


class VisionConfig:
    def __init__(self) -> None:
        self.scale = 1.0


class WholeConfig:
    def __init__(self) -> None:
        self.vision_config = VisionConfig()


class Scaled(GPT):
    def __init__(self) -> None:
        super().__init__(3)
        self.config = WholeConfig()

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.config.vision_config.scale


def test_a_number_in_a_configuration_within_another() -> None:
    torch.manual_seed(0)
    plain = Scaled()
    ours = copy.deepcopy(plain)
    trunk = put_in([ours], is_trunk=True)

    def change(model: Any, at: int) -> None:
        if at == 4:
            model.config.vision_config.scale = 3.0

    assert all(map(torch.equal, steps(ours, change=change), steps(plain, change=change)))
    assert trunk.record.replays == 2, trunk.record.calls


def test_a_trunk_that_cannot_be_recorded_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours, trunk, blocks = plain_models()
    tried: list[int] = []

    def refuse(self: Any, tokens: Tensor) -> Tensor:
        if the_module.is_capturing():
            tried.append(1)
            raise RuntimeError("not while something is captured")
        return GPT.forward(self, tokens)

    for model in (plain, ours):
        model.forward = types.MethodType(refuse, model)
    assert all(map(torch.equal, steps(ours), steps(plain)))
    assert len(tried) == 1
    assert blocks.record.replays == 4 * 3
    [reason] = [reason for reason in trunk.record.calls if "recorded: " in reason]
    assert reason.startswith("it cannot be recorded: RuntimeError: not while something is captured (at ")
