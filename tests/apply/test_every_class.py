"""The embedded kernels serve modules of any class, in any model, with or without transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .conftest import Program

if TYPE_CHECKING:
    from stem import Stem

ROOT = Path(__file__).parents[2]

NET = """
import torch
from torch import nn
import torch.nn.functional as F


class Norm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self._norm(x.float()).type_as(x) * self.weight


def rotate_half(x):
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def rotate(q, k, cos, sin):
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = rotate(q, k, cos, sin)
        return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = Norm(dim)
        self.attention = Attention(dim)

    def forward(self, x, cos, sin):
        return x + self.attention(self.norm(x), cos, sin)


class Net(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.embed = nn.Embedding(32, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))
        self.head = nn.Linear(dim, 32)

    def forward(self, tokens):
        angles = torch.arange(tokens.shape[1])[:, None] * torch.ones(16)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return self.head(x)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x):
        return F.relu(self.second(self.first(x)))
"""
STEP = """
import sys, torch, net
torch.manual_seed(0)
before = {name: vars(cls)["forward"] for name, cls in vars(net).items() if isinstance(cls, type)}
model = net.Net()
tokens = torch.arange(8)[None]
out = model(tokens)
out.sum().backward()
"""
AUTO = {"TWINKLE_CONFIG": "auto", "TWINKLE_SIZES": "all"}


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory, stem: Stem) -> Program:
    program = Program(tmp_path_factory.mktemp("every_class"), stem)
    (program.root / "site" / "net.py").write_text(NET)
    return program


def said(program: Program, code: str, **variables: str) -> Any:
    """What a program prints last, as JSON."""
    return json.loads(program.run(code, **{**AUTO, **variables}).stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def step(nets: Program) -> dict[str, Any]:
    code = """
        unread = net.Convolutions()
        x = torch.randn(2, 4, 3)
        unread(x)
        from twinkle.report import snapshot
        print(json.dumps({
            "out": out.double().sum().item(),
            "grad": model.embed.weight.grad.double().norm().item(),
            "bindings": snapshot()["bindings"],
            "as before": {n: vars(c)["forward"] is before[n] for n, c in vars(net).items() if n in before},
            "types": [type(m).__name__ for m in model.modules()],
            "marked": sorted({type(m).__name__ for m in model.modules() if "_tw" in vars(m)}),
        }))
    """
    return said(nets, STEP + textwrap.dedent(code))


def found(report: dict[str, Any]) -> set[tuple[str, str, str]]:
    """Target, kernel and state of each binding."""
    return {(b["target"], b["kernel"], b["state"]) for b in report["bindings"]}


def test_layers_and_functions_of_a_plain_program_get_their_kernels(step: dict[str, Any]) -> None:
    assert found(step) == {("net:Norm", "rms_norm", "active"), ("net:rotate", "rotate", "active")}
    assert all(b["proof"].startswith("proven") for b in step["bindings"])
    (norms,) = (b for b in step["bindings"] if b["kernel"] == "rms_norm")
    assert norms["instances"] == 2


def test_it_computes_what_it_computed(nets: Program, step: dict[str, Any]) -> None:
    plain = said(
        nets,
        STEP
        + "print(json.dumps([out.double().sum().item(), model.embed.weight.grad.double().norm().item()]))",
        TWINKLE_KERNELS="off",
    )
    assert [step["out"], step["grad"]] == pytest.approx(plain, rel=1e-5)


def test_classes_without_a_kernel_are_what_they_were(step: dict[str, Any]) -> None:
    changed = {name for name, same in step["as before"].items() if not same}
    assert changed == {"Norm"}
    assert step["marked"] == ["Norm"]
    assert step["types"][:4] == ["Net", "Embedding", "ModuleList", "Block"]


def test_what_has_no_word_of_an_op_is_not_read_and_brings_nothing_in(nets: Program) -> None:
    code = """
        import sys, torch, net
        from torch import nn
        models = [net.Convolutions() for _ in range(3)]
        models.append(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout()))
        for model in models[:3]:
            model(torch.randn(2, 4, 3))
        models[3](torch.randn(2, 4))
        rooms = ("twinkle.match.s", "twinkle.swap", "twinkle.proof")
        print(json.dumps([name for name in sys.modules if name.startswith(rooms)]))
    """
    assert said(nets, textwrap.dedent(code)) == []


@pytest.mark.parametrize("door", ["whole", "inner", "in place", "in a function"])
def test_a_model_that_is_compiled_before_its_first_call_has_kernels_in_one_graph(
    nets: Program, door: str
) -> None:
    code = f"""
        import torch, net
        from torch._dynamo.testing import CompileCounter
        torch.manual_seed(0)
        count = CompileCounter()
        model = net.Net()
        tokens = torch.arange(8)[None]
        options = dict(backend=count, fullgraph=True)
        if {door!r} == "whole":
            run = torch.compile(model, **options)
        elif {door!r} == "inner":
            for block in model.blocks:
                block.compile(**options)
            run = model
        elif {door!r} == "in place":
            model.compile(**options)
            run = model
        else:
            run = torch.compile(lambda tokens: model(tokens), **options)
        for _ in range(3):
            run(tokens).sum().backward()
        from twinkle.report import snapshot
        states = {{b["kernel"]: b["state"] for b in snapshot()["bindings"]}}
        print(json.dumps([count.frame_count, states]))
    """
    frames, states = said(nets, textwrap.dedent(code))
    assert frames == said(nets, textwrap.dedent(code), TWINKLE_KERNELS="off")[0]
    assert states == {"rms_norm": "active", "rotate": "active"}


def test_a_class_that_is_made_again_and_again_goes_and_is_not_read_again(nets: Program) -> None:
    code = """
        import gc, weakref, torch, linecache
        from torch import nn
        from twinkle.match.symbolic import source
        read = []
        parse = source._parse
        source._parse = lambda function, code: read.append(code.co_qualname) or parse(function, code)

        import made
        gone, counts = [], []
        for kind in ("norm", "nothing"):
            for at in range(6):
                cls = made.make(kind)
                gone.append(weakref.ref(cls))
                layer = cls(8)
                layer(torch.randn(4, 8, requires_grad=True)).sum().backward()
                counts.append(len(read))
        del cls, layer
        gc.collect()
        from twinkle.report import snapshot
        print(json.dumps([sum(one() is not None for one in gone), counts, len(snapshot()["bindings"])]))
    """
    (nets.root / "site" / "made.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn

            def make(kind):
                class Norm(nn.Module):
                    def __init__(self, d):
                        super().__init__()
                        self.weight, self.eps = nn.Parameter(torch.ones(d)), 1e-6

                    def _norm(self, x):
                        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

                    def forward(self, x):
                        return self._norm(x.float()).type_as(x) * self.weight

                class Nothing(nn.Module):
                    def __init__(self, d):
                        super().__init__()
                        self.linear = nn.Linear(d, d)

                    def forward(self, x):
                        return self.linear(x).mean(-1).sqrt()

                return {"norm": Norm, "nothing": Nothing}[kind]
            """
        )
    )
    alive, counts, bindings = said(nets, textwrap.dedent(code))
    assert alive == 0
    assert counts[0] > 0
    assert len(set(counts[:6])) == 1, "the norm was read again"
    assert len(set(counts[6:])) == 1, "the other class was read again"
    assert bindings == 1


ROADS = """
    import copy, io, pickle, torch, net
    x = torch.randn(2, 16)
    def kernel_runs(layer):
        layer(x)
        return "_tw" in vars(layer) and vars(layer)["_tw"].split(":")[1] not in ("0",)

    class Inherits(net.Norm):
        pass

    class Overrides(net.Norm):
        def forward(self, x):
            return super().forward(x) + 1

    class Changed(net.Norm):
        def _norm(self, x):
            return x

    net.Norm(16)
    bare = net.Norm.__new__(net.Norm)
    bare.__dict__.update(net.Norm(16).__dict__)
    file = io.BytesIO()
    torch.save(net.Norm(16), file)
    file.seek(0)
    print(json.dumps({
        "constructed": kernel_runs(net.Norm(16)),
        "copied": kernel_runs(copy.deepcopy(net.Norm(16))),
        "pickled": kernel_runs(pickle.loads(pickle.dumps(net.Norm(16)))),
        "from a file": kernel_runs(torch.load(file, weights_only=False)),
        "without a constructor": kernel_runs(bare),
        "inherits": kernel_runs(Inherits(16)),
        "overrides": kernel_runs(Overrides(16)),
        "another helper": kernel_runs(Changed(16)),
        "on meta": vars(net.Norm(16).to("meta")).get("_tw") is None,
    }))
"""


def test_however_a_layer_comes(nets: Program) -> None:
    roads = said(nets, textwrap.dedent(ROADS))
    assert roads.pop("overrides") is False
    assert roads.pop("another helper") is False
    assert all(roads.values()), roads


def test_tools_that_read_a_class_before_its_first_call_see_the_program(nets: Program) -> None:
    code = """
        import inspect, torch, net
        import torch.fx
        model = net.Net()
        layer = net.Norm(16)
        x = torch.randn(2, 16)
        traced = torch.fx.symbolic_trace(layer)
        scripted = torch.jit.script(net.Norm(16))
        recorded = torch.jit.trace(net.Norm(16), x)
        exported = torch.export.export(net.Norm(16), (x,)).module()
        all_made = traced, scripted, recorded, exported
        print(json.dumps({
            "source": "self._norm(x.float())" in inspect.getsource(net.Norm.forward),
            "signature": str(inspect.signature(net.Norm.forward)),
            "same": [bool(torch.allclose(made(x), layer(x))) for made in all_made],
        }))
    """
    assert said(nets, textwrap.dedent(code)) == {"source": True, "signature": "(self, x)", "same": [True] * 4}


def test_a_report_looks_at_no_class_that_nobody_has_used(nets: Program) -> None:
    code = """
        import net
        from twinkle.report import snapshot
        used, unused = net.Norm(16), net.Attention(16)
        used(__import__("torch").randn(2, 16))
        before = vars(net.Attention)["forward"]
        snapshot()
        print(json.dumps([type(before).__name__, vars(net.Attention)["forward"] is before]))
    """
    kind, same = said(nets, textwrap.dedent(code))
    assert kind != "function"
    assert same


def test_layers_of_a_transformers_model_are_decided_about_as_a_whole(nets: Program) -> None:
    code = """
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=16, vocab_size=16))
        marked = {type(m).__name__ for m in model.modules() if "_tw" in vars(m)}
        model(torch.arange(4)[None])
        after = {type(m).__name__ for m in model.modules() if "_tw" in vars(m)}
        print(json.dumps([sorted(marked), sorted(after)]))
    """
    marked, after = said(nets, textwrap.dedent(code))
    assert "LlamaRMSNorm" in marked
    assert marked == after, "something was decided about once more"


def test_what_is_off_or_left_out_is_not_served(nets: Program) -> None:
    report = STEP + "report()"
    kernels = {"TWINKLE_DISABLE": "rms_norm"}
    assert found(said(nets, report, **kernels)) == {("net:rotate", "rotate", "active")}
    assert found(said(nets, report, TWINKLE_KERNELS="off")) == set()
    assert found(said(nets, report, TWINKLE_KERNELS="rms_norm")) == {("net:Norm", "rms_norm", "active")}


def test_a_users_own_kernel_goes_first(nets: Program) -> None:
    (nets.root / "site" / "mine.py").write_text(
        "from torch import nn\nclass Mine(nn.Module):\n    def forward(self, x):\n        return x * 0 + 7\n"
    )
    config = '[twinkle]\nkernels = "auto"\n[layers.Mine]\ntarget = "net:Norm"\nlayer_impl = "mine:Mine"\n'
    code = "import torch, net\nprint(json.dumps(net.Norm(16)(torch.ones(1, 16)).tolist()[0][0]))"
    done = nets.run(code, config, TWINKLE_SIZES="all")
    assert json.loads(done.stdout.splitlines()[-1]) == 7.0


def without(packages: set[str], folder: Path) -> Path:
    """A folder with what is installed here, but for some packages."""
    folder.mkdir()
    for place in sys.path:
        if not place.endswith("site-packages"):
            continue
        for entry in Path(place).iterdir():
            name = entry.name.lower().replace("-", "_")
            if not name.startswith(tuple(packages)) and not entry.name.endswith(".pth"):
                link = folder / entry.name
                if not link.exists():
                    link.symlink_to(entry)
    return folder


def test_it_works_where_transformers_is_not_installed(nets: Program, tmp_path: Path) -> None:
    site = without({"transformers", "twinkle", "__editable__"}, tmp_path / "site")
    code = (
        "import twinkle\ntwinkle.activate()\n"
        + STEP
        + textwrap.dedent(
            """
        import json
        from twinkle.report import snapshot
        try:
            import transformers
        except ImportError:
            print(json.dumps({"bindings": snapshot()["bindings"]}))
        """
        )
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_")}
    environ.update(
        AUTO, TWINKLE_CACHE="off", PYTHONPATH=os.pathsep.join(map(str, [nets.root / "site", ROOT, site]))
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert found(report) == {("net:Norm", "rms_norm", "active"), ("net:rotate", "rotate", "active")}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="its interpreter is used")
def test_places_inside_a_block_and_layers_of_torch_are_served_where_triton_runs(nets: Program) -> None:
    code = """
        import torch
        from torch import nn
        import blocks
        torch.manual_seed(0)
        model = blocks.Blocks()
        out = model(torch.randn(2, 4, 32, requires_grad=True))
        out.sum().backward()
        report()
    """
    (nets.root / "site" / "blocks.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn
            from net import Norm

            class MLP(nn.Module):
                def __init__(self, d):
                    super().__init__()
                    self.up, self.gate, self.down = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)

                def forward(self, x):
                    return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

            class Block(nn.Module):
                def __init__(self, d):
                    super().__init__()
                    self.linear, self.norm, self.mlp = nn.Linear(d, d), Norm(d), MLP(d)

                def forward(self, x):
                    h = x + self.linear(x)
                    y = self.norm(h)
                    return h + self.mlp(y)

            class Blocks(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.blocks = nn.Sequential(Block(32), Block(32), nn.LayerNorm(32))

                def forward(self, x):
                    return self.blocks(x)
            """
        )
    )
    report = said(nets, textwrap.dedent(code), TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert {
        ("blocks:MLP", "gated_mlp", "active"),
        ("blocks:Block", "residual_norm", "active"),
        ("torch.nn.modules.normalization:LayerNorm", "layer_norm", "active"),
    } <= found(report)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="its interpreter is used")
def test_adaptive_norms_of_a_plain_program_are_served_where_triton_runs(nets: Program) -> None:
    code = """
        import torch
        import diffusion
        torch.manual_seed(0)
        for cls in (diffusion.DiT, diffusion.Flux, diffusion.Wan):
            model = cls(16)
            x, c = torch.randn(2, 4, 16, requires_grad=True), torch.randn(2, 16)
            model(x, c).sum().backward()
        report()
    """
    (nets.root / "site" / "diffusion.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn

            def modulate(x, shift, scale):
                return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

            class Block(nn.Module):
                def __init__(self, d):
                    super().__init__()
                    self.norm = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
                    self.linear, self.make = nn.Linear(d, d), nn.Linear(d, 3 * d)

            class DiT(Block):
                def forward(self, x, c):
                    shift, scale, gate = self.make(c).chunk(3, dim=1)
                    return x + gate.unsqueeze(1) * self.linear(modulate(self.norm(x), shift, scale))

            class AdaNorm(Block):
                def forward(self, x, emb):
                    shift, scale, gate = self.make(emb).chunk(3, dim=1)
                    x = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
                    return x, gate

            class Flux(nn.Module):
                def __init__(self, d):
                    super().__init__()
                    self.norm, self.linear = AdaNorm(d), nn.Linear(d, d)

                def forward(self, x, c):
                    normed, gate = self.norm(x, emb=c)
                    return x + gate.unsqueeze(1) * self.linear(normed)

            class Wan(Block):
                def forward(self, x, c):
                    shift, scale, gate = self.make(c)[:, None].float().chunk(3, dim=-1)
                    normed = (self.norm(x.float()) * (1 + scale) + shift).type_as(x)
                    return (x.float() + self.linear(normed) * gate).type_as(x)
            """
        )
    )
    report = said(
        nets, textwrap.dedent(code), TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", TWINKLE_SIZES="all"
    )
    assert {
        ("diffusion:DiT", "modulated_norm", "active"),
        ("diffusion:AdaNorm", "modulated_norm", "active"),
        ("diffusion:Wan", "modulated_norm", "active"),
    } <= found(report)
    proofs = [b["proof"] for b in report["bindings"] if b["kernel"] == "modulated_norm"]
    assert all(proof.startswith("proven") for proof in proofs), proofs


IMAGES = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)
        self.act = nn.SiLU()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.norm(x)
        x = self.act(x)
        return self.conv(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Block()
        self.layers = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1))
        self.others = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x):
        return self.others(self.layers(self.first(x)))
"""


def test_norms_before_an_activation_have_a_kernel_in_forwards_and_in_sequences(nets: Program) -> None:
    """A ``Sequential`` is looked at once a GroupNorm has come, and where there is none it stays torch's."""
    (nets.root / "site" / "images.py").write_text(IMAGES)
    code = """
        import torch
        from torch import nn
        before = vars(nn.Sequential)["forward"]
        nn.Sequential(nn.Linear(2, 2), nn.ReLU())(torch.ones(1, 2))
        untouched = vars(nn.Sequential)["forward"] is before
        import images
        torch.manual_seed(0)
        model, x = images.Net(), torch.randn(2, 4, 3, 3)
        outs = [model(x).double().sum().item() for _ in range(3)]
        from twinkle.report import snapshot
        print(json.dumps({
            "untouched": untouched,
            "outs": outs,
            "bindings": snapshot()["bindings"],
            "other": vars(model.others)["_tw"].endswith(":0"),
        }))
    """
    ours = said(nets, textwrap.dedent(code), TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    plain = textwrap.dedent(code).partition("from twinkle.report")[0] + "print(json.dumps(outs))\n"
    theirs = said(nets, plain, TWINKLE_KERNELS="off")
    assert ours["untouched"]
    assert ours["outs"] == pytest.approx(theirs, rel=1e-5)
    assert {one for one in found(ours) if one[2] == "active"} == {
        ("images:Block", "group_norm", "active"),
        ("torch.nn.modules.container:Sequential", "group_norm", "active"),
    }
    assert ours["other"], "decided about, and left alone"
