"""A comparison is invisible: the world of the program is the same before and after, whatever the kernel does.

Each probe is one way in which a program could notice that its layer ran more often than it was called. The
picture of the world is text, taken before and after a comparison with a right and with two wrong kernels.
"""

from __future__ import annotations

import io
import random
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import numpy
import pytest
import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from twinkle.proof.compare import compare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Counter:
    """An object as programs pass it around: a cache, a context, a bag of statistics."""

    def __init__(self) -> None:
        self.calls = 0
        self.kept: list[torch.Tensor] = []
        self.itself = self


class Layer(nn.Module):
    """A layer that does everything a layer should not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.written = nn.Parameter(torch.ones(4), requires_grad=False)
        self.tied = self.inner.weight
        self.register_buffer("steps", torch.zeros(()))
        self.calls = 0
        self.log: list[int] = []
        self.seen: dict[str, Any] = {"deep": [{"n": 0}]}
        self.state = Counter()
        self.lock = threading.Lock()
        self.file = io.TextIOWrapper(io.BytesIO())
        self.parent = weakref.ref(self)
        self.draws = numpy.random.default_rng(0)
        self.python = random.Random(0)
        self.torch = torch.Generator().manual_seed(0)

    def forward(self, x: torch.Tensor, given: Any = None) -> torch.Tensor:
        self.calls += 1
        self.parent().calls += 1  # type: ignore[union-attr]
        self.log.append(self.calls)
        self.seen["deep"][0]["n"] += 1
        self.state.calls += 1
        self.state.kept.append(x)
        self.file.write("a line\n")
        with self.lock, torch.no_grad():
            self.written.add_(1)
            self.steps += 1
        noise = random.random() + numpy.random.rand() + self.draws.random() + self.python.random()
        noise = noise + torch.rand(()) + torch.rand((), generator=self.torch)
        if given is not None:
            given["list"].append(x)
            given["counter"].calls += 1
            given["counter"].kept.append(x)
            with torch.no_grad():
                given["written"].add_(1)
        return self.drop(self.norm(self.inner(x))) * (1 + noise * 1e-3) + self.written


def right(self: Any, x: torch.Tensor, given: Any = None) -> torch.Tensor:
    return Layer.forward(self, x, given)


def wrong(self: Any, x: torch.Tensor, given: Any = None) -> torch.Tensor:
    return Layer.forward(self, x, given) * 1.01


def raising(self: Any, x: torch.Tensor, given: Any = None) -> torch.Tensor:
    Layer.forward(self, x, given)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    raise ValueError("no such kernel")


def text(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """What can be seen of a value, as text and containers of it."""
    if isinstance(value, torch.Tensor):
        return [type(value).__name__, str(value.dtype), value.requires_grad, id(value), value._version,
                value.detach().double().flatten().tolist(), text(value.grad)]  # fmt: skip
    if id(value) in seen:
        return "again"
    seen |= {id(value)}
    if isinstance(value, (list, tuple)):
        return [text(item, seen) for item in value]
    if isinstance(value, dict):
        return {str(key): text(item, seen) for key, item in value.items()}
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, numpy.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, random.Random):
        return repr(value.getstate())
    if isinstance(value, io.TextIOWrapper):
        return value.tell()
    if isinstance(value, (nn.Module, Counter)):
        return text(vars(value), seen)
    return repr(value)


def world(*things: Any) -> Any:
    """All that a program can see of what its layers share."""
    return [
        text(things),
        repr(random.getstate()),
        repr(numpy.random.get_state()),
        torch.get_rng_state().tolist(),
        [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()],
        [
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ],
        [torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()],
        [sys.gettrace(), sys.getprofile()],
        [len(value) for name, value in vars(global_hooks).items() if name.endswith("_hooks")],
        torch._C._autograd._saved_tensors_hooks_is_enabled(),
    ]


KERNELS = pytest.mark.parametrize("kernel", [right, wrong, raising], ids=lambda f: f.__name__)


def judged(kernel: Callable[..., Any], layer: Layer, *args: Any, **kwargs: Any) -> Any:
    verdict = compare(
        Layer.forward, kernel, args, kwargs, module=layer, plain_class=type(layer), backward=True
    )
    assert not verdict.pending, verdict
    assert verdict.ok is (kernel is right), verdict
    return verdict


@pytest.fixture
def layer() -> Layer:
    made = Layer()
    made.inner.bias.grad = torch.ones(4)
    return made.train()


@KERNELS
def test_the_world_is_as_before(kernel: Any, layer: Layer) -> None:
    x = torch.randn(6, 4, requires_grad=True)
    given = {"list": [x], "counter": Counter(), "written": torch.zeros(3), "again": x}
    before = world(layer, x, given)
    judged(kernel, layer, x, given=given)
    assert world(layer, x, given) == before


@KERNELS
def test_no_hook_of_the_program_is_called(kernel: Any, layer: Layer) -> None:
    called: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    x = (torch.randn(6, 4, requires_grad=True) * 1.0).requires_grad_()
    x.register_hook(note("input"))
    for module in (layer, layer.inner, layer.norm):
        module.register_forward_pre_hook(note("before"))
        module.register_forward_hook(note("behind"))
        module.register_full_backward_hook(note("backward"))
        module.register_full_backward_pre_hook(note("before backward"))
    layer.inner.weight.register_hook(note("weight"))
    layer.inner.weight.register_post_accumulate_grad_hook(note("accumulated"))
    everywhere = (
        global_hooks.register_module_forward_pre_hook(note("everywhere")),
        global_hooks.register_module_forward_hook(note("everywhere")),
        global_hooks.register_module_full_backward_hook(note("everywhere")),
    )
    saved = torch.autograd.graph.saved_tensors_hooks(lambda t: called.append("saved") or t, lambda t: t)
    try:
        with saved:
            judged(kernel, layer, x)
    finally:
        for handle in everywhere:
            handle.remove()
    assert called == []


def test_hooks_that_raise_do_not_disturb(layer: Layer) -> None:
    def stop(*_: object) -> None:
        raise RuntimeError("a hook of the program")

    layer.inner.register_forward_hook(stop)
    layer.norm.register_forward_pre_hook(stop)
    layer.inner.weight.register_hook(stop)
    judged(right, layer, torch.randn(6, 4))


def test_a_kernel_that_passes_by_a_hooked_layer_is_not_proven() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.inner(x)
            return out

    def past(self: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)

    module = Doubling()
    x = torch.randn(3, 4)
    assert compare(Doubling.forward, past, (x,), {}, module=module).ok
    handle = module.inner.register_forward_hook(lambda m, args, out: out * 2)
    verdict = compare(Doubling.forward, past, (x,), {}, module=module)
    assert (verdict.ok, verdict.pending, verdict.tried) == (False, True, True)
    assert "Linear" in verdict.text

    def looking(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if self.inner._forward_hooks else past(self, x)

    assert compare(Doubling.forward, looking, (x,), {}, module=module).ok
    handle.remove()
    module.inner.forward = lambda x: x  # type: ignore[method-assign]
    assert compare(Doubling.forward, past, (x,), {}, module=module).pending
    assert compare(Doubling.forward, Doubling.forward, (x,), {}, module=module).ok


@KERNELS
def test_flags_of_the_program_hold(kernel: Any, layer: Layer) -> None:
    before, x = torch.get_default_dtype(), torch.randn(6, 4)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            picture = world(layer)
            compare(Layer.forward, kernel, (x,), {}, module=layer)
            assert world(layer) == picture
    finally:
        torch.set_default_dtype(before)


def test_in_inference_mode(layer: Layer) -> None:
    with torch.inference_mode():
        x = torch.randn(6, 4)
        assert compare(Layer.forward, right, (x,), {}, module=layer.eval()).ok
        assert torch.is_inference_mode_enabled()


def test_a_function_of_a_trace_is_not_called_and_stays(layer: Layer) -> None:
    frames: list[str] = []

    def trace(frame: Any, event: str, argument: Any) -> None:
        frames.append(frame.f_code.co_name)

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(trace)
    sys.setprofile(trace)
    try:
        judged(right, layer, torch.randn(6, 4))
        assert (sys.gettrace(), sys.getprofile()) == (trace, trace)
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
    assert "judged" in frames
    assert "forward" not in frames


def test_a_profiler_counts_nothing() -> None:
    def original(x: torch.Tensor) -> torch.Tensor:
        with torch.profiler.record_function("the program's own range"):
            return torch.mm(x, x)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        assert compare(original, original, (torch.randn(4, 4),), {}, backward=True).ok
        torch.cumsum(torch.ones(3), 0)
    names = {event.key for event in profiler.key_averages()}
    assert "aten::cumsum" in names
    assert not names & {"aten::mm", "the program's own range"}


class Noting(torch.Tensor):
    """A class of tensors that notes what is done with it."""

    noted: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.noted.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensors_of_a_class_of_their_own_do_not_notice(layer: Layer) -> None:
    x = torch.randn(6, 4).as_subclass(Noting)
    Noting.noted.clear()
    judged(right, layer, x)
    assert Noting.noted == []


def test_an_argument_that_can_be_read_only_once_is_not_read() -> None:
    def original(x: torch.Tensor, more: Iterator[torch.Tensor]) -> torch.Tensor:
        return x + sum(more)

    numbers = (torch.ones(2) for _ in range(3))
    verdict = compare(original, original, (torch.ones(2), numbers), {})
    assert (verdict.pending, verdict.tried) == (True, False)
    assert len(list(numbers)) == 3


def test_arguments_that_are_one_tensor_are_one_in_the_comparison() -> None:
    met: list[bool] = []

    def original(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        met.append(x is y)
        return x * y

    x = torch.randn(3)
    assert compare(original, original, (x, x), {}, backward=True).ok
    assert all(met)
    assert compare(original, original, (x, x.clone()), {}, backward=True).ok
    assert not all(met)


def test_tied_weights_are_one_in_the_comparison(layer: Layer) -> None:
    def tied(self: Any, x: torch.Tensor, given: Any = None) -> torch.Tensor:
        assert self.tied is self.inner.weight
        return Layer.forward(self, x, given)

    assert compare(Layer.forward, tied, (torch.randn(6, 4),), {}, module=layer, backward=True).ok


class Weighted(nn.Module):
    """A layer whose weight may be computed by the program before each call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_no_leaves(dtype: torch.dtype) -> None:
    layer = Weighted()
    source = layer.weight
    del layer.weight
    layer.weight = (source * torch.tensor([1.0, 0.0, 1.0, 0.0])).to(dtype)
    x = torch.randn(3, 4, dtype=dtype)

    def off(self: Any, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        return x * (weight.detach() + 0.98 * (weight - weight.detach()))

    for kernel in (Weighted.forward, off):
        verdict = compare(Weighted.forward, kernel, (x,), {}, module=layer, backward=True)
        assert verdict.ok is (kernel is not off), verdict
        assert "gradient" in verdict.text
    layer(x).sum().backward()  # the program's graph behind the weight is whole
    assert source.grad is not None


def test_a_parametrised_weight() -> None:
    layer = Weighted()
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    x = torch.randn(3, 4)
    before = text(layer)
    assert compare(Weighted.forward, Weighted.forward, (x,), {}, module=layer, backward=True).ok
    assert text(layer) == before
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


def test_a_layer_that_knows_its_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Weighted()
            self.layer.model = (self,)  # type: ignore[assignment]
            self.other = nn.Linear(4, 4)
            self.calls = 0

    def counting(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.model[0].calls += 1
        assert self.model[0].layer is self
        return Weighted.forward(self, x)

    model = Model()
    assert compare(counting, counting, (torch.randn(3, 4),), {}, module=model.layer, backward=True).ok
    assert model.calls == 0


def test_a_mode_that_is_in_force_sees_nothing() -> None:
    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counting.calls += 1
            return func(*args, **kwargs or {})

    with Counting():
        verdict = compare(torch.sin, torch.sin, (torch.empty(0),), {}, backward=True)
        before = Counting.calls
        compare(torch.sin, torch.sin, (), {}, rows=3)
        assert Counting.calls == before == 1
    assert str(verdict) == "not compared yet: under Counting"
