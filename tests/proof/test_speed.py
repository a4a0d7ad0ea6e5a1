"""The measurement of a kernel at a call: what it finds, what it leaves behind, and what is kept of it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from twinkle.ops.plain import pays
from twinkle.proof import speed as measuring
from twinkle.proof.cache import ProofCache
from twinkle.proof.clocks import Cost, Paired
from twinkle.proof.first_use import Subject
from twinkle.proof.speed import KERNEL, ORIGINAL, SMALL_TOO, Speed, Unmeasured, speed_at_call
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SOURCE = SimpleNamespace(
    kind="embedded", op="rms_norm", variant=SimpleNamespace(name="fake"), facts={}, backend="cpu_backend"
)


pytestmark = pytest.mark.usefixtures("clean_registry")  # each test has the time that a process has


@pytest.fixture
def cache_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TWINKLE_CACHE", str(tmp_path))
    return tmp_path / "proofs"


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ways that took turns in each measurement, which costs no time: the kernel is 1.5 times as fast."""
    made: list[list[str]] = []

    def in_turns(ways: dict[str, Callable[[], object]], clock: object, *, seconds: float) -> Any:
        made.append(list(ways))
        found = {name: Paired(1.5, 1.5, Cost(1e-5, 1e-5)) for name in ways}
        return {**found, ORIGINAL: Paired(1.0, 1.0, Cost(1.5e-5, 1.5e-5))}

    monkeypatch.setattr(measuring, "in_turns", in_turns)
    return made


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def slow(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slower(*args: Any, **kwargs: Any) -> Any:
        spin(seconds)
        return function(*args, **kwargs)

    return slower


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def measure(
    kernel: Callable[..., Any],
    *args: Any,
    original: Callable[..., Any] = double,
    grad: bool = False,
    source: Any = SOURCE,
    layer: bool = False,
) -> Speed | Unmeasured:
    subject = Subject(source, original, kernel, type(args[0]) if layer else None, recall=True)
    return speed_at_call(subject, args, {}, grad=grad)


def test_a_slower_kernel_leaves_the_call_to_the_original() -> None:
    found = measure(slow(double, 3e-4), torch.ones(4, 8), original=slow(double, 1e-4))
    assert isinstance(found, Speed)
    assert found.way == ORIGINAL
    assert 0.2 < found.ratio < 0.6
    assert found.at == "4x8 float32"
    assert found.kernel.host > found.original.host > 1e-4


def test_a_faster_kernel_takes_the_call() -> None:
    found = measure(slow(double, 1e-4), torch.ones(4, 8), original=slow(double, 3e-4))
    assert isinstance(found, Speed)
    assert found.way == KERNEL
    assert found.ratio > 1.5


def test_the_backward_counts_where_gradients_are_recorded() -> None:
    class SlowBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            spin(5e-4)
            return dy * 2

    x = torch.ones(4, 8, requires_grad=True)
    original = slow(double, 2e-4)
    training = measure(SlowBackward.apply, x, original=original, grad=True)
    inference = measure(SlowBackward.apply, x, original=original)
    assert isinstance(training, Speed)
    assert isinstance(inference, Speed)
    assert (training.way, inference.way) == (ORIGINAL, KERNEL)
    assert training.at == "4x8 float32 with gradients"
    assert x.grad is None


def test_a_kernel_is_measured_with_and_without_the_size_in_its_code(turns: list[list[str]]) -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x + x if pays(x, 1 << 20) else x * 2

    measure(kernel, torch.ones(4))
    measure(double, torch.ones(4))
    assert turns == [[ORIGINAL, KERNEL, SMALL_TOO], [ORIGINAL, KERNEL]]
    assert not pays(torch.ones(4), 5), "and nothing of that is left"


def test_the_size_in_its_code_is_left_out_where_that_is_faster() -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        spin(1e-4 if pays(x, 1 << 20) else 4e-4)
        return x * 2

    found = measure(kernel, torch.ones(4), original=slow(double, 3e-4))
    assert isinstance(found, Speed)
    assert found.way == SMALL_TOO


class Noisy(nn.Module):
    """Draws random numbers, counts its calls in a buffer and writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        with torch.no_grad():
            x += random.random() + torch.rand(())
        return nn.functional.dropout(x * self.weight, 0.5, training=True)


def test_nothing_of_it_is_left_in_the_program() -> None:
    module, x = Noisy(), torch.ones(4, 8, requires_grad=True)
    hooked: list[object] = []
    module.register_forward_hook(lambda *values: hooked.append(values))
    before = torch.get_rng_state(), random.getstate(), x.detach().clone(), x._version
    found = measure(Noisy.forward, module, x, original=Noisy.forward, grad=True, layer=True)
    assert isinstance(found, Speed)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert torch.equal(x, before[2])
    assert x._version == before[3]
    assert (float(module.calls), module.weight.grad, x.grad, hooked) == (0.0, None, None, [])
    assert torch.is_grad_enabled()


def test_a_kernel_that_raises_is_not_measured(turns: list[list[str]]) -> None:
    def raises(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    found = measure(raises, torch.ones(4))
    assert found == Unmeasured("RuntimeError when it was measured", for_good=True)
    assert turns == []


def test_a_call_in_a_transform_is_measured_at_another_time(turns: list[list[str]]) -> None:
    found: list[Any] = []
    torch.func.vmap(lambda x: found.append(measure(double, x)) or x)(torch.ones(2, 4))
    assert found == [Unmeasured("inside torch.func", for_good=False)]
    assert turns == []


def test_autocast_is_in_force_and_said(turns: list[list[str]]) -> None:
    seen: list[bool] = []

    def kernel(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return x * 2

    with torch.autocast("cpu"):
        found = measure(kernel, torch.ones(4, 8))
    assert isinstance(found, Speed)
    assert all(seen)
    assert found.at == "4x8 float32 under autocast"


def test_the_time_of_a_process_is_bounded() -> None:
    x, found = torch.ones(4, 8), []
    began = time.perf_counter()
    for _ in range(60):
        found.append(measure(slow(double, 1e-3), x, original=slow(double, 1e-3)))
        if isinstance(found[-1], Unmeasured):
            break
    assert isinstance(found[-1], Unmeasured), "the last one of all does not fit, or there is nothing left"
    assert found[-1].for_good
    assert 1.0 < time.perf_counter() - began < 6.0


def test_a_long_call_is_made_a_few_times_alone() -> None:
    calls = []

    def original(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        spin(0.03)
        return x * 2

    assert measure(double, torch.ones(4), original=original) == measuring.TOO_LONG
    assert len(calls) == 3


def test_one_measurement_at_a_time() -> None:
    inside: list[int] = []
    most: list[int] = []

    def kernel(x: torch.Tensor) -> torch.Tensor:
        inside.append(1)
        most.append(len(inside))
        spin(1e-4)
        inside.pop()
        return x * 2

    def work() -> None:
        found.append(measure(kernel, torch.ones(4, 8), original=kernel))

    found: list[Speed | Unmeasured] = []
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert max(most) == 1


# -- what is kept ---------------------------------------------------------------------------------


def test_the_next_process_takes_the_figures_of_this_one(cache_here: Path, turns: list[list[str]]) -> None:
    first = measure(double, torch.ones(4, 8))
    runtime.reset()
    second = measure(double, torch.ones(5, 8))
    assert len(turns) == 1
    assert isinstance(first, Speed)
    assert isinstance(second, Speed)
    assert second._replace(date=None) == first
    assert second.date is not None


@pytest.mark.parametrize("change", ["size", "dtype", "gradients", "original", "threads", "host", "version"])
def test_figures_are_for_what_was_measured(
    cache_here: Path, turns: list[list[str]], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    measure(double, torch.ones(4, 8))
    runtime.reset()
    x = torch.ones(16 if change == "size" else 4, 8)
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    elif change == "host":
        monkeypatch.setattr(measuring, "processor", lambda: "another one")
    elif change == "version":
        monkeypatch.setattr("twinkle.proof.cache_key.kernel_version", lambda op: "another one")
    measure(
        double,
        x.double() if change == "dtype" else x,
        original=(lambda x: x + x) if change == "original" else double,
        grad=change == "gradients",
    )
    assert len(turns) == 2


def test_a_users_own_kernel_is_measured_in_each_process(cache_here: Path, turns: list[list[str]]) -> None:
    own = SimpleNamespace(kind="code")
    for _ in range(2):
        assert isinstance(measure(double, torch.ones(4, 8), source=own), Speed)
        runtime.reset()
    assert len(turns) == 2


def test_figures_that_were_changed_are_measured_anew(cache_here: Path, turns: list[list[str]]) -> None:
    measure(double, torch.ones(4, 8))
    (file,) = cache_here.glob("*.json")
    file.write_text(file.read_text().replace("1.5", "9.5"))
    runtime.reset()
    measure(double, torch.ones(4, 8))
    assert len(turns) == 2


def test_figures_are_no_verdict(tmp_path: Path) -> None:
    cache = ProofCache(tmp_path / "proofs")
    cache.keep_figures({"op": "rms_norm"}, {"way": "kernel"})
    again = ProofCache(cache.path)
    assert again.verdict_of({"op": "rms_norm"}) is None
    assert again.figures_of({"op": "rms_norm"}) is not None
    assert again.clear() == 1
    assert again.figures_of({"op": "rms_norm"}) is None


PROGRAM = """
import json, torch, twinkle
twinkle.activate()
from torch import nn
import twinkle.proof.speed as speed
real, made = speed.in_turns, []
speed.in_turns = lambda *args, **kwargs: made.append(1) or real(*args, **kwargs)

class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(dtype)

norm = Norm(32)
for rows in (2, 3, 40, 2):
    norm(torch.randn(rows, 32, requires_grad=True)).sum().backward()
binding = next(b for b in twinkle.report.snapshot()["bindings"] if b["target"].endswith("Norm"))
print(json.dumps({"made": len(made), **binding}))
"""


def test_a_second_process_measures_nothing_and_chooses_the_same(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_")}
    environ |= {
        "TWINKLE_CONFIG": "auto",
        "TWINKLE_SIZES": "auto",
        "TWINKLE_CACHE": str(tmp_path / "cache"),
        "TRITON_INTERPRET": "0",
    }
    environ["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    (tmp_path / "program.py").write_text(PROGRAM)
    runs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "program.py")],
            env=environ,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = runs
    assert (first["made"], second["made"]) == (2, 0), "2 and 3 rows are of one size, 40 of another"
    for speeds in (first["speeds"], second["speeds"]):
        for figures in speeds.values():
            figures.pop("date")
    assert first["speeds"] == second["speeds"]
    assert list(first["speeds"]) == ["2x32 float32 with gradients", "40x32 float32 with gradients"]
    assert first["state"] == second["state"]
