"""Layers that come without their ``__init__`` get their kernels at their first call, or are named."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import pytest

from .conftest import Program

if TYPE_CHECKING:
    from pathlib import Path

    from stem import Stem

CONFIG = """
    [layers.Plus]
    target = "pkg.layers:Scale"
    repo_path = "kernels"
    package_name = "my_kernels"
"""
BARE = """
    import copy, gc, pickle, torch
    from torch import nn
    from pkg.layers import Scale

    x = torch.zeros(4)

    def bare(cls=Scale):
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.weight = nn.Parameter(torch.ones(4))
        return layer

    def which(layer):
        return str(int(layer(x)[0].item()))
"""
ROADS = """
    from twinkle.kernel import unkernelize_model
    from twinkle.swap.front import Front
    from twinkle.swap.layers import placed

    held = []

    class Inherits(Scale):
        pass

    class Overrides(Scale):
        def forward(self, x):
            return super().forward(x) + 4

    class OwnState(Scale):
        def __setstate__(self, state):
            self.__dict__.update(state)

    class Reduced(Scale):
        def __reduce_ex__(self, protocol):
            return made, (self.__dict__,)

    def made(state):
        layer = Reduced.__new__(Reduced)
        layer.__dict__.update(state)
        return layer

    def left_behind(cls):
        # What it was made from is gone, and its mark is a text of its own, whose meaning somebody holds.
        layer = cls()
        held.append(placed(layer))
        made = pickle.loads(pickle.dumps(layer))
        del layer
        gc.collect()
        Front.of(cls).let_go()
        return made

    def from_a_template():
        layer = Scale.__new__(Scale)
        layer.__dict__.update(Scale().__dict__)
        return layer

    def other_class():
        layer = nn.Identity()
        layer.__class__ = Scale
        layer.weight = nn.Parameter(torch.ones(4))
        return layer

    def from_elsewhere():
        layer = bare()
        layer.__dict__["_tw"] = "00000000:1"
        return layer

    def wrapped(layer):
        old = layer.forward
        layer.forward = lambda *given: old(*given)
        return layer

    def called(layer):
        layer(x)
        return layer

    for name, cls in {"pickled": Scale, "sets its state": OwnState, "reduced": Reduced}.items():
        layer = left_behind(cls)
        print(f"{name}, left behind", which(layer), which(layer), sep=":")

    for name, layer in {
        "new": bare(),
        "from a template": from_a_template(),
        "inherits the forward": bare(Inherits),
        "another class": other_class(),
        "a mark of another process": from_elsewhere(),
        "wrapped": wrapped(bare()),
        "copied": copy.copy(bare()),
        "copied deeply": copy.deepcopy(bare()),
        "pickled": pickle.loads(pickle.dumps(bare())),
        "sets its state": pickle.loads(pickle.dumps(OwnState())),
        "reduced": pickle.loads(pickle.dumps(Reduced())),
        "in a model": nn.Sequential(bare()),
        "overrides the forward": bare(Overrides),
        "taken out": unkernelize_model(called(bare())),
        "a copy of one taken out": copy.deepcopy(unkernelize_model(called(bare()))),
        "taken out before": unkernelize_model(bare()),
    }.items():
        print(name, which(layer), which(layer), sep=":")
    layer = called(bare(Overrides))
    print("traces in one that is none", ",".join(key for key in vars(layer) if "_tw" in key), sep=":")
"""
GET_IT = [
    "new",
    "from a template",
    "inherits the forward",
    "another class",
    "a mark of another process",
    "wrapped",
    "copied",
    "copied deeply",
    "pickled",
    "sets its state",
    "reduced",
    "pickled, left behind",
    "sets its state, left behind",
    "reduced, left behind",
    "in a model",
]


@pytest.fixture
def program(program_with_torch: Program) -> Program:
    return program_with_torch


@pytest.fixture(scope="module")
def roads(tmp_path_factory: pytest.TempPathFactory, stem: Stem) -> dict[str, str]:
    program = Program(tmp_path_factory.mktemp("roads"), stem)
    lines = program.run(textwrap.dedent(BARE) + textwrap.dedent(ROADS), CONFIG).stdout.splitlines()
    return dict(line.split(":", 1) for line in lines)


@pytest.mark.parametrize("road", GET_IT)
def test_it_gets_its_kernel_at_its_first_call(roads: dict[str, str], road: str) -> None:
    assert roads[road] == "1:1"


@pytest.mark.parametrize("road", ["taken out", "a copy of one taken out", "taken out before"])
def test_what_the_program_took_out_stays_out(roads: dict[str, str], road: str) -> None:
    assert roads[road] == "0:0"


def test_a_forward_that_calls_the_targets_is_no_target(roads: dict[str, str]) -> None:
    assert roads["overrides the forward"] == "4:4"
    assert roads["traces in one that is none"] == ""


def ends(program: Program, code: str, config: str, **variables: str) -> tuple[int, str]:
    """The exit code and stderr of a program that a door has opened, in an interpreter from its start on."""
    program = Program(program.root)
    (program.root / "site" / "sitecustomize.py").write_text("import twinkle\ntwinkle.activate(door='pth')\n")
    done = program.run(textwrap.dedent(BARE) + textwrap.dedent(code), config, check=False, **variables)
    return done.returncode, done.stderr


def test_strict_tells_of_it_once(program: Program) -> None:
    code, said = ends(
        program, "which(bare()); which(bare()); print(which(bare()))", CONFIG, TWINKLE_STRICT="1"
    )
    assert code == 0
    assert said.count("pkg.layers:Scale came without its __init__") == 1
    assert ends(program, "which(bare())", CONFIG) == (0, "")


@pytest.mark.parametrize("before", ["", "which(layer);"], ids=["met first", "called before"])
def test_one_that_is_compiled_has_its_kernel_in_the_first_graph(program: Program, before: str) -> None:
    code = f"""
        from torch._dynamo.testing import CompileCounter
        count = CompileCounter()
        layer, other = bare(), bare()
        {before}
        run = torch.compile(nn.Sequential(layer), backend=count, fullgraph=True)
        print(which(run), which(run), which(other), count.frame_count)
    """
    done = program.run(textwrap.dedent(BARE) + textwrap.dedent(code), CONFIG)
    assert done.stdout.split() == ["1", "1", "1", "1"]
    assert ends(program, code, CONFIG) == (0, "")


def test_one_that_is_traced_without_dynamo_is_named(program: Program) -> None:
    code = "torch.export.export(nn.Sequential(bare()), (x,), strict=False)"
    _, said = ends(program, code, CONFIG)
    assert "pkg.layers:Scale keeps its original where a tracer met a layer first" in said
    assert ends(program, code, CONFIG, TWINKLE_STRICT="1")[0] == 1


NORM = """
    import torch
    from torch import nn

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, x):
            y = x.float()
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
            return self.weight * y.to(x.dtype)
"""
CALL = """
    nn.Identity()  # whose constructor no longer asks about the classes of its instances
    from norms import Norm
    layer = bare(Norm)
    layer.eps = 1e-6
    layer(x)
"""
MATCH = """
    [layers.Same]
    match = "rms_norm"
    layer_impl = "fast:Same"
    verify = "off"
"""


def test_one_of_a_class_that_nobody_constructs_is_named(program: Program) -> None:
    (program.root / "site" / "norms.py").write_text(textwrap.dedent(NORM))
    (program.root / "fast.py").write_text(
        "from torch import nn\nclass Same(nn.Module):\n    def forward(self, x): return x * self.weight\n"
    )
    code, said = ends(program, CALL, MATCH, TWINKLE_STRICT="1")
    assert "1 norms:Norm without kernels: nobody saw them come" in said
    assert code == 1
    settled = textwrap.dedent(CALL).replace("layer = bare(Norm)", "Norm(); layer = bare(Norm)")
    code, said = ends(program, settled, MATCH)
    assert "without kernels" not in said


def test_classes_get_their_own_forward_back(program: Program) -> None:
    code = """
    import twinkle
    from pkg.layers import Scale
    import torch
    shown = Scale.forward
    twinkle.runtime.runtime.reset()
    print(shown is Scale.forward, shown.__wrapped__ is Scale.forward, hasattr(Scale, "_tw"))
    """
    assert program.run(code, CONFIG).stdout == "False True False\n"


@pytest.mark.parametrize("config", ['device = "cuda"', ""])
def test_a_class_whose_kernels_cannot_run_here_is_left_as_it_is(
    program: Program, config: str, tmp_path: Path
) -> None:
    variables = {} if config else {"TWINKLE_DISABLE": "Plus"}
    code = "import torch\nfrom pkg.layers import Scale\nprint(hasattr(Scale.forward, '__twinkle__'))\n"
    whole = textwrap.dedent(CONFIG) + config + "\n"
    assert program.run(code, whole, CUDA_VISIBLE_DEVICES="", **variables).stdout == "False\n"
