"""The slots of blocks are filled and emptied, and nothing else of them changes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from twinkle.capture.install import Installed, install, remove
from twinkle.capture.slot import NAME, Slot, fill, slot_of
from twinkle.kernel import kernelize_model, kernelized, unkernelize_model
from twinkle.runtime import runtime

from .nets import GPT, Block, VisionTransformer, tokens
from .passing import blocks, calls, records

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from twinkle.capture.state import StackRecord


# --- by hand --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("device")
def test_each_block_gets_its_call_and_its_record() -> None:
    model = GPT(3)
    filled = install(model)
    assert slot_of(model) is not None
    assert blocks(filled) == list(model.transformer["h"])  # type: ignore[call-overload]
    model(tokens())
    assert calls(model) == [1, 1, 1]
    [record] = records()
    assert (record.model, record.container, record.block, record.blocks) == (
        "GPT",
        "transformer.h",
        "Block",
        3,
    )
    assert (record.models, record.replays) == (1, 3)


@pytest.mark.usefixtures("device")
def test_numbers_and_gradients_are_the_same() -> None:
    plain = GPT(3)
    ours = copy.deepcopy(plain)
    install(ours)
    for model in (plain, ours):
        model(tokens()).square().mean().backward()
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.equal(mine.grad, other.grad)
    assert calls(ours) == [1, 1, 1]


@pytest.mark.usefixtures("device")
def test_installing_twice_is_installing_once() -> None:
    model = GPT(3)
    install(model)
    before = [slot_of(block) for block in model.modules()]
    assert install(model) == []
    assert [slot_of(block) for block in model.modules()] == before
    assert records()[0].models == 1


@pytest.mark.usefixtures("device")
def test_blocks_that_come_later_are_filled_and_the_model_counts_once() -> None:
    model = GPT(2)
    install(model)
    layers: Any = model.transformer["h"]
    layers.append(Block())
    assert install(model) == [layers[2]]
    assert [(record.blocks, record.models) for record in records()] == [(2, 1), (3, 0)]


@pytest.mark.usefixtures("device")
def test_models_of_a_class_share_a_record() -> None:
    install(GPT(3))
    install(GPT(3))
    install(GPT(2))
    assert [(record.blocks, record.models) for record in records()] == [(3, 2), (2, 1)]


@pytest.mark.usefixtures("device")
def test_what_the_user_has_compiled_keeps_its_call() -> None:
    model = GPT(3)
    block: Any = model.transformer["h"][1]  # type: ignore[index]
    block.compile()
    theirs = block._compiled_call_impl
    assert len(blocks(install(model))) == 2
    assert block._compiled_call_impl is theirs
    remove(model)
    assert block._compiled_call_impl is theirs


@pytest.mark.usefixtures("device")
def test_a_block_that_is_compiled_later_loses_ours() -> None:
    model = GPT(2)
    install(model)
    block: Any = model.transformer["h"][0]  # type: ignore[index]
    block.compile(backend="eager")
    model(tokens())
    assert calls(model) == [1]
    assert install(model) == []


@pytest.mark.usefixtures("device")
def test_removing_leaves_the_model_as_it_was() -> None:
    model = GPT(3)
    before = [dict(vars(module)) for module in model.modules()]
    install(model)
    ours: Any = [slot_of(block) for block in blocks([*model.modules()]) if slot_of(block) is not None]
    assert remove(model) == 4
    assert all(call.closed for call in ours)
    assert remove(model) == 0
    for module, was in zip(model.modules(), before, strict=True):
        assert {key: value for key, value in vars(module).items() if key != "_tw_call"} == was
    assert install(model) == []
    assert len(blocks(install(model, again=True))) == 3


@pytest.mark.usefixtures("device")
def test_a_block_around_others_takes_their_calls_over() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x))  # type: ignore[no-any-return]

    stages = [Stage(), Stage()]
    assert len(blocks(install(stages[0]))) == 2
    inner: Any = [slot_of(block) for block in stages[0].blocks]
    model = nn.Sequential(*stages)
    assert install(model) == stages
    assert [call.closed for call in inner] == [True, True]
    model(torch.ones(2, 8))
    assert calls(model) == [1, 1]
    assert install(stages[1]) == []


@pytest.mark.usefixtures("device")
def test_a_model_that_goes_away_is_not_held() -> None:
    model = GPT(2)
    install(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- what must not notice -------------------------------------------------------------------------


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_knows_nothing_of_twinkle(protocol: int) -> None:
    model = GPT(2)
    plain = pickle.dumps(model, protocol)
    install(model)
    assert pickle.dumps(model, protocol) == plain


class Whole(Block):
    """Keeps all of its ``__dict__``, as some wrappers do."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


@pytest.mark.usefixtures("device")
def test_a_class_with_copies_of_its_own_is_left_alone() -> None:
    class Copied(Block):
        def __copy__(self) -> Block:
            return self

    for cls in (Whole, Copied):
        assert install(nn.ModuleList([cls(), cls()])) == []


@pytest.mark.usefixtures("device")
def test_a_dict_that_is_copied_or_pickled_holds_no_call() -> None:
    block = Block()
    fill(block, Slot())
    text = pickle.dumps(vars(block))
    assert b"twinkle" not in text.replace(b"twinkle.hooks", b"")
    assert pickle.loads(text)["_compiled_call_impl"] is None
    assert copy.deepcopy(vars(block))["_compiled_call_impl"] is None
    assert copy.copy(slot_of(block)) is None


@pytest.mark.usefixtures("device")
def test_a_shallow_copy_calls_itself() -> None:
    model = GPT(2)
    install(model)
    block: Any = model.transformer["h"][0]  # type: ignore[index]
    twin = copy.copy(block)
    assert torch.equal(twin(torch.ones(2, 8)), block(torch.ones(2, 8)))
    assert slot_of(twin) is None
    assert calls(model) == [1, 0]


@pytest.mark.usefixtures("device")
def test_replicas_of_data_parallel_call_themselves() -> None:
    model = GPT(2)
    original = nn.Module._replicate_for_data_parallel
    install(model)
    block: Any = model.transformer["h"][0]  # type: ignore[index]
    replica = block._replicate_for_data_parallel()
    assert replica._is_replica
    assert slot_of(replica) is None
    assert slot_of(block) is not None
    runtime.reset()
    assert nn.Module._replicate_for_data_parallel is original
    assert NAME not in torch.jit._recursive.ignored_attributes


@pytest.mark.usefixtures("device")
def test_dynamo_passes_over_the_slot() -> None:
    model = GPT(2)
    expected = model(tokens())
    install(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(tokens()), expected)
    assert calls(model) == [0, 0]
    assert torch.equal(model(tokens()), expected)
    assert calls(model) == [1, 1]


@pytest.mark.usefixtures("device")
def test_a_model_may_be_compiled_in_place() -> None:
    model = GPT(2)
    expected = model(tokens())
    install(model)
    model.compile(backend="eager", fullgraph=True)
    assert torch.equal(model(tokens()), expected)
    assert calls(model) == [0, 0]


@pytest.mark.usefixtures("device")
def test_export_follows_the_blocks() -> None:
    model = GPT(2).eval()
    expected = model(tokens())
    install(model)
    exported = torch.export.export(model, (tokens(),))
    assert torch.equal(exported.module()(tokens()), expected)


@pytest.mark.usefixtures("device")
def test_tracers_follow_the_blocks() -> None:
    model = VisionTransformer(2)
    images = torch.ones(1, 3, 8, 8)
    expected = model(images)
    install(model)
    traced: Any = torch.jit.trace(model, (images,))
    assert torch.equal(traced(images), expected)
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(images), expected)
    assert "blocks.0.up" in str(graph.graph) or "blocks_0_up" in str(graph.graph)


@pytest.mark.usefixtures("device")
def test_torchscript_compiles_the_blocks() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x)  # type: ignore[no-any-return]

    model = Chain()
    x = torch.ones(2, 8)
    expected = model(x)
    assert len(blocks(install(model))) == 2
    assert torch.equal(torch.jit.script(model)(x), expected)


@pytest.mark.usefixtures("device")
def test_functional_call_reaches_the_slot_with_the_weights_in_place() -> None:
    model = GPT(2)
    install(model)
    weights = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    assert torch.func.functional_call(model, weights, (tokens(),)).abs().max() == 0
    assert calls(model) == [1, 1]


@pytest.mark.usefixtures("device")
def test_hooks_and_state_dict_are_as_before() -> None:
    model = GPT(2)
    names = list(model.state_dict())
    shown = repr(model)
    install(model)
    seen = []
    model.transformer["h"][0].register_forward_hook(lambda *_: seen.append("hook"))  # type: ignore[index]
    model(tokens())
    assert seen == ["hook"]
    assert list(model.state_dict()) == names
    assert repr(model) == shown


@pytest.mark.usefixtures("device")
def test_lora_after_construction() -> None:
    peft = pytest.importorskip("peft")
    model = GPT(2)
    install(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up", "down"]))
    adapted(tokens()).sum().backward()
    assert calls(adapted) == [1, 1]
    assert any(value.grad is not None for name, value in adapted.named_parameters() if "lora_B" in name)


@pytest.mark.usefixtures("device")
def test_hooks_of_accelerate_run() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = GPT(2)
    install(model)
    seen = []

    class Hook(hooks.ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(module)
            return args, kwargs

    block: Any = model.transformer["h"][0]  # type: ignore[index]
    hooks.add_hook_to_module(block, Hook())
    model(tokens())
    assert seen == [block]
    hooks.remove_hook_from_module(block)
    model(tokens())
    assert seen == [block]
    assert calls(model) == [2, 2]


@pytest.mark.usefixtures("device")
def test_checkpointed_layers_of_transformers_and_generation() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32)
    plain = transformers.GPT2LMHeadModel(config).eval()
    ours = copy.deepcopy(plain)
    install(ours)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(tokens(), **options), plain.generate(tokens(), **options))
    assert calls(ours) == [4, 4]
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, ours):
        model.train(model is ours)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert calls(ours) == [6, 6]  # the forward, and its recomputation
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


@pytest.fixture
def one_rank(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("device", "one_rank")
def test_ddp_calls_the_blocks() -> None:
    model = GPT(2)
    install(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(tokens()).sum().backward()
    assert calls(wrapped) == [1, 1]
    assert install(wrapped) == []
    [record] = records()
    assert record.container == "transformer.h"


@pytest.mark.usefixtures("device", "one_rank")
def test_fsdp_calls_the_blocks_and_they_stay_alike() -> None:
    from torch.distributed.fsdp import fully_shard

    model = GPT(2)
    install(model)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for block in model.transformer["h"]:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(tokens()).sum().backward()
    assert calls(model) == [1, 1]
    assert install(model) == []
    remove(model)
    assert len(blocks(install(model, again=True))) == 2


# --- the API --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("device")
def test_kernelizing_by_name_puts_them_in_and_takes_them_out() -> None:
    model = kernelize_model(GPT(2))
    assert len(calls(model)) == 2
    unkernelize_model(model)
    assert calls(model) == []
    kernelize_model(model)
    assert len(calls(model)) == 2
    assert len(calls(kernelize_model(copy.deepcopy(model)))) == 2


@pytest.mark.usefixtures("device")
def test_a_with_block_takes_back_what_it_put_in() -> None:
    model = GPT(2)
    with kernelized(model):
        assert len(calls(model)) == 2
    assert calls(model) == []
    install(model)
    with kernelized(model):
        pass
    assert len(calls(model)) == 2


@pytest.mark.usefixtures("active")
def test_what_fails_is_reported_and_the_program_goes_on() -> None:
    def broken(blocks: Sequence[nn.Module], record: StackRecord) -> list[Slot]:
        raise RuntimeError("no graphs today")

    runtime.of(Installed).calls_for = broken
    model = GPT(2)
    assert calls(model) == []
    assert any("no graphs today" in remark for remark in runtime.session.remarks)
