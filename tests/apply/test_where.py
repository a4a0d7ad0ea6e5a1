"""Registrations for places in a model: what is chosen however a layer comes to its place."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Program

MODEL = """
    import copy, gc, os, torch
    from torch import nn
    from pkg.layers import Scale
    x = torch.zeros(4)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Scale()
        def forward(self, x):
            return self.mlp(x)

    class Net(nn.Module):
        def __init__(self, size=4):
            super().__init__()
            self.layers = nn.ModuleList([Block() for _ in range(size)])
        def forward(self, x):
            return "".join(str(int(layer(x)[0].item())) for layer in self.layers)

    class Other(Net):
        pass

    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner
        def forward(self, x):
            return self.module(x)
"""
LAYER = """
    [layers.Plus]
    target = "pkg.layers:Scale"
    repo_path = "kernels"
    package_name = "my_kernels"
    where = WHERE
"""


def config(where: object, more: str = "") -> str:
    return more + LAYER.replace("WHERE", json.dumps(where))


PLACES = [
    ("layers.*.mlp", "1111"),
    ("layers.0", "1000"),
    ("!layers.0", "0111"),
    ("!layers.[-1]", "1110"),
    (["layers", "!layers.-1", "!layers.0.mlp"], "0110"),
    ("layers[1:3].mlp", "0110"),
    ("Net:layers.1", "0100"),
    ("Outer:layers.1", "0000"),
    ("**", "1111"),
]


@pytest.fixture
def program(program_with_torch: Program) -> Program:
    return program_with_torch


@pytest.mark.parametrize(("where", "expected"), PLACES)
def test_layers_are_chosen_by_their_place(program: Program, where: object, expected: str) -> None:
    assert program.run(MODEL + "\n    print(Net()(x))", config(where)).stdout == expected + "\n"


def test_places_hold_however_a_layer_comes_to_them(program: Program) -> None:
    code = """
    net = Net()
    print("built", net(x))
    net.layers.append(Block())
    print("appended", net(x))
    net.layers[1] = Block()
    net.layers.add_module("4", Block())
    print("replaced", net(x))
    print("copied", copy.deepcopy(net)(x))
    print("wrapped", Outer(net)(x))
    net.layers = net.layers[:3]
    print("cut", net(x))
    whole = nn.Sequential(Block(), Block())
    net.layers = whole
    print("set", net(x))
    bare = Net(0)
    bare.layers = nn.Sequential()
    for _ in range(3):
        bare.layers.append(Block())
    print("grown", bare(x))
    clones = Net(0)
    clones.layers = nn.ModuleList([copy.deepcopy(Block()) for _ in range(3)])
    print("clones", clones(x))
    with torch.device("meta"):
        meta = Net()
    meta.to_empty(device="cpu")
    print("meta", meta.load_state_dict(Net().state_dict()) and meta(x))
    """
    expected = {
        "built": "1110",
        "appended": "11110",
        "replaced": "11110",
        "copied": "11110",
        "wrapped": "11110",
        "cut": "110",
        "set": "10",
        "grown": "110",
        "clones": "110",
        "meta": "1110",
    }
    done = program.run(MODEL + code, config(["layers.*.mlp", "!layers.[-1]"]))
    assert dict(line.split() for line in done.stdout.splitlines()) == expected


def test_the_last_of_modules_that_are_in_nothing_else(program: Program) -> None:
    code = """
    whole = nn.Sequential(*[Scale() for _ in range(4)])
    print([int(layer(x)[0].item()) for layer in whole])
    whole.append(Scale())
    print([int(layer(x)[0].item()) for layer in whole])
    """
    assert program.run(MODEL + code, config("[-1]")).stdout == "[0, 0, 0, 1]\n[0, 0, 0, 0, 1]\n"
    assert program.run(MODEL + code, config("[::-2]")).stdout == "[0, 1, 0, 1]\n[1, 0, 1, 0, 1]\n"


def test_a_layer_alone_has_no_place_but_that_of_everything(program: Program) -> None:
    code = MODEL + "\n    print(int(Scale()(x)[0].item()))"
    assert program.run(code, config("layers.*")).stdout == "0\n"
    assert program.run(code, config("**")).stdout == "1\n"
    assert program.run(code, config("!layers.0")).stdout == "1\n"


def test_a_module_under_two_names_is_chosen_by_either(program: Program) -> None:
    code = """
    net, shared = Net(), Scale()
    for block in net.layers:
        block.mlp = shared
    print(net(x))
    """
    assert program.run(MODEL + code, config("layers.2")).stdout == "1111\n"
    assert program.run(MODEL + code, config("!layers.2")).stdout == "1111\n"


def test_one_of_two_models_is_chosen_by_its_class(program: Program) -> None:
    code = MODEL + "\n    print(Net()(x), Other()(x), Outer(Other())(x))"
    assert program.run(code, config("Other:layers.*")).stdout == "0000 1111 1111\n"
    assert program.run(code, config("!Other:**")).stdout == "1111 0000 0000\n"


def test_what_is_taken_out_of_its_model_keeps_what_it_had(program: Program) -> None:
    code = """
    blocks = list(Net().layers)
    gc.collect()
    print([int(torch.compile(block, backend="eager")(x)[0].item()) for block in blocks])
    """
    assert program.run(MODEL + code, config("layers.1")).stdout == "[0, 1, 0, 0]\n"


def test_compiled_models_have_their_places(program: Program) -> None:
    code = """
    net = Net()
    compiled = torch.compile(net, backend="eager")
    print([int(layer(x)[0].item()) for layer in compiled.layers])
    for n, layer in enumerate(net.layers):
        net.layers[n] = torch.compile(layer, backend="eager")
    print(net(x))
    """
    done = program.run(MODEL + code, config("layers.1.mlp"))
    assert done.stdout == "[0, 1, 0, 0]\n0100\n"


def test_the_program_has_the_last_word(program: Program) -> None:
    code = """
    from twinkle.kernel import kernelize_model, unkernelize_model
    net = Net()
    unkernelize_model(net)
    print(net(x), Outer(net)(x))
    kernelize_model(net, only="layers.0")
    print(net(x), Outer(net)(x))
    """
    assert program.run(MODEL + code, config("layers.[:2]")).stdout == "0000 0000\n1000 1000\n"


def test_a_registration_for_places_goes_before_one_for_all(program: Program) -> None:
    both = """
    [layers.Two]
    target = "pkg.layers:Scale"
    layer_impl = "impl:Two"
    """
    (program.root / "site" / "impl.py").write_text(
        "from torch import nn\nclass Two(nn.Module):\n    def forward(self, x):\n        return x + 2\n"
    )
    code = MODEL + "\n    print(Net()(x))"
    assert program.run(code, config("layers.0", both)).stdout == "1222\n"
    assert program.run(code, LAYER.replace("WHERE", '"layers.0"') + both).stdout == "1222\n"


def test_the_report_counts_what_was_chosen_and_left_out(program: Program) -> None:
    (binding,) = program.bindings(MODEL + "\n    net = Net(); net(x)", config("!layers.0"))
    assert (binding["state"], binding["instances"]) == ("active", 3)
    assert 'where = "!layers.0": 3 chosen, 1 left out' in binding["notes"]


def test_a_place_that_means_no_layer_is_said_at_the_end(program: Program) -> None:
    code = MODEL + "\n    print(Net()(x))"
    done = program.run(code, config("layer.*.mlp"), TWINKLE_LOG="warning")
    assert done.stdout == "0000\n"
    (line,) = done.stderr.splitlines()
    assert 'where = "layer.*.mlp" means none of the 4 layers that were met' in line
    assert "layers.*.mlp" in line
    assert "twinkle.toml:2" in line
    done = program.run(code, config(["layers.*", "!layer.0"]))
    (line,) = done.stderr.splitlines()
    assert '"!layer.0" means no layer' in line
    done = program.run(code, config(["layers.*", "!layer.0"]), check=False, TWINKLE_STRICT="1")
    assert done.returncode == 1


def test_every_place_that_means_something_ends_without_a_word(program: Program) -> None:
    done = program.run(MODEL + "\n    print(Net()(x))", config(["layers.*", "!layers.0"]), TWINKLE_STRICT="1")
    assert (done.stdout, done.stderr) == ("0111\n", "")


def test_a_variable_registers_for_places(program: Program) -> None:
    keys = 'target = "pkg.layers:Scale", layer_impl = "my_kernels.layers:Plus", where = "layers.0"'
    code = "    import sys; sys.path.append('kernels')\n" + MODEL + "\n    print(Net()(x))"
    assert program.run(code, TWINKLE_LAYERS=f"Plus = {{ {keys} }}").stdout == "1000\n"


MATCHED = """
    [layers.Norm]
    match = "rms_norm"
    layer_impl = "impl:Zero"
    where = "layers.1"
    verify = "off"
"""


def test_recognised_layers_are_chosen_by_their_place(program: Program) -> None:
    (program.root / "site" / "impl.py").write_text(
        "from torch import nn\nclass Zero(nn.Module):\n    def forward(self, x):\n        return x * 0\n"
    )
    (program.root / "site" / "norms.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class RMSNorm(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.weight = nn.Parameter(torch.full((4,), 1.5))\n"  # not 1, which may come out below
        "    def forward(self, x):\n"
        "        variance = x.pow(2).mean(-1, keepdim=True)\n"
        "        return self.weight * (x * torch.rsqrt(variance + 1e-6))\n"
    )
    code = """
    from norms import RMSNorm
    net = Net()
    for block in net.layers:
        block.mlp = RMSNorm()
    print(net(torch.ones(4) + 1))
    """
    assert program.run(MODEL + code, MATCHED).stdout == "1011\n"


TINY = """
    import os, torch, tempfile
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(0)
    small = Qwen3Config(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                        num_key_value_heads=2, head_dim=16, vocab_size=64)
    from twinkle.swap.layers import placed
    def shown(model):
        names = [name for name, module in model.named_modules() if placed(module) is not None]
        return json.dumps(names)
"""
QWEN = """
    [layers.MLP]
    target = "transformers.models.qwen3.modeling_qwen3:Qwen3MLP"
    layer_impl = "impl:MLP"
    where = ["model.layers.*.mlp", "!model.layers.[-1]"]
"""


def test_models_of_transformers_and_what_wraps_them(program: Program) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    (program.root / "site" / "impl.py").write_text(
        "from torch import nn\nclass MLP(nn.Module):\n    def forward(self, x):\n        return x * 0\n"
    )
    code = """
    model = Qwen3ForCausalLM(small)
    print(shown(model))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = Qwen3ForCausalLM.from_pretrained(folder)
    print(shown(loaded))
    from peft import LoraConfig, get_peft_model
    print(shown(get_peft_model(loaded, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))))
    """
    done = program.run(TINY + code, QWEN)
    names = ["model.layers.0.mlp", "model.layers.1.mlp"]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines == [names, names, [f"base_model.model.{name}" for name in names]]


def test_embedded_kernels_keep_to_their_places(program: Program) -> None:
    pytest.importorskip("transformers")
    code = TINY + "\n    print(shown(Qwen3ForCausalLM(small)))"
    everywhere = json.loads(program.run(code, TWINKLE_KERNELS="auto").stdout)
    assert any(name.startswith("model.layers.0") for name in everywhere)
    done = program.run(code, TWINKLE_KERNELS="auto", TWINKLE_WHERE="!model.layers.[0], !model.norm")
    left = [n for n in everywhere if not n.startswith("model.layers.0") and n != "model.norm"]
    assert json.loads(done.stdout) == left
    done = program.run(code, '[twinkle]\nkernels = "auto"\nwhere = "model.layers.1"\n')
    assert json.loads(done.stdout) == [n for n in everywhere if n.startswith("model.layers.1")]


MISTAKES = [
    (
        '[layers.P]\ntarget = "p:C"\nlayer_impl = "k:K"\nwhere = "a..b"\n',
        "twinkle.toml:4",
        "where: not a place",
    ),
    ('[layers.P]\nlayer_impl = "k:K"\nwhere = "a"\n', "twinkle.toml:3", "where without a target"),
    (
        '[functions.f]\ntarget_module = "p"\nfunc_impl = "k:f"\nwhere = "a"\n',
        "twinkle.toml:4",
        "functions have no place in a model",
    ),
    ("[twinkle]\nwhere = 3\n", "twinkle.toml:2", "where: wrong type"),
]


@pytest.mark.parametrize(("text", "line", "what"), MISTAKES)
def test_a_mistake_stands_at_its_line(program: Program, text: str, line: str, what: str) -> None:
    done = program.run("", text, check=False)
    assert line in done.stderr
    assert what in done.stderr
