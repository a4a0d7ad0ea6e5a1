"""A module with kernels keeps its class, and has a mark for a function that stands in the class."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import typing
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from twinkle.runtime import runtime
from twinkle.swap.layers import placed, swap_out
from twinkle.targets import own_forward


@pytest.fixture
def cls() -> Any:
    """A class that no other test sees the forward of."""

    class Layer(nn.Module):
        """Halves."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            """Half of it."""
            return x * self.weight * scale

    return Layer


class Double(nn.Module):
    """Twice what the original gives."""

    def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
        return 2 * x * self.weight * scale


class Triple(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
        return 3 * x * self.weight * scale


X = torch.arange(1.0, 5.0)


def factor(module: nn.Module) -> float:
    return (module(X) / (X / 2)).mean().item()


def swapped(kit: Any, cls: Any, kernel: Any = Double, **options: Any) -> Any:
    module = cls()
    assert kit.swap_in(module, [kit.candidate(kernel, kind="embedded", **options)])
    return module


def test_the_class_stays_and_the_kernel_runs(kit: Any, cls: Any) -> None:
    before = repr(cls())
    module = swapped(kit, cls)
    assert [factor(module), factor(module)] == [2, 2]
    assert type(module) is cls
    assert module.__class__ is cls
    assert repr(module) == before
    assert {cls: "found"}[type(module)] == "found"
    assert functools.singledispatch(lambda x: None).dispatch(type(module))
    assert weakref.ref(module)() is module


def test_other_instances_run_the_original(kit: Any, cls: Any) -> None:
    before, module, after = cls(), swapped(kit, cls), cls()
    assert [factor(before), factor(module), factor(after)] == [1, 2, 1]
    assert set(vars(before)) == set(vars(after))


def test_the_forward_of_the_class_shows_the_original(kit: Any, cls: Any) -> None:
    plain = cls.forward
    shown = inspect.getsource(plain), inspect.signature(plain), typing.get_type_hints(plain)
    module = swapped(kit, cls)
    for function in (cls.forward, module.forward):
        assert (inspect.getsource(function), function.__doc__) == (shown[0], "Half of it.")
        assert (function.__name__, function.__qualname__) == ("forward", plain.__qualname__)
    assert inspect.signature(cls.forward) == shown[1]
    assert typing.get_type_hints(cls.forward) == shown[2]
    assert own_forward(cls) is plain


def test_taking_the_last_kernel_out_restores_the_class(kit: Any, cls: Any) -> None:
    before = dict(vars(cls))
    one, other = swapped(kit, cls), swapped(kit, cls, Triple)
    state = dict(vars(cls()))
    swap_out(one)
    assert [factor(one), factor(other)] == [1, 3]
    swap_out(other)
    assert dict(vars(cls)) == before
    assert set(vars(one)) == set(state)


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_the_kernel_also_when_the_first_is_gone(kit: Any, copying: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(kit.Gate, "forward", kit.Gate.forward)
    gate = kit.Gate()
    kit.swap_in(gate, [kit.candidate(kit.GateKernel, kind="embedded")])
    twin = copying(gate)
    assert type(twin) is kit.Gate
    assert kit.factor(twin) == 2
    assert swap_out(gate)
    assert kit.factor(gate) == 1
    if copying in (copy.copy, copy.deepcopy):
        assert kit.factor(twin) == 2
        assert swap_out(twin)
    assert kit.factor(twin) == 1


def test_a_pickle_names_no_part_of_twinkle(kit: Any) -> None:
    gate = kit.Gate()
    kit.swap_in(gate, [kit.candidate(kit.GateKernel, kind="embedded")])
    assert b"twinkle" not in pickle.dumps(gate)
    swap_out(gate)


def test_a_mark_of_another_process_means_nothing(kit: Any, cls: Any) -> None:
    module, foreign = swapped(kit, cls), cls()
    foreign._tw = "00000000:1"
    assert placed(foreign) is None
    assert [factor(foreign), factor(module)] == [1, 2]
    assert kit.swap_in(foreign, [kit.candidate(Triple, kind="embedded")])
    assert factor(foreign) == 3


def test_whoever_sets_the_forward_of_the_class_afterwards_wins(kit: Any, cls: Any) -> None:
    module = swapped(kit, cls)
    cls.forward = lambda self, x: 7 * x / 2
    assert factor(module) == 7
    swap_out(module)
    assert factor(module) == 7


def test_a_wrapper_of_the_classs_forward_stays_around_the_kernel(kit: Any, cls: Any) -> None:
    module, other = swapped(kit, cls), cls()
    found = cls.forward

    @functools.wraps(found)
    def wrapper(self: Any, x: torch.Tensor) -> torch.Tensor:
        return 10 * found(self, x)

    cls.forward = wrapper
    assert [factor(module), factor(other)] == [20, 10]
    swap_out(module)
    assert [factor(module), cls.forward] == [10, wrapper]


def test_a_class_wrapped_since_gets_a_kernel_in_the_place_of_the_wrapper(kit: Any, cls: Any) -> None:
    first = swapped(kit, cls)
    found = cls.forward
    cls.forward = lambda self, x, scale=0.5: 10 * found(self, x, scale)
    second = swapped(kit, cls, Triple)
    assert [factor(first), factor(second), factor(cls())] == [20, 3, 10]


def test_subclasses_keep_to_their_own(kit: Any, cls: Any) -> None:
    class Inherits(cls):  # type: ignore[misc, valid-type]
        pass

    class Overrides(cls):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 5 * super().forward(x)

    module, plain, around = swapped(kit, cls), Inherits(), Overrides()
    assert [factor(module), factor(plain), factor(around)] == [2, 1, 5]
    derived = swapped(kit, Inherits, Triple)
    assert [factor(derived), factor(Inherits()), factor(module)] == [3, 1, 2]
    assert "forward" not in vars(Inherits)
    swapped_around = swapped(kit, Overrides, Triple)
    assert [factor(swapped_around), factor(around)] == [3, 5]


def test_more_kernels_for_a_class_than_there_are_slots(kit: Any, cls: Any) -> None:
    modules = [swapped(kit, cls, Double if n % 2 else Triple) for n in range(7)]
    assert [factor(module) for module in modules] == [3, 2, 3, 2, 3, 2, 3]
    for module in modules[:3]:
        swap_out(module)
    assert [factor(module) for module in modules] == [1, 1, 1, 2, 3, 2, 3]
    last = swapped(kit, cls)
    assert factor(last) == 2


def test_kernels_of_modules_that_are_gone_are_forgotten(kit: Any, cls: Any) -> None:
    candidate = kit.candidate(Double, kind="embedded")
    gone = weakref.ref(candidate)
    module = cls()
    kit.swap_in(module, [candidate])
    twin = copy.deepcopy(module)
    del module, candidate
    other = swapped(kit, cls, Triple)
    gc.collect()
    assert gone() is not None
    assert [factor(twin), factor(other)] == [2, 3]
    del twin
    swapped(kit, cls, Triple)
    gc.collect()
    assert gone() is None


def test_a_class_with_a_kernel_can_be_freed(kit: Any) -> None:
    def made() -> Any:
        class Layer(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x

        class Kernel(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * x

        module = Layer()
        kit.swap_in(module, [kit.candidate(Kernel, kind="embedded")])
        assert torch.equal(module(X), 2 * X)
        return weakref.ref(Layer)

    gone = made()
    gc.collect()
    gc.collect()
    assert gone() is None


def test_a_first_argument_of_another_name(kit: Any) -> None:
    class Layer(nn.Module):
        def forward(this, x: Any) -> Any:
            return x / 2

    class Kernel(nn.Module):
        def forward(this, x: Any) -> Any:
            return x

    assert factor(Layer()) == 1
    assert factor(swapped(kit, Layer, Kernel)) == 2
    assert factor(Layer()) == 1


def test_scripting_takes_the_original(kit: Any, cls: Any) -> None:
    module = swapped(kit, cls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(module)
    torch.testing.assert_close(scripted(X), X / 2)


def test_a_module_that_torch_wraps_keeps_the_kernel(kit: Any, cls: Any) -> None:
    class Twice(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    before, after = cls(), swapped(kit, cls)
    for module in (before, after):
        parametrize.register_parametrization(module, "weight", Twice())
    wrapped = type(before)
    assert kit.swap_in(before, [kit.candidate(Double, kind="embedded")])
    assert type(before) is wrapped
    assert [factor(before), factor(after)] == [4, 4]
    parametrize.remove_parametrizations(after, "weight")
    assert type(after) is cls
    assert factor(after) == 4  # with the weight that the parametrization leaves behind
    swap_out(before)
    assert [factor(before), type(before)] == [2, wrapped]


def test_a_pruned_module_runs_the_kernel_on_the_pruned_weight(kit: Any, cls: Any) -> None:
    module = swapped(kit, cls)
    prune.l1_unstructured(module, "weight", 2)
    assert torch.equal(module(X), X * module.weight)
    twin = copy.deepcopy(nn.Sequential(cls()))[0]
    assert factor(twin) == 1


def test_a_kernel_with_methods_gets_a_class_below_which_the_original_runs(kit: Any, cls: Any) -> None:
    class Around(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            return 5 * super().forward(x, scale)

    marked, module = swapped(kit, cls), cls()
    kit.swap_in(module, [kit.candidate(Around)])
    assert [factor(module), factor(marked)] == [5, 2]
    assert kit.swap_in(module, [kit.candidate(Triple, kind="embedded")])
    assert [factor(module), type(module)] == [3, cls]
    assert kit.swap_in(module, [kit.candidate(Around)])
    assert [factor(module), type(module) is cls] == [5, False]
    swap_out(module)
    assert [factor(module), type(module)] == [1, cls]


def test_marked_modules_outlive_a_reset_of_the_runtime(kit: Any, cls: Any, clean_registry: Any) -> None:
    module = swapped(kit, cls)
    runtime.reset()
    assert factor(module) == 2
    other = swapped(kit, cls, Triple)
    assert [factor(module), factor(other)] == [2, 3]
    swap_out(module)
    swap_out(other)
    assert cls.forward is own_forward(cls)


def test_a_compiled_model_has_one_graph_for_all_and_sees_kernels_go(kit: Any, cls: Any) -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    class Tanh(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            return torch.tanh(x) * self.weight * scale

    wanted = kit.candidate(Tanh, kind="embedded", device="cpu")
    model = nn.Sequential(*(cls() for _ in range(4)))
    for module in model:
        kit.swap_in(module, [wanted])
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(X)
    model(X)
    compiled(X)
    swapped(kit, cls, Triple)  # another kernel of the class
    compiled(X)
    assert len(graphs) == 1
    assert "tanh" in graphs[0].code
    for module in model:
        swap_out(module)
    torch.testing.assert_close(compiled(X), X / 16)
    torch._dynamo.reset()
