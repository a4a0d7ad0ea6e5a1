"""Kernels that cannot be loaded, do not fit or raise: the original runs, and the reason is on record."""

from __future__ import annotations

import threading
import traceback
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from twinkle.errors import KernelError, TwinkleWarning
from twinkle.swap.layers import plan


class Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not on a Sunday")


def test_a_kernel_that_raises_at_its_first_call_is_quarantined(kit: Any) -> None:
    gate, wanted = kit.Gate(), kit.candidate(Raises)
    kit.swap_in(gate, [wanted])
    with pytest.warns(TwinkleWarning, match="not on a Sunday"):
        assert kit.factor(gate) == 1
    assert wanted.binding.state == "quarantined"
    assert "ValueError: not on a Sunday" in wanted.binding.reason
    assert "test_faults.py" in wanted.binding.reason


def test_the_warning_comes_once(kit: Any) -> None:
    model, wanted = kit.Model(), kit.candidate(Raises)
    kit.swap_in(model.first, [wanted])
    kit.swap_in(model.second, [wanted])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(kit.x)
        model(kit.x)
    assert len([w for w in caught if issubclass(w.category, TwinkleWarning)]) == 1


def test_warnings_as_errors_do_not_end_the_program(kit: Any) -> None:
    gate = kit.Gate()
    kit.swap_in(gate, [kit.candidate(Raises)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kit.factor(gate) == 1


def test_the_next_candidate_runs_after_a_quarantine(kit: Any) -> None:
    gate = kit.Gate()
    kit.swap_in(gate, [kit.candidate(Raises), kit.candidate(kit.kernel_times(5))])
    with pytest.warns(TwinkleWarning):
        gate(kit.x)
    assert kit.factor(gate) == 5


def test_an_error_of_the_originals_is_not_blamed_on_the_kernel(kit: Any) -> None:
    gate, wanted = kit.Gate(), kit.candidate(kit.GateKernel)
    kit.swap_in(gate, [wanted])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        gate(torch.ones(2, 7))
    assert caught.value.__context__ is None
    assert wanted.rejected is None
    assert kit.factor(gate) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_who_ends_the_program_ends_it(kit: Any, error: BaseException) -> None:
    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    gate, wanted = kit.Gate(), kit.candidate(Kernel)
    kit.swap_in(gate, [wanted])
    with pytest.raises(type(error)):
        gate(kit.x)
    assert wanted.rejected is None


def test_strict_raises_what_the_kernel_raises(kit: Any) -> None:
    gate = kit.Gate()
    kit.swap_in(gate, [kit.candidate(Raises, strict=True)])
    with pytest.raises(ValueError, match="Sunday"):
        gate(kit.x)


@pytest.mark.parametrize("error", [ImportError("no such thing"), SystemExit(3), RuntimeError("boom")])
def test_a_source_that_fails_leaves_the_original(kit: Any, error: BaseException) -> None:
    gate, wanted = kit.Gate(), kit.candidate(error)
    kit.swap_in(gate, [wanted])
    with pytest.warns(TwinkleWarning):
        assert kit.factor(gate) == 1
    assert wanted.binding.state == "failed"
    assert wanted.kernel.source.loads == 1
    gate(kit.x)
    assert wanted.kernel.source.loads == 1


def test_a_strict_candidate_raises_when_resolved(kit: Any) -> None:
    gate = kit.Gate()
    made = plan(gate, [kit.candidate(object(), strict=True)])
    assert not isinstance(made, str)
    with pytest.raises(KernelError, match="must be a class"):
        made.resolve()
    assert not kit.is_swapped(gate)


def test_a_dead_candidate_is_the_reason_of_a_plan(kit: Any) -> None:
    wanted = kit.candidate(Raises)
    wanted.reject("quarantined", "it was wrong")
    assert plan(kit.Gate(), [wanted]) == "it was wrong"


def test_retiring_turns_a_running_kernel_off_everywhere(kit: Any) -> None:
    one, other, wanted = kit.Gate(), kit.Gate(), kit.candidate(kit.GateKernel)
    other.eval()
    kit.swap_in(one, [wanted])
    kit.swap_in(other, [wanted])
    assert kit.factor(one) == 2
    with pytest.warns(TwinkleWarning, match="rounds otherwise"):
        wanted.reject("quarantined", "rounds otherwise")
    assert (kit.factor(one), kit.factor(other)) == (1, 1)


def test_an_instance_that_lacks_what_the_kernel_reads_keeps_its_original(kit: Any) -> None:
    class Scaled(nn.Module):
        def __init__(self, scaled: bool) -> None:
            super().__init__()
            if scaled:
                self.weight = nn.Parameter(torch.full((4,), 3.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight if hasattr(self, "weight") else x

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x * self.weight

    with_weight, without, later, wanted = Scaled(True), Scaled(False), Scaled(False), kit.candidate(Kernel)
    for module in (without, with_weight):
        kit.swap_in(module, [wanted])
    assert torch.equal(without(kit.x), kit.x)
    assert torch.equal(with_weight(kit.x), 6 * kit.x)
    assert not kit.swap_in(later, [wanted])
    assert (kit.is_swapped(without), kit.is_swapped(with_weight)) == (False, True)
    assert wanted.binding.instances == 1
    assert "reads self.weight" in wanted.binding.notes[0]


def test_two_kernels_may_have_members_of_the_same_name(kit: Any) -> None:
    gate = kit.Gate()
    first = kit.candidate(kit.kernel_times(3, helper=lambda self: 1), mode="train")
    second = kit.candidate(kit.kernel_times(5, helper=lambda self: 2), mode="inference")
    for wanted in (first, second):

        class Reads(wanted.kernel.source.thing):  # type: ignore[misc, name-defined]
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return (2 + self.helper()) * torch.sigmoid(self.proj(x)) * x

        wanted.kernel.source.thing = Reads
    kit.swap_in(gate, [first, second])
    assert [kit.factor(gate.train()), kit.factor(gate.eval()), kit.factor(gate.train())] == [3, 4, 3]


def test_two_kernels_with_members_that_cannot_be_told_apart(kit: Any) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, "helper", lambda: 1)() * torch.sigmoid(self.proj(x)) * x

    gate = kit.Gate()
    first, second = (
        kit.candidate(kit.kernel_times(1, forward=forward, helper=lambda self, n=n: n), mode=mode)
        for n, mode in ((3, "train"), (5, "inference"))
    )
    kit.swap_in(gate, [first, second])
    assert kit.factor(gate.train()) == 3
    with pytest.warns(TwinkleWarning, match="helper"):
        assert kit.factor(gate.eval()) == 3  # the training kernel is next in line
    assert second.binding.state == "failed"


def test_threads_load_once_and_all_get_a_result(kit: Any) -> None:
    gate, wanted = kit.Gate(), kit.candidate(kit.GateKernel)
    kit.swap_in(gate, [wanted])
    start, results = threading.Barrier(8), []

    def run() -> None:
        start.wait()
        results.append(kit.factor(gate))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [2.0] * 8
    assert wanted.kernel.source.loads == 1


def test_a_kernel_that_runs_its_target_while_it_loads(kit: Any) -> None:
    gate, wanted = kit.Gate(), kit.candidate(kit.GateKernel)
    kit.swap_in(gate, [wanted])
    inside = []
    load = wanted.kernel.source.load

    def load_and_run() -> object:
        inside.append(kit.factor(gate))
        return load()

    wanted.kernel.source.load = load_and_run
    assert kit.factor(gate) == 2
    assert inside == [1]


def test_constants_of_a_kernel_loaded_in_inference_mode_are_usable_later(kit: Any) -> None:
    gate, wanted = kit.Gate(), kit.candidate(kit.GateKernel)

    def load() -> object:
        two = torch.full((4,), 2.0)

        class Kernel(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.sigmoid(self.proj(x)) * x * two

        return Kernel

    wanted.kernel.source.load = load
    kit.swap_in(gate, [wanted])
    with torch.inference_mode():
        gate(kit.x)
    gate(kit.x).sum().backward()
    assert gate.proj.weight.grad is not None


def test_resolve_now_does_not_raise_for_a_candidate_that_is_not_strict(kit: Any) -> None:
    gate = kit.Gate()
    kit.swap_in(gate, [kit.candidate(ImportError("gone"))])
    with pytest.warns(TwinkleWarning, match="gone"):
        kit.resolve_now(gate)
    assert kit.factor(gate) == 1


def test_threads_that_meet_a_bad_kernel_all_get_the_originals_result(kit: Any) -> None:
    gates, wanted = [kit.Gate() for _ in range(4)], [kit.candidate(Raises), kit.candidate(RuntimeError("no"))]
    for index, gate in enumerate(gates):
        kit.swap_in(gate, wanted if index % 2 else wanted[::-1])
    start, results = threading.Barrier(8), []

    def run(gate: Any) -> None:
        start.wait()
        results.append(kit.factor(gate))

    threads = [threading.Thread(target=run, args=(gates[index % 4],), daemon=True) for index in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert results == [1.0] * 8


def test_a_traceback_stays_in_the_files_of_the_program(kit: Any) -> None:
    class Grumpy(kit.Gate):  # type: ignore[misc, name-defined]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("always")

    gate = Grumpy()
    kit.swap_in(gate, [kit.candidate(kit.GateKernel, device="cuda")])
    with pytest.raises(ValueError, match="always") as caught:
        gate(kit.x)
    frames = [(frame.filename, frame.name) for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert [name for file, name in frames if file == __file__][1:] == ["forward", "forward"]
    assert not any(file.startswith("<") for file, _ in frames)
