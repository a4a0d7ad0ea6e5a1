"""Whether a kind of call is captured: by the times of host and device, of a device that is made up."""

from __future__ import annotations

import copy
import gc
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from twinkle.capture import kinds
from twinkle.capture.kinds import Kind

from .emulated import put_in
from .nets import Block


class Layer(nn.Module):
    def forward(self, x: int) -> int:
        return x + 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A device whose calls take ``device`` ms, and a host that issues each in ``host`` ms."""
    times: dict[str, Any] = {"host": 1.0, "device": 1.0, "done": True}
    clock = itertools.count()

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return bool(times["done"])

        def elapsed_time(self, end: Any) -> float:
            return float(times["device"])

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return next(clock) * times["host"] / 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(kinds, "time", Clock)
    return times


class Memory:
    def allocated(self) -> int:
        return 0


def timed(count: int = 5) -> Kind:
    kind = Kind()
    assert [kind.timed(Layer(), (1,), {}, Memory()) for _ in range(count)] == [2] * count
    return kind


@pytest.mark.parametrize(
    ("host", "busy", "captured"),
    [(1.0, 1.02, True), (1.0, 0.9, True), (1.0, 1.3, False), (2.0, 9.0, False), (0.1, 0.11, True)],
)
def test_the_wall_decides(device: dict[str, Any], host: float, busy: float, captured: bool) -> None:
    device.update(host=host, device=busy)
    kind = timed()
    why = kind.decide()
    assert (why is None) is captured
    assert kind.chosen is captured
    if not captured:
        assert why == f"not faster here: the device takes {busy:.2f} ms, the host {host:.2f} ms"
    device.update(host=1.0, device=1.0 if not captured else 50.0)
    assert kind.decide() == why  # once for all


def test_a_device_that_has_not_come_so_far_is_asked_again(device: dict[str, Any]) -> None:
    device["done"] = False
    kind = timed()
    assert kind.decide() == "the device has not come so far"
    assert not kind.chosen
    device["done"] = True
    assert kind.decide() is None
    assert kind.chosen


def test_a_device_that_is_steps_behind_is_the_wall(device: dict[str, Any]) -> None:
    device["done"] = False
    kind = timed(2)
    found = [kind.decide() for _ in range(8)]
    assert found[-1] == "not faster here: the device is more than a step behind the host"
    assert kind.refused


@pytest.mark.parametrize(("tokens", "stays"), [(5, True), (10, True), (25, False)])
def test_recordings_make_way_for_calls_larger_than_any_before(tokens: int, stays: bool) -> None:
    """An evaluation of larger batches, say, finds what it would find without recordings."""
    torch.manual_seed(0)
    plain = Block()
    ours = copy.deepcopy(plain)
    stack = put_in([ours])
    assert stack.pool is not None
    x = torch.randn(2, 5, 8)
    for _ in range(4):
        assert torch.equal(ours(x), plain(x))
    [kind] = stack.kinds.values()
    kind.kept = 1000  # as measured on a GPU
    for training in (True, False):
        stack.pool.graphs(training=training).free = lambda: 5000
    assert stack.record.held
    larger = torch.randn(2, tokens, 8)
    with torch.no_grad():
        assert torch.equal(ours(larger), plain(larger))
    gc.collect()  # an emulated graph is held by what it has recorded
    assert (stack.record.held > 0) is stays
    for training in (True, False):
        stack.pool.graphs(training=training).free = lambda: 1 << 40
    for _ in range(4):
        assert torch.equal(ours(x), plain(x))
    assert stack.record.replays == (2 + 4 if stays else 2 + 2), stack.record.calls
