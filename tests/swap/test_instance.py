"""Wrappers that stand in an instance's ``__dict__``: before the swap, after it, and in any order out."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import pytest
import torch

from twinkle.swap.layers import plan, swap_out
from twinkle.targets import own_forward


def hook_like_accelerate(module: Any) -> Any:
    """What accelerate's ``add_hook_to_module`` does: adds one to the output."""
    module._old_forward = module.forward

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module._old_forward(*args, **kwargs) + 1

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)
    return module.forward


def unhook_like_accelerate(module: Any) -> None:
    module.forward = module._old_forward
    del module._old_forward


def wrap_with_closure(module: Any) -> Any:
    old = module.forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return old(*args, **kwargs) + 1

    module.forward = wrapper
    return wrapper


def wrap_twice(module: Any) -> Any:
    inner = wrap_with_closure(module)

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    module.forward = outer
    return outer


def wrap_with_partial(module: Any) -> Any:
    module.forward = functools.partial(lambda old, x: old(x) + 1, module.forward)
    return module.forward


def wrap_with_default(module: Any) -> Any:
    def wrapper(x: Any, _old: Any = module.forward) -> Any:
        return _old(x) + 1

    module.forward = wrapper
    return wrapper


def wrap_with_object(module: Any) -> Any:
    class Wrapper:
        def __init__(self, old: Any) -> None:
            self.old = old

        def __call__(self, x: Any) -> Any:
            return self.old(x) + 1

    module.forward = Wrapper(module.forward)
    return module.forward


WRAPPERS = [
    hook_like_accelerate,
    wrap_with_closure,
    wrap_twice,
    wrap_with_partial,
    wrap_with_default,
    wrap_with_object,
]
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)


def outputs(kit: Any, gate: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The original's and the kernel's output, each with what the wrapper adds."""
    original = own_forward(kit.Gate)
    return original(gate, kit.x) + 1, kit.GateKernel.forward(gate, kit.x) + 1


@each_wrapper
def test_a_wrapper_from_before_stays_and_the_kernel_runs_beneath(kit: Any, wrap: Any) -> None:
    gate = kit.Gate()
    wrapper = wrap(gate)
    assert kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    assert gate.__dict__["forward"] is wrapper
    for _ in range(2):
        assert torch.equal(gate(kit.x), outputs(kit, gate)[1])


@each_wrapper
def test_a_wrapper_from_before_stays_when_the_kernel_goes(kit: Any, wrap: Any) -> None:
    gate = kit.Gate()
    wrapper = wrap(gate)
    before = dict(gate.__dict__)
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    gate(kit.x)
    swap_out(gate)
    assert gate.__dict__["forward"] is wrapper
    assert gate.__dict__ == before
    assert torch.equal(gate(kit.x), outputs(kit, gate)[0])


@each_wrapper
@pytest.mark.parametrize("ran", [True, False])
def test_a_wrapper_put_on_later_loses_the_kernel_when_it_is_taken_out(kit: Any, wrap: Any, ran: bool) -> None:
    gate = kit.Gate()
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    if ran:
        gate(kit.x)
    wrapper = wrap(gate)
    assert torch.equal(gate(kit.x), outputs(kit, gate)[1])
    swap_out(gate)
    assert gate.__dict__["forward"] is wrapper
    assert torch.equal(gate(kit.x), outputs(kit, gate)[0])


def test_an_accelerate_hook_from_before_can_be_removed_first(kit: Any) -> None:
    gate = kit.Gate()
    hook_like_accelerate(gate)
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    unhook_like_accelerate(gate)
    assert kit.factor(gate) == 2
    swap_out(gate)
    assert type(gate) is kit.Gate
    assert kit.factor(gate) == 1


def test_an_accelerate_hook_from_after_can_be_removed_last(kit: Any) -> None:
    gate = kit.Gate()
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    hook_like_accelerate(gate)
    swap_out(gate)
    unhook_like_accelerate(gate)
    assert kit.factor(gate) == 1


def test_a_wrapper_follows_other_candidates(kit: Any) -> None:
    gate = kit.Gate()
    hook_like_accelerate(gate)
    kit.swap_in(gate, [kit.candidate(kit.kernel_times(3))])
    gate(kit.x)
    kit.swap_in(gate, [kit.candidate(kit.kernel_times(5))])
    torch.testing.assert_close(gate(kit.x), 5 * own_forward(kit.Gate)(gate, kit.x) + 1)


def test_a_wrapper_follows_modes(kit: Any) -> None:
    gate = kit.Gate()
    hook_like_accelerate(gate)
    kit.swap_in(
        gate,
        [
            kit.candidate(kit.kernel_times(3), mode="train"),
            kit.candidate(kit.kernel_times(5), mode="inference"),
        ],
    )
    for training, factor in ((True, 3), (False, 5), (True, 3)):
        gate.train(training)
        torch.testing.assert_close(gate(kit.x), factor * own_forward(kit.Gate)(gate, kit.x) + 1)


def test_a_forward_that_goes_elsewhere_is_left_alone_with_a_reason(kit: Any) -> None:
    def other(self: Any, x: torch.Tensor) -> torch.Tensor:
        return 7 * kit.Gate.forward(self, x)

    gate = kit.Gate()
    gate.forward = MethodType(other, gate)
    gate.saved = MethodType(kit.Gate.forward, gate)
    wanted = kit.candidate(kit.GateKernel)
    made = plan(gate, [wanted])
    assert isinstance(made, str)
    assert "forward of its own" in made
    assert "test_instance" in made
    assert not kit.swap_in(gate, [wanted])
    assert (kit.factor(gate), type(gate)) == (7, kit.Gate)


def test_a_wrapper_bound_to_another_module_is_left_alone(kit: Any) -> None:
    gate, other = kit.Gate(), kit.Gate()
    gate.forward = other.forward
    assert isinstance(plan(gate, [kit.candidate(kit.GateKernel)]), str)


def test_an_instance_forward_that_is_the_classs_own_is_swapped(kit: Any) -> None:
    gate = kit.Gate()
    gate.forward = gate.forward  # what is left behind by accelerate's remove_hook_from_module
    assert kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    assert kit.factor(gate) == 2
    swap_out(gate)
    assert kit.factor(gate) == 1


def test_accelerates_own_hooks(kit: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Plus(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def post_forward(self, module: Any, output: torch.Tensor) -> torch.Tensor:
            return output + 1

    before, after = kit.Gate(), kit.Gate()
    wanted = kit.candidate(kit.GateKernel)
    hooks.add_hook_to_module(before, Plus())
    wrapper = before.__dict__["forward"]
    for gate in (before, after):
        assert kit.swap_in(gate, [wanted])
    hooks.add_hook_to_module(after, Plus())
    assert before.__dict__["forward"] is wrapper
    for gate in (before, after):
        assert torch.equal(gate(kit.x), outputs(kit, gate)[1])
    hooks.remove_hook_from_module(before)
    swap_out(after)
    assert kit.is_swapped(before)
    assert kit.factor(before) == 2
    assert torch.equal(after(kit.x), outputs(kit, after)[0])
    hooks.remove_hook_from_module(after)
    swap_out(before)
    assert (kit.factor(before), kit.factor(after)) == (1, 1)
