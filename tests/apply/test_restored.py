"""Layers and models that come from pickles get the kernels that constructed ones get."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Program

CONFIG = """
    [layers.Plus]
    target = "pkg.layers:Scale"
    repo_path = "kernels"
    package_name = "my_kernels"
"""
SAVE = """
    import pickle, torch
    from torch import nn
    from pkg.layers import Scale
    net = nn.Sequential(Scale(), nn.Sequential(Scale()))
    torch.save(net, "net.pt")
    pickle.dump(net, open("net.pkl", "wb"))
    copyreg = pickle.dumps(net, protocol=2)
    open("old.pkl", "wb").write(copyreg)
"""
LOAD = """
    import copy, pickle, torch
    x = torch.zeros(4)
    def which(net):
        return "".join(str(int(layer(x)[0].item())) for layer in (net[0], net[1][0]))
"""
ROADS = {
    "torch.load": "torch.load('net.pt', weights_only=False)",
    "pickle": "pickle.load(open('net.pkl', 'rb'))",
    "protocol 2": "pickle.load(open('old.pkl', 'rb'))",
    "twice": "(pickle.load(open('net.pkl', 'rb')), pickle.load(open('net.pkl', 'rb')))[1]",
    "a copy": "copy.deepcopy(pickle.load(open('net.pkl', 'rb')))",
    "sent": "pickle.loads(pickle.dumps(pickle.load(open('net.pkl', 'rb'))))",
}


@pytest.fixture
def program(program_with_torch: Program) -> Program:
    return program_with_torch


@pytest.mark.parametrize("saved", ["plainly", "with kernels"])
@pytest.mark.parametrize("road", ROADS)
def test_layers_of_a_file_run_their_kernel(program: Program, road: str, saved: str) -> None:
    off = {"TWINKLE_DISABLE": "all"} if saved == "plainly" else {}
    program.run(SAVE, CONFIG, **off)
    assert b"twinkle" not in (program.root / "net.pkl").read_bytes()
    assert program.run(f"{LOAD}    print(which({ROADS[road]}))\n", CONFIG).stdout == "11\n"
    assert program.run(f"{LOAD}    print(which({ROADS[road]}))\n", TWINKLE_DISABLE="all").stdout == "00\n"


def test_copies_of_what_a_program_took_kernels_out_of_have_none(program: Program) -> None:
    code = """
    import copy, torch
    from pkg.layers import Scale
    from twinkle.kernel import unkernelize_model
    layer = unkernelize_model(Scale())
    print(int(layer(torch.zeros(4))[0]), int(copy.deepcopy(layer)(torch.zeros(4))[0]))
    """
    assert program.run(code, CONFIG).stdout == "0 0\n"


def test_a_worker_runs_the_kernel_of_a_layer_that_was_sent_to_it(program: Program) -> None:
    (program.root / "site" / "work.py").write_text(
        "import torch\ndef work(rank, layer):\n    print(int(layer(torch.zeros(4))[0].item()), flush=True)\n"
    )
    code = """
    import torch.multiprocessing as mp
    from pkg.layers import Scale
    import work
    layer = Scale()
    work.work(0, layer)
    mp.spawn(work.work, (layer,), nprocs=1)
    """
    (program.root / "twinkle.toml").write_text("\n".join(line.strip() for line in CONFIG.splitlines()))
    done = program.run(code, CONFIG, TWINKLE_CONFIG=str(program.root / "twinkle.toml"))
    assert done.stdout == "1\n1\n"


def test_a_class_gets_its_own_function_back(program: Program) -> None:
    code = """
    from torch import nn
    import inspect, twinkle
    given = nn.Module.__setstate__
    assert inspect.signature(given).parameters.keys() == {"self", "state"}
    twinkle.runtime.runtime.reset()
    assert type(nn.Module.__dict__["__setstate__"]).__name__ == "function"
    """
    program.run(code, CONFIG)


MODEL = """
    import io, pickle, torch
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    tokens = torch.arange(8)[None]
"""


def test_a_model_of_a_file_is_planned_as_a_whole(program: Program) -> None:
    pytest.importorskip("transformers")
    make = """
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=64, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    torch.save(model, "model.pt")
    """
    end = """
    for _ in range(2):
        output = model(tokens, labels=tokens)
    print(type(output.logits).__name__, f"{output.loss.item():.5f}")
    """
    variables = {"TWINKLE_CONFIG": "auto", "TWINKLE_SIZES": "all", "TRITON_INTERPRET": "0"}
    plain = program.run(MODEL + make + end, TWINKLE_CONFIG="auto", TWINKLE_KERNELS="off").stdout.split()
    load = "    model = torch.load('model.pt', weights_only=False)\n"
    ours = program.run(MODEL + load + end.rstrip() + "\n    report()\n", **variables).stdout.splitlines()
    assert ours[0].split() == ["DeferredLogits", plain[1]]
    assert '"active"' in ours[1]
    assert "without kernels" not in ours[1]
