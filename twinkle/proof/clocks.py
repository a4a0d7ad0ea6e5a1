"""What a call costs: seconds of the host and of the device, and several calls held against each other.

On a shared machine two runs of one program differ by half. So calls take turns round by round, each is held
against the original of its own round, and the rounds are ranked: one that something else disturbed is at the
edge.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from twinkle.ops import machine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["FEWEST", "NOT_SLOWER", "Clock", "Cost", "Paired", "clock_for", "in_turns"]

NOT_SLOWER = 1.0
"""Times as fast as the original that a kernel has to be in three rounds of four: what is a little slower than
that is not made up for by anything."""
FEWEST, MOST = 7, 21
"""Rounds; more than the fewest where these leave a doubt."""
_ROUND_OF_CPU, _ROUND_OF_GPU = 4e-4, 1e-3
"""Seconds that the calls of one way take in a round at least: the clocks tell microseconds, and a GPU's
driver and the thread of autograd, which have slept until the device was done, are slow at first."""
_MOST_CALLS = 64
_CYCLES = 2_000_000_000
"""Of a GPU in a second, about."""
_FIRST_SLEEP = 1e-3


class Cost(NamedTuple):
    """Seconds of one call.

    Attributes:
        host: Of the host: on a GPU until everything is issued, on a CPU the time of the processor.
        device: Of the GPU; on a CPU the time that passed.
    """

    host: float
    device: float


class Clock(Protocol):
    """Measures calls on one kind of device.

    Attributes:
        round: Seconds that the calls of one way take in a round at least.
    """

    round: float

    def spent(self, call: Callable[[], object], times: int) -> Cost:
        """What one of so many calls in a row costs."""
        ...

    def views(self, cost: Cost, original: Cost) -> Sequence[float]:
        """What two calls are compared by: a kernel is slower where it is in one of them.

        Args:
            cost: Of one of the two.
            original: Of the original, which says what the wall may be.
        """
        ...


class CPUClock:
    """Processor time; on several threads also the time that passes.

    The threads of a pool use their processors while they wait: an op that is done sooner on all cores may
    take more of them, and one that takes less may be done later.
    """

    round = _ROUND_OF_CPU

    def spent(self, call: Callable[[], object], times: int) -> Cost:
        """See :class:`Clock`."""
        used, began = time.process_time(), time.perf_counter()
        for _ in range(times):
            call()
        return Cost((time.process_time() - used) / times, (time.perf_counter() - began) / times)

    def views(self, cost: Cost, original: Cost) -> Sequence[float]:
        """See :class:`Clock`."""
        return cost[:1] if machine.one_thread() else cost


class GPUClock:
    """The time until calls are issued, and what the GPU takes for them when it has not to wait for the host.

    It is kept busy before: what it does then is measured by events on its own stream, and the host is not
    held up by it. Nothing is known here of the program's other layers. Where the original takes the device
    less than the host either may be the wall:

    - what the call takes alone, again and again, is the larger of the two;
    - what it takes of a program whose wall is the host in one half of its time, and the device in the other,
      is their sum. A kernel that saves little on the device and costs more to launch shows here.

    Where already the original takes the device longer than the host, the device is the wall of the program by
    far: what kernels replace are the operations that read much and compute little, and the products of
    matrices between them, of the same sizes, take the device longer still for a launch each. Of what the
    host takes a part counts then, for a program is more than its layers.
    """

    round = _ROUND_OF_GPU

    def __init__(self) -> None:
        self._sleep = _FIRST_SLEEP

    def spent(self, call: Callable[[], object], times: int) -> Cost:
        """See :class:`Clock`."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.current_stream().synchronize()
        torch.cuda._sleep(int(self._sleep * _CYCLES))
        call()  # wakes what has slept
        begin.record()
        began = time.perf_counter()
        for _ in range(times):
            call()
        host = time.perf_counter() - began
        end.record()
        end.synchronize()
        # Once and a half as long as it took to issue the calls; those to come may be held up.
        with_first = host * (times + 1) / times
        self._sleep = min(max(1.5 * with_first, _FIRST_SLEEP / 4), 20 * _FIRST_SLEEP)
        return Cost(host / times, begin.elapsed_time(end) / 1e3 / times)

    def views(self, cost: Cost, original: Cost) -> Sequence[float]:
        """See :class:`Clock`."""
        if original.device >= original.host:
            return max(cost.device, cost.host / 2), cost.device + cost.host / 4
        return max(cost), sum(cost)


def clock_for(device: torch.device) -> Clock | None:
    """The clock for calls on a device; None where there is none."""
    if device.type == "cpu":
        return CPUClock()
    return GPUClock() if device.type == "cuda" else None


class Paired(NamedTuple):
    """One way of a call, held against the original.

    Attributes:
        ratio: Times as fast as the original, in the middle round.
        low: The same in the round that a quarter of all are below.
        cost: The middle cost of a call.
    """

    ratio: float
    low: float
    cost: Cost

    @property
    def is_clear(self) -> bool:
        """Whether more rounds would hardly change what is made of it."""
        return self.low >= NOT_SLOWER or self.ratio < 0.93 * NOT_SLOWER

    @property
    def is_not_slower(self) -> bool:
        """Whether the kernel may run for its speed; in doubt not."""
        return self.low >= NOT_SLOWER


def in_turns(
    ways: Mapping[str, Callable[[], object]],
    clock: Clock,
    *,
    seconds: float,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Paired] | None:
    """Let ways of a call take turns, and hold each against the first, which is the original.

    Args:
        ways: Functions that make the call; each has run before.
        clock: For their device.
        seconds: How long it may take; a doubt that is left by then stays.
        now: Tells the seconds that pass.

    Returns:
        One for each way, the original among them (whose ratio is 1); None where the fewest rounds do not
        fit in the time.
    """
    began = now()
    first = [min(max(clock.spent(call, 1)) for _ in range(2)) for call in ways.values()]
    longest = max(first)
    if longest * len(ways) * FEWEST > seconds:
        return None
    times = min(_MOST_CALLS, math.ceil(clock.round / max(min(first), 1e-6)))
    times = max(1, min(times, int(seconds / (longest * len(ways) * FEWEST))))
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for number in range(1, MOST + 1):
        order = list(ways) if number % 2 else list(ways)[::-1]
        for name in order:
            costs[name].append(clock.spent(ways[name], times))
        if number == FEWEST and all(one.is_clear for one in _paired(costs, clock).values()):
            break  # asked once: to stop at the first look that is clear would be to choose it
        if number >= FEWEST and now() - began > seconds:
            break
        if now() - began > 2 * seconds:
            return None
    return _paired(costs, clock)


def _paired(costs: Mapping[str, list[Cost]], clock: Clock) -> dict[str, Paired]:
    original = next(iter(costs.values()))
    found = {}
    for name, own in costs.items():
        ratios = sorted(_ratio(clock, *pair) for pair in zip(original, own, strict=True))
        middle = Cost(*(statistics.median(part) for part in zip(*own, strict=True)))
        found[name] = Paired(statistics.median(ratios), ratios[len(ratios) // 4], middle)
    return found


def _ratio(clock: Clock, original: Cost, kernel: Cost) -> float:
    pairs = zip(clock.views(original, original), clock.views(kernel, original), strict=True)
    return min(theirs / max(ours, 1e-9) for theirs, ours in pairs)
