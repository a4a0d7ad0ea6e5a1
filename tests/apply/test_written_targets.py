"""A target is an object, however it is written and whenever it comes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Program

ROOT = Path(__file__).parents[2]
NET = """
    from torch import nn
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(2, 2)
        def forward(self, x): return self.l(x)
    class MLP(Base):
        def forward(self, x): return self.l(x)
    class Other(Base):
        def forward(self, x): return self.l(x)
    Alias = Other
    def make():
        class Inner(Base):
            def forward(self, x): return self.l(x)
        return Inner
    Factory, NoTarget = make(), make()
    def register(cls):
        class Wrapped(cls):
            def forward(self, x): return super().forward(x)
        Wrapped.__name__ = cls.__name__
        return Wrapped
    @register
    class Decorated(Base):
        def forward(self, x): return self.l(x)
    class Public(Base):
        def forward(self, x): return self.l(x)
    Public.__module__ = "net"
    class GatedUnit(Base):
        def forward(self, x): return self.l(x)
    class Holder(nn.Module):
        class Inside(Base):
            def forward(self, x): return self.l(x)
"""
KERNELS = """
    from torch import nn
    class K(nn.Module):
        def forward(self, x): return self.l(x) * 0 + 42.
    def f(x): return 42.
    def gelu(input, approximate="none"): return input * 0 + 42.
    def isqrt(n, /): return 42
    class N(nn.Module):
        def forward(self, input): return input * 0 + 42.
"""
SHOW = """
    import torch
    x = torch.ones(1, 2)
    def which(layer): return "K" if layer(x).eq(42.).all() else "original"
"""


@pytest.fixture(autouse=True)
def _files(program: Program) -> None:
    files = {
        "net/__init__.py": "from net._impl import *\n",
        "net/_impl.py": NET,
        "fast.py": KERNELS,
        "lazy/__init__.py": """
            def __getattr__(name):
                if name == "Net":
                    from lazy.impl import _Net
                    return _Net
                if name == "f":
                    from lazy.impl import f
                    return f
                if name == "g":
                    from lazy.impl import _g
                    return _g
                if name == "broken":
                    import not_installed
                raise AttributeError(name)
        """,
        "lazy/impl.py": """
            from net._impl import Base
            class _Net(Base):
                def forward(self, x): return self.l(x)
            def f(x): return x
            def _g(x): return x
        """,
        "core.py": "def f(x): return 'original'\n",
        "facade.py": "from core import f\n",
        "user.py": "from core import f\n",
    }
    for name, text in files.items():
        path = program.root / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def layers(*targets: str) -> str:
    return f'[layers.K]\ntarget = {list(targets)}\nlayer_impl = "fast:K"\n'


def function(name: str, module: str, kernel: str = "f") -> str:
    return f'[functions."{name}"]\ntarget_module = "{module}"\nfunc_impl = "fast:{kernel}"\n'


@pytest.fixture
def program(program_with_torch: Program) -> Program:
    return program_with_torch


def test_every_way_to_write_a_class_means_that_class_and_no_other(program: Program) -> None:
    written = ("net:MLP", "net._impl:Alias", "net._impl:Factory", "net._impl:Decorated", "net._impl:Public")
    code = """
    import net
    net._impl.Base()  # constructed, and so asked about, before the others
    for name in ("MLP", "Other", "Factory", "Decorated", "Public", "GatedUnit", "Base", "NoTarget"):
        print(name, which(getattr(net, name)()))
    print("Inside", which(net.Holder.Inside()))
    """
    done = program.run(SHOW + code, layers(*written, "net:Gated*", "net._impl:Holder.Inside"))
    replaced = dict(line.split() for line in done.stdout.splitlines())
    assert [name for name, what in replaced.items() if what == "original"] == ["Base", "NoTarget"]


def test_a_re_export_that_comes_after_the_first_instance_is_found(program: Program) -> None:
    (program.root / "site" / "later.py").write_text("from net._impl import MLP as Renamed, Other\n")
    code = """
    from net import MLP, Other
    MLP(), Other()
    import later
    print(which(MLP()), which(Other()))
    """
    assert program.run(SHOW + code, layers("later:Renamed", "lat*:Oth*")).stdout == "K K\n"


def test_the_report_has_one_record_with_the_class_and_what_was_written(program: Program) -> None:
    (binding,) = program.bindings(SHOW + "    import net; which(net.MLP())", layers("net:MLP"))
    assert (binding["target"], binding["state"]) == ("net._impl:MLP", "active")
    assert "registered as net:MLP" in binding["notes"]


def test_a_lazy_package_is_asked_for_nothing_until_the_program_asks(program: Program) -> None:
    config = (
        layers("lazy:Net") + function("f", "lazy") + function("g", "lazy") + function("broken", "lazy", "f")
    ).replace("fast:g", "fast:f")
    code = SHOW + (
        """
    import sys, lazy
    print("lazy.impl" in sys.modules)
    print(which(lazy.Net()), lazy.f(1), lazy.g(1))
    from lazy.impl import f, _g
    print(f(1), _g(1))
    """
    )
    done = program.run(code, config)
    assert done.stdout == "False\nK 42.0 42.0\n42.0 42.0\n"
    assert "not_installed" not in done.stderr


def test_what_a_lazy_package_would_give_is_replaced_where_it_is_defined(program: Program) -> None:
    code = """
    import torch, lazy
    from lazy.impl import f
    print(f(1))
    """
    assert program.run(code, function("f", "lazy")).stdout == "42.0\n"


def test_transformers_stays_lazy_and_its_class_is_found(program_of_its_own: Program) -> None:
    program = program_of_its_own
    code = """
    import sys, transformers
    print("torch" in sys.modules, "transformers.pytorch_utils" in sys.modules)
    from transformers.pytorch_utils import Conv1D
    import torch
    print(Conv1D(2, 2)(torch.ones(1, 2)).tolist())
    """
    config = '[layers.N]\ntarget = "transformers:Conv1D"\nlayer_impl = "fast:C"\n'
    with (program.root / "site" / "fast.py").open("a") as file:
        file.write("class C(nn.Module):\n    def forward(self, x): return x * 42.\n")
    assert program.run(code, config).stdout == "False False\n[[42.0, 42.0]]\n"


def test_targets_inside_torch_and_inside_what_it_imports(program: Program) -> None:
    config = (
        function("gelu", "torch.nn.functional", "gelu")
        + function("isqrt", "math", "isqrt")
        + layers("torch.nn:LayerNorm", "torch.nn.modules.*:GroupNorm").replace("fast:K", "fast:N")
    )
    code = """
    import torch, math
    ones = torch.ones(1, 2, 2)
    print(torch.nn.functional.gelu(ones).sum().item(), math.isqrt(9))
    print(torch.nn.LayerNorm(2)(ones).sum().item(), torch.nn.GroupNorm(1, 2)(ones).sum().item())
    """
    done = program.run(code, config)
    assert done.stdout == "168.0 42\n168.0 168.0\n"
    assert "partially initialized" not in done.stderr


def test_a_program_without_torch_is_not_made_to_import_it(program_of_its_own: Program) -> None:
    program = program_of_its_own
    code = "import sys, core\nprint('torch' in sys.modules)\nreport()"
    config = function("f", "core")
    done = program.run(code, config)
    assert done.stdout.startswith("False\n")
    assert "in place; loads at its first call" in done.stdout  # it needs no torch to be chosen


@pytest.mark.parametrize("order", ["core, user, facade", "facade, core, user"])
def test_a_re_exported_function_is_replaced_for_everyone_in_any_order(program: Program, order: str) -> None:
    code = f"import torch, {order}\nprint(core.f(1), user.f(1), facade.f(1))"
    assert program.run(code, function("f", "facade")).stdout == "42.0 42.0 42.0\n"


def test_a_module_that_is_executed_by_hand_has_its_kernels(program: Program) -> None:
    code = """
    from importlib.util import module_from_spec, spec_from_file_location
    def load():
        spec = spec_from_file_location("by_hand", "site/net/_impl.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    for module in (load(), load()):
        print(which(module.MLP()), module.make())
    """
    config = layers("by_hand:MLP") + function("make", "by_hand").replace("fast:f", "fast:made")
    with (program.root / "site" / "fast.py").open("a") as file:
        file.write("def made(): return 42\n")
    assert program.run(SHOW + code, config).stdout == "K 42\nK 42\n"


NANO = """
    import torch
    from torch import nn
    class Norm(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(d))
            self.variance_epsilon = 1e-6
        def forward(self, hidden_states):
            input_dtype = hidden_states.dtype
            hidden_states = hidden_states.to(torch.float32)
            variance = hidden_states.pow(2).mean(-1, keepdim=True)
            hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
            return self.weight * hidden_states.to(input_dtype)
    class Inherits(Norm):
        pass
    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.other, self.linear = Norm(4), Inherits(4), nn.Linear(4, 4)
        def forward(self, x): return self.linear(self.norm(x))
"""


def test_match_serves_a_model_that_is_not_of_transformers(program: Program) -> None:
    (program.root / "site" / "nano.py").write_text(textwrap.dedent(NANO))
    with (program.root / "site" / "fast.py").open("a") as file:
        file.write("class R(nn.Module):\n    def forward(self, hidden_states): return hidden_states * 42.\n")
    config = '[layers.R]\nmatch = "rms_norm"\nlayer_impl = "fast:R"\nverify = "off"\n'
    code = """
    import torch, nano
    model, ones = nano.GPT(), torch.ones(1, 4)
    print(model.norm(ones)[0, 0].item(), model.other(ones)[0, 0].item(), model.linear(ones).shape)
    """
    expected = "42.0 42.0 torch.Size([1, 4])\n"
    done = program.run(code, config)
    assert (done.stdout, done.stderr) == (expected, "")
    # With strict, no step is silent.
    said = program.run(code, config, TWINKLE_STRICT="1").stderr
    assert "nano:Norm is taken for match:rms_norm: its instances get kernel R" in said


def test_a_target_that_names_nothing_is_said(program: Program) -> None:
    done = program.run("import torch, net", layers("net:MPL"))
    assert "net has no class MPL; did you mean 'MLP'?" in done.stderr
    assert (
        program.run("import torch, net", layers("net:MPL"), check=False, TWINKLE_STRICT="1").returncode == 1
    )


TRAIN = """
    import torch
    from torch import nn
    def act(x): return "original"
    print(act(1))
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(2, 2)
        def forward(self, x): return self.l(x)
    class Mine(MLP):
        pass
    class Box:
        def get(self, x): return "original"
    x = torch.ones(1, 2)
    print(*("K" if made(x).eq(42.).all() else "original" for made in (MLP(), Mine())))
    print(Box().get(1))
    def act(x): return "another"
    print(act(1))
"""


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("__main__", ["job/train.py"]), ("train", ["job/train.py"]), ("job.train", ["-m", "job.train"])],
)
def test_what_the_program_itself_defines_is_replaced(
    program: Program, module: str, arguments: list[str]
) -> None:
    job = program.root / "job"
    job.mkdir()
    (job / "__init__.py").write_text("import torch\n")
    (job / "train.py").write_text(textwrap.dedent(TRAIN))
    with (program.root / "site" / "fast.py").open("a") as file:
        file.write("def get(self, x): return 42.\n")
    config = layers(f"{module}:MLP") + function("act", module) + function("Box.get", module, "get")
    (program.root / "twinkle.toml").write_text(config)
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TWINKLE_")}
    paths = (str(program.root / "site"), str(ROOT / "sitecustomize_template"), str(ROOT))
    environ |= {"PYTHONPATH": os.pathsep.join(paths), "TWINKLE_CONFIG": "twinkle.toml"}
    environ |= {"TWINKLE_LOG": "info", "TWINKLE_CACHE": "off", "TWINKLE_SIZES": "fixed"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=program.root,
        env=environ,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout == "42.0\nK K\n42.0\n42.0\n", done.stderr
    assert f"{module} is the program that is run" in done.stderr


def test_a_pattern_asks_no_object_for_its_class(program: Program) -> None:
    (program.root / "site" / "sly.py").write_text(
        "import torch\n"
        "class Sly:\n"
        "    @property\n"
        "    def __class__(self):\n"
        "        print('asked')\n"
        "        return Sly\n"
        "thing = Sly()\n"
    )
    config = '[layers.Plus]\ntarget = "**:Thing"\nrepo_path = "kernels"\npackage_name = "my_kernels"\n'
    assert program.run("import torch, sly\ntorch.nn.Linear(1, 1)\n", config).stdout == ""


def test_what_stands_for_a_module_needs_no_name(program: Program) -> None:
    (program.root / "site" / "stands.py").write_text(
        "import sys\n"
        "class Space: pass\n"
        "def add(x, y): return x + y\n"
        "space = Space()\n"
        "space.add = add\n"
        "sys.modules[__name__] = space\n"
    )
    (program.root / "site" / "fast.py").write_text("def add(x, y): return x + y + 1\n")
    config = '[functions.add]\ntarget_module = "stands"\nfunc_impl = "fast:add"\n'
    assert program.run("import torch, stands\nprint(stands.add(1, 2))\n", config).stdout == "4\n"
