"""Calls that were recorded: replayed, they give what the function itself gives; and what is not recorded."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch

from twinkle.ops.cases import cases, variants
from twinkle.ops.plain import at_every_size
from twinkle.ops.plans import Planned, parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable

OPS = (
    "rms_norm",
    "layer_norm",
    "residual_norm",
    "modulated_norm",
    "group_norm",
    "rotary",
    "qk_norm_rotary",
    "gated_mlp",
    "activation",
)


@pytest.fixture
def launches(monkeypatch):
    """How many launches were not part of a replay."""
    from twinkle.ops.launch import Launcher

    found = []
    launch = Launcher.__call__

    def counted(self, *given, **constants):
        found.append(self)
        launch(self, *given, **constants)

    monkeypatch.setattr(Launcher, "__call__", counted)
    return found


def tensors_of(case) -> list[torch.Tensor]:
    own = [] if case.module is None else [*case.module.parameters()]
    return [a for a in case.args if isinstance(a, torch.Tensor)] + own


def computed(case, gradients: bool) -> list[torch.Tensor]:
    """The results of a call, and the gradients of their squares."""
    own = () if case.module is None else (case.module,)
    made = case.kernel(*own, *case.args)
    made = [*made] if isinstance(made, tuple | list) else [made]
    if not gradients:
        return [y.clone() for y in made]
    wanted = [t for t in tensors_of(case) if t.requires_grad]
    found = torch.autograd.grad(sum((y * y).sum() for y in made), wanted, allow_unused=True)
    return [*(y.detach().clone() for y in made), *(g.clone() for g in found if g is not None)]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_a_replay_gives_what_the_function_gives(kernels, launches, op, gradients):
    torch.manual_seed(0)
    replayed = 0
    for case in cases(op, variants(op)[0], torch.float32, kernels):
        if case.shape in ("plain", "wide"):
            continue  # long in the interpreter
        tensors = [t for t in tensors_of(case) if t.is_floating_point()]
        for tensor in tensors:
            tables = op in ("rotary", "qk_norm_rotary") and tensor.dim() < 4 and tensor is not tensors[0]
            tensor.requires_grad_(gradients and not tables)
        numbers = [t.detach().clone() for t in tensors]
        with at_every_size(), torch.set_grad_enabled(gradients):
            expected = computed(case, gradients)
            with torch.no_grad():
                for tensor in tensors:
                    tensor.mul_(0.5)
            halves = computed(case, gradients)
            with torch.no_grad():
                for tensor, number in zip(tensors, numbers, strict=True):
                    tensor.copy_(number)
            before = len(launches)
            found = computed(case, gradients)
        replayed += len(launches) == before
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert a.stride() == b.stride()
            assert torch.equal(a, b)
        assert not all(torch.equal(a, b) for a, b in zip(halves, expected, strict=True))
    assert replayed >= 2


def test_arguments_of_a_schema():
    assert parameters_of("op(Tensor x, Tensor? w, float eps, bool[] wanted, Tensor? s=None) -> Tensor") == {
        "x": ("Tensor", False),
        "w": ("Tensor?", False),
        "eps": ("float", False),
        "wanted": ("bool[]", False),
        "s": ("Tensor?", True),
    }


class Doubling:
    """A function of ``x``, a number and flags that launches a kernel, and how often it was called itself."""

    def __init__(self, around: Callable[[torch.Tensor, float], torch.Tensor] | None = None) -> None:
        self.calls = 0
        self.around = around or self.launched
        self.planned = Planned(self.function, "(Tensor x, Tensor? other, float factor) -> Tensor")

    def function(self, x: torch.Tensor, other: torch.Tensor | None, factor: float) -> torch.Tensor:
        self.calls += 1
        return self.around(x, factor)

    @staticmethod
    def launched(x: torch.Tensor, factor: float) -> torch.Tensor:
        """``x`` where it is activated, by a launch; the factor is in no kernel."""
        from twinkle.ops.activation.triton import forward

        y = torch.empty_like(x)
        forward(x, y, "relu2")
        return y

    def __call__(self, x: torch.Tensor, other: torch.Tensor | None = None, factor: float = 1.0):
        y = self.planned.call(x, other, factor)
        assert torch.equal(y, torch.relu(x) ** 2)
        return y


def test_a_call_is_recorded_when_it_comes_again(kernels):
    doubling = Doubling()
    for _ in range(5):
        doubling(torch.randn(4, 8, device=kernels))
    assert doubling.calls == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.new_zeros(4, 9).normal_(),
        lambda x: x.new_zeros(8, 4).normal_(),
        lambda x: x.new_zeros(32).normal_(),
        lambda x: torch.randn(8, 4, device=x.device).t(),
        lambda x: torch.randn(4, 8, device=x.device, dtype=torch.float16),
        lambda x: torch.nn.Parameter(torch.randn(4, 8, device=x.device)),
    ],
)
def test_every_kind_of_tensor_has_its_own_record(kernels, other):
    doubling = Doubling()
    with torch.no_grad():
        for _ in range(3):
            doubling(torch.randn(4, 8, device=kernels))
        assert doubling.calls == 2
        for _ in range(3):
            x = other(torch.empty(0, device=kernels))
            doubling(x).size()
        assert doubling.calls == 4
        doubling(torch.randn(4, 8, device=kernels))
        assert doubling.calls == 4


def test_numbers_and_absent_tensors_are_part_of_the_kind(kernels):
    doubling, x = Doubling(), torch.randn(4, 8, device=kernels)
    other = torch.randn(2, device=kernels)
    for given in ((None, 1.0), (other, 1.0), (None, 2.0)):
        before = doubling.calls
        for _ in range(3):
            doubling(x, *given)
        assert doubling.calls == before + 2


def test_the_first_tensor_may_be_absent(kernels):
    calls = []

    def function(other, x):
        calls.append(other)
        return Doubling.launched(x, 1.0)

    planned = Planned(function, "(Tensor? other, Tensor x) -> Tensor")
    for other in (None, torch.randn(3, device=kernels)):
        for _ in range(3):
            x = torch.randn(4, 8, device=kernels)
            assert torch.equal(planned.call(other, x), torch.relu(x) ** 2)
    assert len(calls) == 4


def test_both_zeros_are_one_key_and_so_none(kernels):
    doubling, x = Doubling(), torch.randn(4, 8, device=kernels)
    for factor in (0.0, -0.0, 0.0, 0.0):
        doubling(x, None, factor)
    assert doubling.calls == 4


def test_tensors_that_are_not_aligned_are_left_to_the_function(kernels):
    doubling = Doubling()
    whole = torch.randn(33, device=kernels)
    for _ in range(3):
        doubling(whole[:32])
    assert doubling.calls == 2
    doubling(whole[1:])
    assert doubling.calls == 3
    doubling(whole[:32])
    assert doubling.calls == 3


def test_inputs_at_one_address_are_not_recorded(kernels):
    doubling, x = Doubling(), torch.randn(4, 8, device=kernels)
    for _ in range(4):
        doubling(x, x)
    assert doubling.calls == 4
    for _ in range(3):
        doubling(x, torch.randn(4, 8, device=kernels))
    assert doubling.calls == 5  # once for the record; the next ones are replayed, whatever the addresses
    doubling(x, x)
    assert doubling.calls == 5


def test_a_copy_or_zeros_in_between_are_no_launches(kernels):
    def copied(x, factor):
        return Doubling.launched(x.t().contiguous().t(), factor)

    def added(x, factor):
        return Doubling.launched(x, factor) + torch.zeros_like(x)

    for around in (copied, added, lambda x, factor: torch.relu(x) ** 2):
        doubling = Doubling(around)
        for _ in range(4):
            doubling(torch.randn(4, 8, device=kernels))
        assert doubling.calls == 4


def test_a_result_may_be_a_view_of_what_was_written(kernels):
    doubling = Doubling(
        lambda x, factor: Doubling.launched(x.view(-1), factor).view(8, 4).t().t().view(x.shape)
    )
    for _ in range(4):
        doubling(torch.randn(4, 8, device=kernels))
    assert doubling.calls == 2


def test_a_tensor_that_was_there_before_is_no_result(kernels):
    kept = torch.empty(4, 8, device=kernels)

    def into(x, factor):
        from twinkle.ops.activation.triton import forward

        forward(x, kept, "relu2")
        return kept

    doubling = Doubling(into)
    for _ in range(4):
        doubling(torch.randn(4, 8, device=kernels))
    assert doubling.calls == 4


def test_shapes_without_end_keep_no_more_than_the_latest(kernels):
    doubling = Doubling()
    first = torch.randn(1, 1, device=kernels)
    for _ in range(3):
        doubling.planned.call(first, None, 1.0)
    assert doubling.calls == 2
    for factor in range(1, 600):
        doubling.planned.call(first, None, 1.0 + factor)
    before = doubling.calls
    doubling.planned.call(first, None, 1.0)
    assert doubling.calls == before + 1  # it was forgotten


class Squares:
    """As a kernel of triton whose launch is torch's: the interpreter serves one thread at a time."""

    arg_names = ("x", "y", "count")

    def __getitem__(self, grid):
        return lambda x, y, count: (y.copy_(torch.relu(x) ** 2), None)[1]


def test_threads_record_and_replay_beside_each_other():
    from twinkle.ops.launch import Launcher

    launcher, wrong = Launcher(Squares()), []

    def launched(x, factor):
        y = torch.empty_like(x)
        launcher((1,), (x, y), (x.numel(),))
        return y

    doubling = Doubling(launched)

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i in range(200):
            x = torch.randn(2, 8 * (1 + i % 3), generator=generator)
            if not torch.equal(doubling.planned.call(x, None, 1.0), torch.relu(x) ** 2):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert doubling.calls < 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGPU:
    def test_a_replay_is_captured_in_a_graph(self):
        doubling = Doubling()
        x = torch.randn(4, 8, device="cuda")
        for _ in range(3):
            doubling(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = doubling.planned.call(x, None, 1.0)
        assert doubling.calls == 2
        x.normal_()
        graph.replay()
        assert torch.equal(y, torch.relu(x) ** 2)

    def test_a_replay_runs_on_the_current_stream(self):
        doubling = Doubling()
        x = torch.randn(1 << 20, device="cuda")
        for _ in range(3):
            doubling(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            x.fill_(2.0)
            y = doubling.planned.call(x, None, 1.0)
        stream.synchronize()
        assert torch.equal(y, torch.full_like(x, 4.0))

    def test_hooks_of_a_profiler_are_called(self):
        knobs = pytest.importorskip("triton.knobs")
        doubling, seen = Doubling(), []
        x = torch.randn(4, 8, device="cuda")
        for _ in range(3):
            doubling(x)
        hook = knobs.runtime.launch_enter_hook
        if hook is None:
            knobs.runtime.launch_enter_hook = seen.append
        else:
            hook.add(seen.append)
        try:
            doubling(x)
        finally:
            if hook is None:
                knobs.runtime.launch_enter_hook = None
            else:
                hook.calls.clear()
        assert len(seen) == 1
        doubling(x)
        assert len(seen) == 1
        assert doubling.calls == 3

    def test_launches_reach_the_c_function(self):
        """The launcher that triton installs was looked through: no call of its Python is left."""
        import sys

        doubling, names = Doubling(), []
        x = torch.randn(4, 8, device="cuda")
        for _ in range(3):
            doubling(x)
        sys.setprofile(
            lambda frame, event, arg: names.append(frame.f_code.co_name) if event == "call" else None
        )
        try:
            doubling.planned.call(x, None, 1.0)
        finally:
            sys.setprofile(None)
        assert names == ["call", "plan"]
