"""The slots of blocks are filled as models come, and nothing else of them changes."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from twinkle import config
from twinkle.apply import captures
from twinkle.apply.activation import start
from twinkle.capture.install import Installed, install, remove
from twinkle.capture.slot import NAME, Slot, fill, slot_of
from twinkle.capture.state import captured
from twinkle.kernel import kernelize_model, kernelized, unkernelize_model
from twinkle.runtime import runtime

from . import nets
from .nets import GPT, Block, Flux, VisionTransformer, tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from twinkle.capture.state import StackRecord


class Passing(Slot):
    """Calls its module as it is, and counts."""

    __slots__ = ("calls", "closed", "module", "record")

    def __init__(self, module: nn.Module, record: StackRecord) -> None:
        self.module = weakref.ref(module)
        self.record = record
        self.calls = 0
        self.closed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module()
        self.calls += 1
        self.record.replayed()
        return module._call_impl(*args, **kwargs)

    def close(self) -> None:
        self.closed = True


def passing(blocks: Sequence[nn.Module], record: StackRecord) -> list[Slot]:
    return [Passing(block, record) for block in blocks]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, clean_registry: Any, clean_hooks: None) -> None:
    """A machine whose torch is built for CUDA and has a device, as far as captures ask."""
    monkeypatch.setattr(captures, "begins", lambda: runtime.options.capture != "off")
    monkeypatch.setattr(captures, "has_device", lambda: True)
    runtime.of(Installed).calls_for = passing


def begin(**variables: str) -> None:
    """Open a door: constructions and pickles are watched from now on."""
    start(config.load(["auto"], {f"TWINKLE_{name}": text for name, text in variables.items()}), door="api")


@pytest.fixture
def active(device: None) -> None:
    begin(KERNELS="off")


def calls(model: nn.Module) -> list[int]:
    """How often each filled slot was called, in order."""
    return [call.calls for call in map(slot_of, model.modules()) if isinstance(call, Passing)]


# --- by hand --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("device")
def test_each_block_gets_its_call_and_its_record() -> None:
    model = GPT(3)
    blocks = install(model)
    assert blocks == list(model.transformer["h"])  # type: ignore[call-overload]
    model(tokens())
    assert calls(model) == [1, 1, 1]
    [record] = captured().stacks
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
    assert captured().stacks[0].models == 1


@pytest.mark.usefixtures("device")
def test_blocks_that_come_later_are_filled_and_the_model_counts_once() -> None:
    model = GPT(2)
    install(model)
    layers: Any = model.transformer["h"]
    layers.append(Block())
    assert install(model) == [layers[2]]
    assert [(record.blocks, record.models) for record in captured().stacks] == [(2, 1), (3, 0)]


@pytest.mark.usefixtures("device")
def test_models_of_a_class_share_a_record() -> None:
    install(GPT(3))
    install(GPT(3))
    install(GPT(2))
    assert [(record.blocks, record.models) for record in captured().stacks] == [(3, 2), (2, 1)]


@pytest.mark.usefixtures("device")
def test_what_the_user_has_compiled_keeps_its_call() -> None:
    model = GPT(3)
    block: Any = model.transformer["h"][1]  # type: ignore[index]
    block.compile()
    theirs = block._compiled_call_impl
    assert len(install(model)) == 2
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
    ours: Any = [slot_of(block) for block in model.modules() if slot_of(block) is not None]
    assert remove(model) == 3
    assert all(call.closed for call in ours)
    assert remove(model) == 0
    for module, was in zip(model.modules(), before, strict=True):
        assert {key: value for key, value in vars(module).items() if key != "_tw_call"} == was
    assert install(model) == []
    assert len(install(model, again=True)) == 3


@pytest.mark.usefixtures("device")
def test_a_block_around_others_takes_their_calls_over() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x))  # type: ignore[no-any-return]

    stages = [Stage(), Stage()]
    assert len(install(stages[0])) == 2
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
    assert len(install(model)) == 2
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
    [record] = captured().stacks
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
    assert len(install(model, again=True)) == 2


# --- as they come ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize(
    "make", [lambda: GPT(3), lambda: VisionTransformer(3)], ids=["lists", "by a function"]
)
def test_a_plain_model_is_found_at_the_end_of_its_construction(make: Any) -> None:
    kind = type(make())  # the class is asked about before its first construction, which counts
    assert len(captured().stacks) == 1
    model = make()
    assert len(calls(model)) == 3
    assert captured().stacks[0].model == kind.__name__


@pytest.mark.usefixtures("active")
def test_the_outermost_model_has_the_blocks() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.models = nn.ModuleDict({"first": GPT(2)})
            assert calls(self) == []
            self.later = nn.Linear(2, 2)

    outer = Outer()
    assert len(calls(outer)) == 2
    assert [(record.model, record.container) for record in captured().stacks] == [
        ("Outer", "models.first.transformer.h")
    ]


@pytest.mark.usefixtures("active")
def test_a_model_inside_one_that_makes_no_lists_is_found() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = GPT(2)

    assert len(calls(Outer())) == 2


@pytest.mark.usefixtures("active")
def test_a_subclass_is_complete_before_it_is_looked_at() -> None:
    class Longer(GPT):
        def __init__(self) -> None:
            super().__init__(2)
            self.transformer["h"].append(Block())  # type: ignore[union-attr, operator]

    assert len(calls(Longer())) == 3


@pytest.mark.usefixtures("active")
def test_a_subclass_without_a_constructor_is_found() -> None:
    class Same(GPT):
        pass

    assert len(calls(Same(2))) == 2
    assert len(calls(Same(2))) == 2


@pytest.mark.usefixtures("active")
def test_a_list_of_a_class_of_its_own_is_found() -> None:
    class Layers(nn.ModuleList):
        pass

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Layers([Block(), Block()])

    assert len(calls(Net())) == 2


@pytest.mark.usefixtures("active")
def test_lists_that_methods_and_functions_of_functions_make_are_found() -> None:
    class Clones(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = self.make()

        def make(self) -> nn.Module:
            return nets.clones(Block(), 2)

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    assert len(calls(Clones())) == 2
    before = vars(Products)["__init__"]
    Products()
    assert vars(Products)["__init__"] is not before  # it was asked about, and has its own back
    assert isinstance(vars(Products)["__init__"], types.FunctionType)


@pytest.mark.usefixtures("active")
def test_an_encoder_of_torch_is_found() -> None:
    made = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    assert len(calls(made)) == 2


@pytest.mark.usefixtures("active")
def test_a_model_of_transformers_is_found() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
    )
    model = transformers.LlamaForCausalLM(config)
    model(tokens())
    assert calls(model) == [1, 1]
    [record] = captured().stacks
    assert (record.model, record.container) == ("LlamaForCausalLM", "model.layers")
    assert len(calls(copy.deepcopy(model))) == 2


@pytest.mark.usefixtures("active")
def test_a_model_of_transformers_from_a_pickle_is_found() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    model = pickle.loads(pickle.dumps(transformers.BertModel(config)))
    model(tokens())
    assert calls(model) == [1, 1]


@pytest.mark.usefixtures("active")
def test_copies_and_pickles_get_theirs_again() -> None:
    model = GPT(2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other(tokens()).shape == (2, 5, 16)
        assert calls(other) == [1, 1]
    assert calls(model) == [0, 0]


@pytest.mark.usefixtures("active")
def test_copies_of_what_was_taken_out_have_none() -> None:
    model = unkernelize_model(GPT(2))
    assert calls(copy.deepcopy(model)) == []


@pytest.mark.usefixtures("active")
def test_a_thread_constructs_its_own_models() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(calls(GPT(2))))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])
            thread.start()
            thread.join()

    assert len(calls(Outer())) == 2
    assert found == [[0, 0]]


@pytest.mark.usefixtures("active")
def test_a_constructor_that_raises_leaves_nothing_behind() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        Broken()
    assert captured().stacks == []
    assert len(calls(GPT(2))) == 2


@pytest.mark.usefixtures("active")
def test_a_class_is_not_held() -> None:
    def once() -> weakref.ref[type]:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList([Block(), Block()])

        assert len(calls(Net())) == 2
        return weakref.ref(Net)

    gone = once()
    gc.collect()
    assert gone() is None


def test_classes_get_their_constructors_back(device: None, request: pytest.FixtureRequest) -> None:
    before = {cls: vars(cls)["__init__"] for cls in (GPT, Flux, nn.TransformerEncoder, nn.Transformer)}
    request.getfixturevalue("active")
    GPT(2)
    Flux()
    nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    assert vars(GPT)["__init__"] is not before[GPT]
    runtime.reset()
    assert {cls: vars(cls)["__init__"] for cls in before} == before


@pytest.mark.usefixtures("device")
def test_off_installs_nothing() -> None:
    runtime.options.capture = "off"
    assert calls(kernelize_model(GPT(2))) == []
    begin(CAPTURE="off")
    assert calls(GPT(2)) == []
    assert calls(copy.deepcopy(GPT(2))) == []


@pytest.mark.usefixtures("device")
def test_beside_the_embedded_kernels() -> None:
    begin()
    model = GPT(2)
    expected = model(tokens())
    assert calls(model) == [1, 1]
    assert torch.equal(copy.deepcopy(model)(tokens()), expected)
    assert calls(model) == [1, 1]


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


# --- on a machine with a device, and without ----------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device of CUDA")
def test_a_device_is_found_and_stays_as_it_is() -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(nets.__file__).parent)!r})
import torch
from twinkle.capture.install import Installed
from twinkle.capture.slot import Slot, slot_of
from twinkle.runtime import runtime
class Passing(Slot):
    def __init__(self, module): self.module = module
    def __call__(self, *args, **kwargs): return self.module._call_impl(*args, **kwargs)
runtime.of(Installed).calls_for = lambda blocks, record: [Passing(block) for block in blocks]
from nets import GPT, tokens
model = GPT(3)
print(sum(slot_of(module) is not None for module in model.modules()), torch.cuda.is_initialized())
print(model.cuda()(tokens().cuda()).shape)
"""
    command = [sys.executable, "-m", "twinkle", "run", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "3 False\ntorch.Size([2, 5, 16])\n", done.stderr


PROGRAM = """
import sys
import torch
from torch import nn
from nets import GPT, tokens
model = GPT(3)
model(tokens()).sum().backward()
import copy, pickle
copy.deepcopy(model)(tokens())
pickle.loads(pickle.dumps(model))(tokens())
print([name for name in sys.modules if name.startswith("twinkle.capture")])
print("twinkle.apply.captures" in sys.modules)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to capture with")
@pytest.mark.parametrize("config", ["auto", None])
def test_on_a_machine_without_a_device_nothing_of_the_room_is_imported(config: str | None) -> None:
    folder = str(Path(nets.__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r})\n{PROGRAM}"
    command = [sys.executable, "-m", "twinkle", "run", "-c", code]
    if config is None:
        command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"[]\n{config is not None}\n", done.stderr
