"""Calls that take turns: what follows from the seconds, on clocks that say what a test wants."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import pytest
import torch

from twinkle.ops import machine
from twinkle.proof.clocks import FEWEST, MOST, Cost, CPUClock, GPUClock, clock_for, in_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Script:
    """A clock that says for each way what its next round costs.

    Args:
        rounds: By the name of a way, the costs of its rounds, over and over.
        views: What two costs are compared by.
    """

    def __init__(
        self,
        rounds: dict[str, list[Cost]],
        views: Callable[[Cost, Cost], Sequence[float]] = lambda cost, original: cost[:1],
    ) -> None:
        self.round = 4e-4
        self.ways = {name: lambda: None for name in rounds}
        self._costs: dict[Callable[[], object], Iterator[Cost]] = {
            self.ways[name]: itertools.cycle(costs) for name, costs in rounds.items()
        }
        self.views = views
        self.calls = 0

    def spent(self, call: Callable[[], object], times: int) -> Cost:
        self.calls += 1
        return next(self._costs[call])


def of_host(*microseconds: float) -> list[Cost]:
    return [Cost(one * 1e-6, 0.0) for one in microseconds]


def measured(original: list[Cost], kernel: list[Cost]) -> tuple[float, bool]:
    script = Script({"original": original, "kernel": kernel})
    found = in_turns(script.ways, script, seconds=1.0)
    assert found is not None
    return round(found["kernel"].ratio, 2), found["kernel"].is_not_slower


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [(50, (2.0, True)), (99, (1.01, True)), (100, (1.0, True)), (101, (0.99, False)), (200, (0.5, False))],
)
def test_a_kernel_is_slower_below_the_original(kernel: float, expected: tuple[float, bool]) -> None:
    assert measured(of_host(100), of_host(kernel)) == expected


def test_a_round_that_something_else_disturbed_decides_nothing() -> None:
    disturbed = of_host(80, 80, 80, 80, 80, 80, 900, 80)
    assert measured(of_host(100), disturbed) == (1.25, True)
    assert measured(of_host(100, 100, 100, 100, 900, 100, 100), of_host(110)) == (0.91, False)


def test_what_slows_both_down_decides_nothing() -> None:
    drift = [100 + 40 * number for number in range(12)]
    assert measured(of_host(*drift), of_host(*(0.8 * one for one in drift))) == (1.25, True)


def test_in_doubt_it_is_the_original() -> None:
    assert measured(of_host(100), of_host(90, 120, 90)) == (1.11, False)


@pytest.mark.parametrize(("kernel", "rounds"), [(of_host(80), FEWEST), (of_host(90, 120, 90), MOST)])
def test_a_doubt_takes_more_rounds(kernel: list[Cost], rounds: int) -> None:
    script = Script({"original": of_host(100), "kernel": kernel})
    in_turns(script.ways, script, seconds=1.0)
    assert script.calls == 2 * (2 + rounds)


def test_the_time_that_it_may_take_ends_the_doubt() -> None:
    script = Script({"original": of_host(100), "kernel": of_host(90, 120, 90)})
    clock = itertools.count()
    found = in_turns(script.ways, script, seconds=FEWEST + 1, now=lambda: float(next(clock)))
    assert found is not None
    assert script.calls < 2 * (2 + MOST)


def test_calls_that_take_too_long_are_not_measured() -> None:
    script = Script({"original": of_host(100_000), "kernel": of_host(50_000)})
    assert in_turns(script.ways, script, seconds=0.25) is None
    assert script.calls == 4, "and that takes no round"


def on_gpu(host: float, device: float) -> list[Cost]:
    return [Cost(host * 1e-6, device * 1e-6)]


@pytest.mark.parametrize(
    ("original", "kernel", "is_not_slower"),
    [
        ((40, 5), (15, 4), True),  # the host is the wall, and fewer launches are the way
        ((8, 500), (25, 250), True),  # the device is
        ((8, 10), (25, 8), False),  # it saves on the device what nobody waits for
        ((30, 25), (45, 18), False),  # sooner where the device is the wall, later where the host is
        ((30, 20), (15, 60), False),
        # Where the original is long on the device, so are the matrix products around it.
        ((180, 276), (250, 84), True),
        ((324, 424), (549, 125), True),
        ((8, 100), (60, 95), False),  # for little
        ((20, 30), (90, 10), False),  # and not for what the host takes thrice as long for
    ],
)
def test_host_and_device_both_count(
    original: tuple[float, float], kernel: tuple[float, float], is_not_slower: bool
) -> None:
    rounds = {"original": on_gpu(*original), "kernel": on_gpu(*kernel)}
    script = Script(rounds, GPUClock().views)
    found = in_turns(script.ways, script, seconds=1.0)
    assert found is not None
    assert found["kernel"].is_not_slower is is_not_slower


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_cpu_counts_work_and_not_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = CPUClock()
    cost = clock.spent(lambda: time.sleep(0.02), 2)
    assert cost.host < 0.01 < cost.device
    assert clock.spent(lambda: spin(0.002), 2).host >= 0.002
    monkeypatch.setattr(machine, "one_thread", lambda: True)
    assert clock.views(cost, cost) == (cost.host,)
    monkeypatch.setattr(machine, "one_thread", lambda: False)
    assert clock.views(cost, cost) == cost


def test_a_busy_loop_is_slower_than_half_of_it() -> None:
    ways: dict[str, Callable[[], object]] = {"original": lambda: spin(2e-4), "kernel": lambda: spin(1e-4)}
    found = in_turns(ways, CPUClock(), seconds=1.0)
    assert found is not None
    assert found["kernel"].is_not_slower
    assert 1.5 < found["kernel"].ratio < 2.5


def test_there_is_no_clock_for_a_device_nobody_measured() -> None:
    assert clock_for(torch.device("meta")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured_apart_from_its_host() -> None:
    clock = GPUClock()
    x = torch.ones(1 << 26, device="cuda")
    small = torch.ones(1, device="cuda")
    for _ in range(3):
        large, tiny = clock.spent(lambda: x.add_(1), 8), clock.spent(lambda: small.add_(1), 8)
    assert large.device > 5 * large.host, "512 MiB take a tenth of a millisecond, a launch some microseconds"
    assert tiny.device < large.device / 5
