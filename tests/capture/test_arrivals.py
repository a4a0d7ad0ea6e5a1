"""Models get what stands in for the calls of their blocks as they come."""

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
from typing import Any

import pytest
import torch
from torch import nn

from twinkle.kernel import kernelize_model, unkernelize_model
from twinkle.runtime import runtime

from . import nets
from .nets import GPT, Block, Flux, VisionTransformer, tokens
from .passing import begin, calls, records


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize(
    "make", [lambda: GPT(3), lambda: VisionTransformer(3)], ids=["lists", "by a function"]
)
def test_a_plain_model_is_found_at_the_end_of_its_construction(make: Any) -> None:
    kind = type(make())  # the class is asked about before its first construction, which counts
    assert len(records()) == 1
    model = make()
    assert len(calls(model)) == 3
    assert records()[0].model == kind.__name__


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
    assert [(record.model, record.container) for record in records()] == [
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
    [record] = records()
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
    assert records() == []
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
    assert done.stdout == "4 False\ntorch.Size([2, 5, 16])\n", done.stderr


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
