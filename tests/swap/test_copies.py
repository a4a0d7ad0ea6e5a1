"""Copies keep the kernel; files name the original class and load without Twinkle."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from twinkle.swap.layers import swap_out

if TYPE_CHECKING:
    from pathlib import Path

MODULE = """
import torch
from torch import nn

class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.me = [self]

    def forward(self, x):
        return torch.sigmoid(self.proj(x)) * x

class Stateful(Gate):
    def __getstate__(self):
        return {**self.__dict__, "saved": True}

class Reduced(Gate):
    def __reduce__(self):
        return (Reduced, (), {"_modules": self._modules})

class New(Gate):
    def __new__(cls, width=4):
        made = super().__new__(cls)
        made.__dict__["width"] = width
        return made

    def __getnewargs__(self):
        return (self.width + 1,)

    def __init__(self, width=4):
        super().__init__()

class NewByName(New):
    def __new__(cls, *, width=4):
        return super().__new__(cls, width)

    def __getnewargs_ex__(self):
        return (), {"width": self.width + 1}

class Copied(Gate):
    def __deepcopy__(self, memo):
        made = Copied()
        made.load_state_dict(self.state_dict())
        made.copied = True
        return made
"""

READER = """
import sys, pickle, torch
kind, path = sys.argv[1:]
loaded = torch.load(path, weights_only=False) if kind == "torch" else pickle.load(open(path, "rb"))
assert not any(name.partition(".")[0] == "twinkle" for name in sys.modules), "Twinkle was imported"
print(type(loaded).__name__, type(loaded).__module__, loaded(torch.ones(1, 4)).sum().item())
"""


@pytest.fixture
def gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of layer classes that another process can import."""
    (tmp_path / "gates_of_tests.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "gates_of_tests", raising=False)
    import gates_of_tests

    yield gates_of_tests
    sys.modules.pop("gates_of_tests", None)


def read_elsewhere(kind: str, path: Path) -> list[str]:
    """Load a file in a process that has no Twinkle on its path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TWINKLE_", "PYTHON"))}
    environment["PYTHONPATH"] = str(path.parent)
    program = path.parent / "reader.py"
    program.write_text(READER)
    done = subprocess.run(
        [sys.executable, str(program), kind, str(path)],
        env=environment,
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_deep_copy_keeps_the_kernel(kit: Any) -> None:
    model = kit.Model()
    wanted = kit.candidate(kit.GateKernel)
    kit.swap_in(model.first, [wanted])
    twin = copy.deepcopy(model)
    assert type(twin.first) is type(model.first)
    assert twin.first.proj.weight is not model.first.proj.weight
    assert kit.factor(twin.first) == 2
    assert (type(twin.first), wanted.binding.instances) == (kit.Gate, 1)


def test_a_shallow_copy_keeps_the_kernel_and_shares_the_state(kit: Any) -> None:
    gate = kit.Gate()
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    twin = copy.copy(gate)
    assert kit.is_swapped(twin)
    assert twin.proj is gate.proj


def test_a_copy_and_its_original_are_taken_out_one_by_one(kit: Any) -> None:
    gate = kit.Gate()
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    twin = copy.deepcopy(gate)
    swap_out(gate)
    assert (kit.factor(gate), kit.factor(twin)) == (1, 2)


def test_a_deep_copy_of_a_layer_that_refers_to_itself(kit: Any, gates: Any) -> None:
    gate = gates.Gate()
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    twin = copy.deepcopy(gate)
    assert twin.me[0] is twin


def test_a_class_with_a_deepcopy_of_its_own_is_asked(kit: Any, gates: Any) -> None:
    gate = gates.Copied()
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    twin = copy.deepcopy(gate)
    assert twin.copied
    assert kit.is_swapped(twin)


@pytest.mark.parametrize("name", ["Stateful", "Reduced", "New", "NewByName"])
def test_a_deep_copy_goes_the_classs_own_way(kit: Any, gates: Any, name: str) -> None:
    cls = getattr(gates, name)
    gate, plain = cls(), cls()
    plain.load_state_dict(gate.state_dict())
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    twin, expected = copy.deepcopy(gate), copy.deepcopy(plain)
    assert kit.is_swapped(twin)
    assert {k: v for k, v in twin.__dict__.items() if isinstance(v, (int, bool))} == {
        k: v for k, v in expected.__dict__.items() if isinstance(v, (int, bool))
    }
    assert torch.equal(twin(kit.x), 2 * gates.Gate.forward(expected, kit.x))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["Gate", "Stateful", "Reduced", "New", "NewByName"])
def test_a_pickle_is_of_the_original_class(kit: Any, gates: Any, name: str, protocol: int) -> None:
    gate = getattr(gates, name)()
    if protocol < 2 and name == "NewByName":
        pytest.skip("no keyword arguments before protocol 2")
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    loaded = pickle.loads(pickle.dumps(gate, protocol))
    assert type(loaded) is getattr(gates, name)
    swap_out(gate)  # what the mark of another process means: nothing
    assert torch.equal(loaded(kit.x), gates.Gate.forward(gate, kit.x))


def test_pickle_and_torch_save_are_readable_without_twinkle(kit: Any, gates: Any, tmp_path: Path) -> None:
    model = nn.Sequential(gates.Gate(), gates.Stateful())
    expected = f"{model(torch.ones(1, 4)).sum().item()}"
    wanted = kit.candidate(kit.GateKernel, device="cpu")
    for gate in model:
        kit.swap_in(gate, [wanted])
    model(kit.x)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    torch.save(model, tmp_path / "model.pt")
    assert read_elsewhere("pickle", tmp_path / "model.pickle")[2] == expected
    assert read_elsewhere("torch", tmp_path / "model.pt")[2] == expected


def test_a_module_that_shares_parts_is_pickled_with_them_shared(kit: Any, gates: Any) -> None:
    model = nn.Sequential(gates.Gate(), gates.Gate())
    model[1].proj = model[0].proj
    for gate in model:
        kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded[0].proj is loaded[1].proj
    assert loaded[0].me[0] is loaded[0]


def test_a_registered_reducer_of_the_class_is_asked(kit: Any, gates: Any) -> None:
    import copyreg

    copyreg.pickle(gates.Gate, lambda gate: (str, ("reduced",)))
    try:
        gate = gates.Gate()
        kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
        assert pickle.loads(pickle.dumps(gate)) == "reduced"
    finally:
        del copyreg.dispatch_table[gates.Gate]


def test_a_spawned_worker_gets_the_original(kit: Any, gates: Any) -> None:
    from multiprocessing.reduction import ForkingPickler

    gate = gates.Gate()
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    buffer = ForkingPickler.dumps(gate)
    assert type(pickle.load(io.BytesIO(bytes(buffer)))) is gates.Gate


def test_a_parametrized_swapped_module_is_copied(kit: Any) -> None:
    from torch.nn.utils import parametrize

    class Double(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    class Kernel(nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, self.weight, self.bias) + 1

    linear = nn.Linear(4, 4)
    kit.swap_in(linear, [kit.candidate(Kernel)])
    parametrize.register_parametrization(linear, "weight", Double())
    twin = copy.deepcopy(linear)
    assert torch.equal(twin(kit.x), linear(kit.x))
    assert kit.is_swapped(twin)
    parametrize.remove_parametrizations(linear, "weight")
    assert kit.is_swapped(linear)
    swap_out(linear)
    assert type(linear) is nn.Linear


def test_a_parametrized_module_is_swapped_below_its_parametrization(kit: Any) -> None:
    from torch.nn.utils import parametrize

    class Half(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return w / 2

    class Kernel(nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, self.weight, self.bias) + 1

    linear = nn.Linear(4, 4)
    parametrize.register_parametrization(linear, "weight", Half())
    before, expected = type(linear), linear(kit.x) + 1
    kit.swap_in(linear, [kit.candidate(Kernel)])
    assert torch.equal(linear(kit.x), expected)
    swap_out(linear)
    assert type(linear) is before
    kit.swap_in(linear, [kit.candidate(Kernel)])
    parametrize.remove_parametrizations(linear, "weight")
    assert torch.equal(linear(kit.x), expected)


class Forwarding(nn.Module):
    """Hands on the attributes that it does not know, as PEFT's and the compiler's wrappers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Proxy:
    """The same without being a module."""

    def __init__(self, inner: nn.Module) -> None:
        self.__dict__["inner"] = inner

    def __getattr__(self, name: str) -> Any:
        if name == "__setstate__":
            raise AttributeError(name)
        return getattr(self.__dict__["inner"], name)


@pytest.mark.parametrize("wrap", [Forwarding, Proxy])
@pytest.mark.parametrize("copying", [copy.deepcopy, copy.copy])
def test_a_copy_of_a_wrapper_is_a_wrapper(kit: Any, wrap: Any, copying: Any) -> None:
    gate = kit.Gate()
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    twin = copying(wrap(gate))
    assert type(twin) is wrap
    assert (twin.inner is gate) == (copying is copy.copy)
    assert kit.is_swapped(twin.inner)
    assert kit.factor(twin.inner) == 2


def test_a_copy_of_a_compiled_module_is_a_compiled_module(kit: Any) -> None:
    gate = kit.Gate()
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    compiled = torch.compile(gate, backend="eager")
    assert type(copy.deepcopy(compiled)) is type(compiled)


def test_a_class_without_a_copy_of_its_own_has_none(kit: Any, gates: Any) -> None:
    gate, own = kit.Gate(), gates.Copied()
    for module in (gate, own):
        kit.swap_in(module, [kit.candidate(kit.GateKernel)])
    assert [hasattr(gate, name) for name in ("__deepcopy__", "__copy__")] == [False, False]
    assert [hasattr(own, name) for name in ("__deepcopy__", "__copy__")] == [True, False]
