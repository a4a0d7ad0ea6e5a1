"""The way of a call: by its size to the kernel or the original, decided once and looked up from then on."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from twinkle.ops.plain import Least, at_every_size, pays
from twinkle.proof.clocks import Cost
from twinkle.proof.speed import KERNEL, ORIGINAL, SMALL_TOO, Speed, Unmeasured
from twinkle.records import Binding, FunctionKernel, LayerKernel
from twinkle.report import records
from twinkle.report.text import render
from twinkle.runtime import runtime
from twinkle.swap import ways
from twinkle.swap.candidate import Candidate, FunctionCandidate
from twinkle.swap.functions import FunctionDispatch

if TYPE_CHECKING:
    from collections.abc import Iterator

ran: list[str] = []
"""What computed the calls of a test, in their order."""


class Scale(nn.Module):
    """The layer of these tests."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            ran.append("original")
        return x * self.weight


class ScaleKernel(nn.Module):
    """Its kernel, which by itself begins at 1000 elements."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            ran.append("kernel" if pays(x, 1000) else "kernel, left to the definition")
        return self.weight * x


class Source:
    """As the source of an embedded kernel."""

    kind = "embedded"
    op = "rms_norm"
    backend = "cpu_backend"
    variant = SimpleNamespace(name="fake")

    def __init__(self, thing: object) -> None:
        self.thing = thing
        self.facts: dict[str, Any] = {}

    def describe(self) -> str:
        return "embedded"

    def load(self) -> object:
        return self.thing


class Speeds:
    """Measurements as a test wants them, and which were made."""

    def __init__(self) -> None:
        self.by_size: dict[int, Speed | Unmeasured] = {}
        self.made: list[tuple[int, bool]] = []

    def __call__(self, subject: Any, args: Any, kwargs: Any, *, grad: bool) -> Speed | Unmeasured:
        x = next(value for value in args if isinstance(value, torch.Tensor))
        self.made.append((x.numel(), grad))
        return self.by_size.get(x.numel(), speed(KERNEL, 2.0))


def speed(way: str, ratio: float, at: str = "2x2 float32") -> Speed:
    return Speed(way, ratio, ratio, Cost(1e-4, 1e-4), Cost(1e-4 / ratio, 1e-4 / ratio), at)


SLOW = speed(ORIGINAL, 0.9)


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch, clean_registry: object) -> Iterator[Speeds]:
    runtime.options.sizes = "auto"
    made = Speeds()
    monkeypatch.setattr(ways, "speed_at_call", made)
    ran.clear()
    yield made
    ran.clear()


def embedded(thing: object = ScaleKernel, *, proofs: int = 1, **options: Any) -> Candidate:
    kernel = LayerKernel("scale", Source(thing), chosen_by="twinkle")  # type: ignore[arg-type]
    for name, value in options.items():
        setattr(kernel.source, name, value)
    binding = Binding("layer", "tests:Scale", "scale", "embedded")
    return Candidate(kernel, binding, proofs=proofs)


@pytest.fixture
def swapped(kit: Any, speeds: Speeds) -> tuple[Scale, Candidate]:
    layer, candidate = Scale(), embedded()
    assert kit.swap_in(layer, [candidate])
    return layer, candidate


def call(layer: nn.Module, count: int, **options: Any) -> str:
    """What computes a call of so many elements."""
    del ran[:]
    x = torch.ones(count, **options)
    assert torch.equal(layer(x).detach(), x * 3)
    return ran[-1]


def test_each_size_is_measured_once(swapped: Any, speeds: Speeds) -> None:
    layer, _ = swapped
    for count in (4, 5, 7, 4, 8, 15, 2000, 1999, 4):
        call(layer, count)
    assert speeds.made == [(4, True), (8, True), (2000, True)]


def test_the_faster_way_takes_the_calls_of_its_size(swapped: Any, speeds: Speeds) -> None:
    layer, candidate = swapped
    speeds.by_size = {4: SLOW, 8: speed(SMALL_TOO, 1.2), 16: speed(KERNEL, 1.0)}
    assert [call(layer, count) for count in (4, 8, 16, 2000)] == [
        "original",
        "kernel",
        "kernel, left to the definition",
        "kernel",
    ]
    assert [call(layer, count) for count in (5, 9, 17)] == [
        "original",
        "kernel",
        "kernel, left to the definition",
    ]
    assert candidate.binding.state == "active"


def test_calls_with_and_without_gradients_go_their_own_ways(swapped: Any, speeds: Speeds) -> None:
    layer, _ = swapped
    call(layer, 4)
    speeds.by_size = {4: SLOW}
    with torch.no_grad():
        assert call(layer, 4) == "original"
    assert call(layer, 4) != "original"
    assert speeds.made == [(4, True), (4, False)]


def test_dtypes_and_autocast_go_their_own_ways(swapped: Any, speeds: Speeds) -> None:
    layer, _ = swapped
    speeds.by_size = {4: SLOW}
    assert call(layer, 4) == "original"
    speeds.by_size = {}
    assert call(layer, 4, dtype=torch.float64) != "original"
    with torch.autocast("cpu"):
        assert call(layer, 4) != "original"
        call(layer, 4)
    assert call(layer, 4) == "original"
    assert len(speeds.made) == 3


def test_a_binding_that_runs_at_no_size_is_skipped_with_its_figures(swapped: Any, speeds: Speeds) -> None:
    layer, candidate = swapped
    speeds.by_size = {count: speed(ORIGINAL, 0.949, f"{count} float32") for count in (4, 8, 16, 32, 64)}
    call(layer, 4)
    binding = candidate.binding
    assert (binding.state, binding.reason) == ("skipped", "not faster here (0.94x at 4 float32)")
    for count in (8, 16, 32, 64):
        call(layer, count)
    assert binding.reason.endswith("0.94x at 16 float32 and 2 sizes more)")
    candidate.mark_pending()
    candidate.mark_active()
    assert binding.state == "skipped", "another model that it is put in changes nothing"
    call(layer, 2000)
    assert binding.state == "active"
    assert binding.ran
    speeds.by_size[128] = SLOW
    call(layer, 128)
    assert binding.state == "active"


def test_the_report_gives_the_figures(swapped: Any, speeds: Speeds) -> None:
    layer, candidate = swapped
    runtime.registry.record(candidate.binding)
    speeds.by_size = {4: speed(ORIGINAL, 0.5, "4 float32"), 8: speed(KERNEL, 1.239, "8 float32")}
    call(layer, 4)
    call(layer, 8)
    told = records.snapshot()
    (binding,) = told["bindings"]
    assert binding["speeds"]["8 float32"] == {
        "ratio": 1.23,
        "low": 1.23,
        "runs": True,
        "original_us": [100.0, 100.0],
        "kernel_us": [80.7, 80.7],
        "date": None,
    }
    table = render(told)
    assert "beside its original: 1.23x at 8 float32" in table
    assert "not faster here, the original runs: 0.50x at 4 float32" in table


def test_a_doubt_is_called_one(swapped: Any, speeds: Speeds) -> None:
    layer, candidate = swapped
    runtime.registry.record(candidate.binding)
    speeds.by_size = {4: speed(ORIGINAL, 1.06, "4 float32")._replace(low=0.91)}
    call(layer, 4)
    assert candidate.binding.reason == "not faster here (1.06x in doubt at 4 float32)"
    call(layer, 8)
    assert "1.06x (0.91x or less in a quarter of the rounds) at 4 float32" in render(
        records.snapshot(), width=200
    )


def test_what_cannot_be_measured_goes_to_the_kernel(swapped: Any, speeds: Speeds) -> None:
    layer, candidate = swapped
    speeds.by_size = {4: Unmeasured("no room", for_good=True), 8: Unmeasured("not now", for_good=False)}
    assert call(layer, 4) == "kernel, left to the definition"
    call(layer, 4)
    assert len(speeds.made) == 1
    for _ in range(20):
        call(layer, 8)
    assert len(speeds.made) == 1 + 16, "and is not asked about for ever"
    assert candidate.binding.state == "active"


@pytest.mark.parametrize("sizes", ["fixed", "all"])
def test_settings_that_measure_nothing(kit: Any, speeds: Speeds, sizes: str) -> None:
    runtime.options.sizes = sizes
    layer = Scale()
    assert kit.swap_in(layer, [embedded()])
    expected = "kernel" if sizes == "all" else "kernel, left to the definition"
    assert call(layer, 4) == expected
    assert speeds.made == []


@pytest.mark.parametrize(
    "options", [{"op": "causal_lm_loss"}, {"guarded": True}, {"wraps": True}, {"proofs": 0}]
)
def test_kernels_that_no_speed_decides_about(kit: Any, speeds: Speeds, options: dict[str, Any]) -> None:
    layer = Scale()
    assert kit.swap_in(layer, [embedded(**options)])
    call(layer, 4)
    call(layer, 4)
    assert speeds.made == []
    assert ran[-1] != "original"


def test_a_kernel_of_the_users_runs_and_is_told_about(kit: Any, speeds: Speeds) -> None:
    layer = Scale()
    binding = Binding("layer", "tests:Scale", "scale", "mine")
    source = Source(ScaleKernel)
    source.kind = "code"
    candidate = Candidate(LayerKernel("scale", source), binding, proofs=1)  # type: ignore[arg-type]
    assert kit.swap_in(layer, [candidate])
    speeds.by_size = {4: SLOW, 8: SLOW}
    assert call(layer, 4).startswith("kernel")
    assert call(layer, 8).startswith("kernel")
    assert speeds.made == [(4, True)]
    assert binding.state == "active"
    assert [figures["runs"] for figures in binding.speeds.values()] == [True]
    runtime.registry.record(binding)
    assert "beside its original: 0.90x" in render(records.snapshot())


def test_a_kernel_that_raises_later_is_quarantined(kit: Any, speeds: Speeds) -> None:
    class Raises(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.numel() == 2000:
                raise RuntimeError("no")
            return self.weight * x

    layer, candidate = Scale(), embedded(Raises)
    assert kit.swap_in(layer, [candidate])
    layer(torch.ones(4))
    with pytest.warns(UserWarning, match="raised"):
        assert call(layer, 2000) == "original"
    assert candidate.binding.state == "quarantined"


def test_a_function_goes_by_size_as_well(speeds: Speeds) -> None:
    def original(x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        ran.append("original")
        return x * scale

    def kernel(x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        ran.append("kernel")
        return scale * x

    registered = FunctionKernel("f", "tests", Source(kernel), chosen_by="twinkle")  # type: ignore[arg-type]
    binding = Binding("function", "tests:f", "f", "embedded")
    dispatch = FunctionDispatch(original, (FunctionCandidate(registered, binding, proofs=1),))
    speeds.by_size = {4: SLOW}
    for count, expected in ((4, "original"), (5, "original"), (8, "kernel"), (9, "kernel")):
        dispatch.function(torch.ones(count))
        assert ran[-1] == expected
    assert speeds.made == [(4, True), (8, True)]


@pytest.mark.parametrize("way", [ORIGINAL, KERNEL, SMALL_TOO])
def test_checkpointing_computes_again_what_ran(swapped: Any, speeds: Speeds, way: str) -> None:
    layer, _ = swapped
    speeds.by_size = {4: speed(way, 1.0)}
    x = torch.ones(4, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert ran[-1] == ran[-2]
    assert x.grad is not None
    assert x.grad.tolist() == [3.0] * 4


def test_two_threads_that_meet_a_size_go_one_way(swapped: Any, speeds: Speeds) -> None:
    layer, _ = swapped
    call(layer, 2000)
    gate = threading.Barrier(2, timeout=20)
    found = iter([SLOW, speed(KERNEL, 2.0)])

    def measured(*values: Any, **options: Any) -> Speed:
        gate.wait()
        return next(found)

    speeds.__class__.__call__, before = measured, speeds.__class__.__call__  # type: ignore[method-assign]
    try:
        threads = [threading.Thread(target=layer, args=(torch.ones(4),)) for _ in range(2)]
        del ran[:]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        speeds.__class__.__call__ = before  # type: ignore[method-assign]
    assert len(set(ran)) == 1


def test_a_compiler_gets_the_kernel_and_measures_nothing(swapped: Any, speeds: Speeds) -> None:
    layer, _ = swapped
    speeds.by_size = {4: SLOW}
    call(layer, 4)
    made = len(speeds.made)
    compiled = torch.compile(lambda x: layer(x), backend="eager", fullgraph=True)
    for count in (4, 8, 2000):
        assert torch.equal(compiled(torch.ones(count)), torch.full((count,), 3.0))
    assert len(speeds.made) == made


def test_tracers_and_transforms_pass(swapped: Any, speeds: Speeds) -> None:
    layer, _ = swapped
    call(layer, 4)
    x = torch.ones(2, 4)
    assert torch.equal(torch.func.vmap(layer)(x), x * 3)
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), x * 3)
    assert torch.equal(torch.export.export(layer, (x,), strict=False).module()(x), x * 3)
    with pytest.warns(DeprecationWarning, match="trace"):
        assert torch.equal(torch.jit.trace(layer, (x,))(x), x * 3)


def test_copies_and_files_are_as_before(swapped: Any, speeds: Speeds) -> None:
    layer, _ = swapped
    speeds.by_size = {4: SLOW}
    call(layer, 4)
    assert call(copy.deepcopy(layer), 4) == "original"
    assert call(pickle.loads(pickle.dumps(layer)), 4) == "original"
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    assert len(speeds.made) == 1


def test_calls_that_are_to_be_recorded_go_to_the_kernel(swapped: Any, speeds: Speeds) -> None:
    layer, _ = swapped
    speeds.by_size[4] = SLOW
    call(layer, 4)
    found = [call(layer, 4)]
    with at_every_size():
        found += [call(layer, 4), call(layer, 8)]
    found.append(call(layer, 4))
    assert found == ["original", "kernel", "kernel", "original"]
    assert [size for size, _ in speeds.made] == [4], "what is not issued again is not measured"


def test_what_cannot_be_measured_goes_to_the_kernel_from_the_size_in_its_code_on(
    kit: Any, speeds: Speeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ScaleKernel.forward.__dict__, "least", Least("x", 16, 64))
    layer = Scale()
    assert kit.swap_in(layer, [embedded()])
    speeds.by_size = {size: Unmeasured("no room", for_good=True) for size in (4, 16, 32, 64)}
    call(layer, 4)  # proven here, and then at its size
    found = [call(layer, size) for size in (4, 16, 32)]
    with torch.no_grad():
        found += [call(layer, size) for size in (32, 64)]
    left = "kernel, left to the definition"
    assert found == ["original", left, left, "original", left]


def test_a_kernel_that_does_not_pay_is_not_measured_at_smaller_sizes(swapped: Any, speeds: Speeds) -> None:
    layer, _ = swapped
    speeds.by_size = {32: SLOW, 256: SLOW}
    found = [call(layer, count) for count in (32, 8, 33, 64, 256, 128, 300, 63, 16)]
    kernel = "kernel, left to the definition"
    assert found == [*["original"] * 3, kernel, "original", kernel, *["original"] * 3]
    assert [size for size, _ in speeds.made] == [32, 64, 256, 128]
    with torch.no_grad():
        assert call(layer, 8) == kernel, "calls without gradients are another matter"


@pytest.mark.parametrize("gradients", [False, True])
def test_a_compiler_follows_a_size_that_is_left_to_the_original(
    swapped: Any, speeds: Speeds, gradients: bool
) -> None:
    layer, _ = swapped
    speeds.by_size[4] = SLOW
    with torch.set_grad_enabled(gradients):
        call(layer, 4)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        for count in (4, 2, 3, 2000):
            assert torch.equal(compiled(torch.ones(count)), torch.full((count,), 3.0))


def test_a_size_left_to_the_original_is_asked_for_before_all_else(
    kit: Any, swapped: Any, speeds: Speeds
) -> None:
    layer, _ = swapped
    speeds.by_size[4] = SLOW
    call(layer, 4)
    x, names = torch.ones(4), []

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            names.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        type(layer).forward(layer, x)
    finally:
        sys.setprofile(None)
    assert names[:2] == ["forward", "forward"]


def test_a_measured_call_costs_little_more_than_another(kit: Any, swapped: Any, speeds: Speeds) -> None:
    """Counted, as time would not be the same twice: what the text calls before the kernel."""
    layer, _ = swapped
    call(layer, 4)
    calls: list[str] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "c_call" and frame.f_code.co_name == "forward":
            calls.append(argument.__name__)
        elif event == "call":
            calls.append(frame.f_code.co_name)

    x = torch.ones(4)
    sys.setprofile(profile)
    try:
        type(layer).forward(layer, x)
    finally:
        sys.setprofile(None)
    way = calls[: calls.index("forward", 1)]
    asked = [name for name in way if name in ("numel", "bit_length", "get")]
    assert asked == ["numel", "numel", "bit_length", "get"]
    assert "decide" not in way
