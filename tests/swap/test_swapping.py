"""Putting kernels in and taking them out: what matches, what is shared, what is left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from twinkle.modes import Mode
from twinkle.runtime import runtime
from twinkle.swap.layers import matches, placed, plan, restore, swap_out


def test_swapping_out_restores_the_very_class(kit: Any, gate: Any) -> None:
    before = dict(gate.__dict__)
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    gate(kit.x)
    assert swap_out(gate)
    assert type(gate) is kit.Gate
    assert gate.__dict__ == before
    assert kit.factor(gate) == 1


def test_swapping_out_what_is_not_swapped_is_false(gate: Any) -> None:
    assert not swap_out(gate)


def test_swapping_twice_is_swapping_once(kit: Any, gate: Any) -> None:
    wanted = kit.candidate(kit.GateKernel)
    kit.swap_in(gate, [wanted])
    cls = type(gate)
    assert kit.swap_in(gate, [wanted])
    assert type(gate) is cls
    assert wanted.binding.instances == 1


def test_equal_candidates_are_the_same_swap(kit: Any, gate: Any) -> None:
    wanted = kit.candidate(kit.GateKernel)
    kit.swap_in(gate, [wanted])
    cls = type(gate)
    kit.swap_in(gate, [type(wanted)(wanted.kernel, wanted.binding)])
    assert type(gate) is cls


def test_other_candidates_take_the_place_of_the_first(kit: Any, gate: Any) -> None:
    first, second = kit.candidate(kit.kernel_times(3)), kit.candidate(kit.kernel_times(5))
    kit.swap_in(gate, [first])
    kit.swap_in(gate, [second])
    assert kit.factor(gate) == 5
    assert (first.binding.instances, second.binding.instances) == (0, 1)
    swap_out(gate)
    assert type(gate) is kit.Gate


def test_modules_share_one_class(kit: Any) -> None:
    model = kit.Model()
    wanted = kit.candidate(kit.GateKernel)
    kit.swap_in(model.first, [wanted])
    kit.swap_in(model.second, [wanted])
    assert type(model.first) is type(model.second)


def test_another_module_of_the_class_is_not_affected(kit: Any, gate: Any) -> None:
    other = kit.Gate()
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    gate(kit.x)
    assert type(other) is kit.Gate
    assert kit.factor(other) == 1


def test_two_models_with_different_kernels(kit: Any, gate: Any) -> None:
    other = kit.Gate()
    kit.swap_in(gate, [kit.candidate(kit.kernel_times(3))])
    kit.swap_in(other, [kit.candidate(kit.kernel_times(5))])
    assert (kit.factor(gate), kit.factor(other)) == (3, 5)
    swap_out(gate)
    assert (kit.factor(gate), kit.factor(other)) == (1, 5)


def test_a_plan_touches_nothing(kit: Any, gate: Any) -> None:
    made = plan(gate, [kit.candidate(kit.GateKernel)])
    assert not isinstance(made, str)
    assert made.resolve() is None
    assert type(gate) is kit.Gate
    assert made.commit()
    assert kit.factor(gate) == 2


def test_a_plan_says_that_no_kernel_is_left(kit: Any, gate: Any) -> None:
    made = plan(gate, [kit.candidate(ImportError("nope"))])
    assert not isinstance(made, str)
    with pytest.warns(UserWarning, match="nope"):
        reason = made.resolve()
    assert reason is not None
    assert "nope" in reason


def test_restore_brings_an_earlier_swap_back(kit: Any, gate: Any) -> None:
    kit.swap_in(gate, [kit.candidate(kit.kernel_times(3))])
    before = placed(gate)
    kit.swap_in(gate, [kit.candidate(kit.kernel_times(5))])
    restore(gate, before)
    assert kit.factor(gate) == 3
    restore(gate, None)
    assert not kit.is_swapped(gate)


def test_a_subclass_that_keeps_forward_matches(kit: Any) -> None:
    class Named(kit.Gate):  # type: ignore[misc, name-defined]
        pass

    gate = Named()
    assert matches(gate, kit.Gate)
    assert kit.swap_in(gate, [kit.candidate(kit.GateKernel)], target=kit.Gate)
    assert kit.factor(gate) == 2
    assert isinstance(gate, Named)


def test_a_subclass_that_overrides_forward_is_left_alone(kit: Any) -> None:
    class Own(kit.Gate):  # type: ignore[misc, name-defined]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    gate = Own()
    assert not kit.swap_in(gate, [kit.candidate(kit.GateKernel)], target=kit.Gate)
    assert type(gate) is Own


def test_a_base_class_of_the_target_is_left_alone(kit: Any, gate: Any) -> None:
    class Derived(kit.Gate):  # type: ignore[misc, name-defined]
        pass

    assert not matches(gate, Derived)


def test_a_swapped_module_still_matches(kit: Any, gate: Any) -> None:
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    assert matches(gate, kit.Gate)


def test_a_subclass_registry_does_not_hear_of_generated_classes(kit: Any) -> None:
    heard = []

    class Base(nn.Module):
        def __init_subclass__(cls, *, tag: str, **kwargs: Any) -> None:
            heard.append(cls)

    class Layer(Base, tag="x"):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    layer = Layer()
    assert kit.swap_in(layer, [kit.candidate(Kernel)])
    assert heard == [Layer]


def test_a_lazy_module_is_left_alone_with_a_reason(kit: Any) -> None:
    wanted = kit.candidate(kit.GateKernel)
    lazy = nn.LazyLinear(3)
    assert not kit.swap_in(lazy, [wanted])
    assert "first forward" in wanted.binding.notes[0]


def test_no_reference_cycle_keeps_a_module_alive(kit: Any) -> None:
    gate = kit.Gate()
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    gate(kit.x)
    gone = weakref.ref(gate)
    gc.disable()
    try:
        del gate
        assert gone() is None
    finally:
        gc.enable()


def test_generated_classes_go_with_their_target(kit: Any) -> None:
    class Passing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    module = Passing()
    kit.swap_in(module, [kit.candidate(Kernel)])
    module(kit.x)
    gone = weakref.ref(Passing)
    del module, Passing
    gc.collect()  # the generated class, whose cache entry held its target
    gc.collect()
    assert gone() is None


def test_a_builtin_layer_can_be_swapped(kit: Any) -> None:
    class LinearKernel(nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, self.weight, self.bias) + 1

    linear = nn.Linear(4, 2)
    expected = linear(kit.x) + 1
    kit.swap_in(linear, [kit.candidate(LinearKernel)])
    assert torch.equal(linear(kit.x), expected)


def test_alike_modules_share_a_plan(kit: Any) -> None:
    model, other = kit.Model(), kit.Gate().eval()
    made = plan(model.first, [kit.candidate(kit.GateKernel)])
    assert not isinstance(made, str)
    assert made.also(model.second)
    assert not made.also(other)
    made.commit()
    assert (kit.is_swapped(model.first), kit.is_swapped(model.second), kit.is_swapped(other)) == (
        True,
        True,
        False,
    )
    made.undo()
    assert not kit.is_swapped(model.second)


def test_a_swapped_module_outlives_a_reset_of_the_runtime(kit: Any, gate: Any, clean_registry: Any) -> None:
    original = type(gate)
    kit.swap_in(gate, [kit.candidate(kit.kernel_times(3))], pinned=Mode.parse("inference"))
    gate(kit.x)
    runtime.reset()
    assert kit.factor(gate) == 3
    assert kit.factor(copy.deepcopy(gate)) == 3
    assert kit.factor(gate.eval()) == 3
    kit.swap_in(gate, [kit.candidate(kit.kernel_times(5))])
    assert kit.factor(gate) == 5
    swap_out(gate)
    assert type(gate) is original
