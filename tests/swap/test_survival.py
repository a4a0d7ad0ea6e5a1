"""Kernels that fail long after their first call: the original completes the step, and they are taken out."""

from __future__ import annotations

import asyncio
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twinkle.errors import KernelError, TwinkleWarning
from twinkle.swap.functions import dispatcher
from twinkle.swap.layers import placed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FAILS_AT = 6


class Scale(nn.Module):
    """The layer: a weight, dropout in training, and a buffer that counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 2, 8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x * self.w, 0.1, self.training)


def raising(error: Exception) -> Callable[..., Tensor]:
    def fault(x: Tensor, y: Tensor) -> Tensor:
        raise error

    return fault


def draws_then_raises(x: Tensor, y: Tensor) -> Tensor:
    torch.rand(100)
    raise RuntimeError("after drawing")


def first_column(x: Tensor, y: Tensor) -> Tensor:
    return y[:, :1]


def other_dtype(x: Tensor, y: Tensor) -> Tensor:
    return y.double()


def turned(x: Tensor, y: Tensor) -> Tensor:
    return y.t()


def nothing(x: Tensor, y: Tensor) -> Any:
    return None


def a_tuple(x: Tensor, y: Tensor) -> Any:
    return y, y


FAULTS: dict[str, Callable[..., Any]] = {
    "raises": raising(RuntimeError("CUDA error: an illegal memory access")),
    "out of memory": raising(torch.OutOfMemoryError("out of memory")),
    "memory error": raising(MemoryError()),
    "stop iteration": raising(StopIteration()),
    "draws, then raises": draws_then_raises,
    "column": first_column,
    "dtype": other_dtype,
    "turned": turned,
    "nothing": nothing,
    "tuple": a_tuple,
}


def kernel_that(fault: Callable[..., Any], at: int = FAILS_AT, draws: bool = True) -> type[nn.Module]:
    """A kernel that computes what `Scale` does, and does something else from a call on."""
    calls = [0]

    def forward(self: Any, x: Tensor) -> Any:
        calls[0] += 1
        y = x * self.w
        if calls[0] >= at:
            return fault(x, y)
        return F.dropout(y, 0.1, self.training) if draws else y

    return type("Kernel", (nn.Module,), {"forward": forward})


class Run:
    """A few steps of training: losses, weights, and where the random numbers are at the end."""

    def __init__(self, kit: Any, kernel: type[nn.Module] | None, watch: int = 0) -> None:
        torch.manual_seed(0)
        layer = Scale()
        self.net = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8))
        self.candidate = None
        if kernel is not None:
            self.candidate = kit.candidate(kernel, watch=watch)
            kit.swap_in(layer, [self.candidate])
        optimizer = torch.optim.SGD(self.net.parameters(), 0.05)
        data = torch.Generator().manual_seed(1)
        self.losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = (self.net(torch.randn(4, 8, generator=data)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            self.losses.append(loss.item())
        self.random = torch.get_rng_state()

    def assert_same(self, plain: Run) -> None:
        assert self.losses == plain.losses
        assert torch.equal(self.random, plain.random)
        for mine, other in zip(self.net.parameters(), plain.net.parameters(), strict=True):
            assert torch.equal(mine, other)


@pytest.fixture
def plain(kit: Any) -> Run:
    return Run(kit, None)


@pytest.mark.parametrize("at", [1, 2, FAILS_AT])
@pytest.mark.parametrize("name", FAULTS)
def test_training_goes_on_as_without_the_kernel(kit: Any, plain: Run, name: str, at: int) -> None:
    if at == 1 and name in ("column", "dtype", "turned", "nothing", "tuple"):
        pytest.skip("what it gives at its first call is a matter of proofs")
    with pytest.warns(TwinkleWarning, match="Gate") as caught:
        run = Run(kit, kernel_that(FAULTS[name], at))
    run.assert_same(plain)
    assert run.candidate is not None
    assert run.candidate.binding.state == "quarantined"
    assert len(caught) == 1


def test_training_with_a_watched_kernel_goes_on_as_without_it(kit: Any, plain: Run) -> None:
    def fault(x: Tensor, y: Tensor) -> Tensor:
        return F.dropout(y, 0.1) * float("nan")

    with pytest.warns(TwinkleWarning, match="gave NaN"):
        run = Run(kit, kernel_that(fault), watch=1)
    run.assert_same(plain)


def test_a_failure_says_what_it_gave(kit: Any) -> None:
    with pytest.warns(TwinkleWarning, match=r"gave \[4, 1\] in float32 where the original gives \[4, 8\]"):
        Run(kit, kernel_that(first_column))


def writes(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(3)
    raise RuntimeError("half done")


def writes_and_returns(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(3)
    return y


def test_where_an_input_was_written_the_error_names_the_kernel(kit: Any) -> None:
    with (
        pytest.warns(TwinkleWarning),
        pytest.raises(KernelError, match=r"'Kernel' of tests:Gate.*written to x"),
    ):
        Run(kit, kernel_that(writes))


def test_no_memory_after_an_input_was_written_stays_no_memory(kit: Any) -> None:
    def fault(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(3)
        raise torch.OutOfMemoryError

    with pytest.warns(TwinkleWarning, match="written to x"), pytest.raises(torch.OutOfMemoryError):
        Run(kit, kernel_that(fault))


def test_a_kernel_that_starts_to_write_to_its_input_is_found(kit: Any) -> None:
    with (
        pytest.warns(TwinkleWarning),
        pytest.raises(KernelError, match="wrote to x, which the original leaves"),
    ):
        Run(kit, kernel_that(writes_and_returns))


@pytest.mark.parametrize("history", [True, False])
def test_a_first_call_that_writes_leaves_nothing_changed(kit: Any, history: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x.mul_(3)
        self.calls.add_(1)
        with torch.no_grad():
            self.w.mul_(2)
        torch.rand(10)
        raise RuntimeError("half done")

    layer = Scale()
    kit.swap_in(layer, [kit.candidate(type("Kernel", (nn.Module,), {"forward": forward}))])
    source = torch.randn(4, 8, requires_grad=history)
    x = source * 1
    before, version, node, random = x.detach().clone(), x._version, x.grad_fn, torch.get_rng_state()
    weight = layer.w.detach().clone()
    layer.eval()
    with pytest.warns(TwinkleWarning, match="half done"):
        y = layer(x) + x
    assert torch.equal(x, before)
    assert (x._version, x.grad_fn) == (version, node)
    assert torch.equal(layer.w, weight)
    assert layer.calls == 0
    assert torch.equal(torch.get_rng_state(), random)
    y.sum().backward()
    if history:
        assert torch.equal(source.grad, (weight + 1).expand(4, 8))


def test_a_first_call_that_writes_as_the_original_does_reaches_the_input(kit: Any) -> None:
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    class Kernel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(x)

    layer, wanted = Doubles(), kit.candidate(Kernel)
    kit.swap_in(layer, [wanted])
    source = torch.ones(2, 3, requires_grad=True)
    for _ in range(3):
        x = source * 1
        y = layer(x)
        assert y is x
        assert torch.equal(x, torch.full((2, 3), 2.0))
        (gradient,) = torch.autograd.grad((y * 5).sum(), source)
        assert torch.equal(gradient, torch.full((2, 3), 10.0))
    assert wanted.binding.state == "active"


def test_what_the_original_raises_as_well_is_the_programs(kit: Any) -> None:
    layer, wanted = Scale(), kit.candidate(kernel_that(raising(RuntimeError("never")), 10**9))
    kit.swap_in(layer, [wanted])
    layer(torch.ones(4, 8))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="must match the size") as caught:
            layer(torch.ones(4, 7))
        assert caught.value.__context__ is None
    assert wanted.binding.state == "active"


def test_strict_raises_what_the_kernel_raises_at_any_call(kit: Any) -> None:
    layer = Scale()
    kit.swap_in(layer, [kit.candidate(kernel_that(FAULTS["raises"], 3), strict=True)])
    layer(torch.ones(4, 8))
    layer(torch.ones(4, 8))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        layer(torch.ones(4, 8))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_who_ends_the_program_ends_it_at_any_call(kit: Any, error: type[BaseException]) -> None:
    layer, wanted = Scale(), kit.candidate(kernel_that(raising(error()), 3))  # type: ignore[arg-type]
    kit.swap_in(layer, [wanted])
    layer(torch.ones(4, 8))
    layer(torch.ones(4, 8))
    with pytest.raises(error):
        layer(torch.ones(4, 8))
    assert wanted.rejected is None


def test_a_failed_kernel_keeps_no_tensor_alive(kit: Any) -> None:
    kept: list[weakref.ref[Tensor]] = []

    def fault(x: Tensor, y: Tensor) -> Tensor:
        big = torch.zeros(1000)
        kept.append(weakref.ref(big))
        raise torch.OutOfMemoryError

    class Looks(Scale):
        def forward(self, x: Tensor) -> Tensor:
            alive.append(kept[0]() is not None if kept else False)
            return x * self.w

    alive: list[bool] = []
    layer = Looks()
    kit.swap_in(layer, [kit.candidate(kernel_that(fault, 2, draws=False))])
    layer(torch.ones(4, 8))
    with pytest.warns(TwinkleWarning):
        layer(torch.ones(4, 8))
    assert alive == [False]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients_as_well(kit: Any, mode: Any) -> None:
    layer, wanted = Scale().eval(), kit.candidate(kernel_that(first_column, 5))
    kit.swap_in(layer, [wanted])
    with mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(8):
            x = torch.randn(4, 8)
            assert torch.equal(layer(x), x * layer.w)
    assert wanted.binding.state == "quarantined"


def test_results_of_other_forms_that_are_right_stay(kit: Any) -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor, whole: bool = False, pair: bool = False) -> Any:
            y = x.sum() if whole else x + 1
            return (y, None) if pair else y

    class Kernel(nn.Module):
        def forward(self, x: Tensor, whole: bool = False, pair: bool = False) -> Any:
            runs.append(1)
            y = x.sum() if whole else 1 + x
            return (y, None) if pair else y

    runs: list[int] = []
    layer, wanted = Sums(), kit.candidate(Kernel)
    kit.swap_in(layer, [wanted])
    x = torch.ones(2, 3)
    for _ in range(2):
        assert layer(x).shape == (2, 3)
        assert layer(x, True).shape == ()
        assert layer(x, pair=True)[1] is None
        assert layer(torch.ones(7, 5)).shape == (7, 5)
        assert layer(x.double()).dtype == torch.float64
    assert len(runs) == 10
    assert wanted.binding.state == "active"


def test_tensors_in_tuples_and_optional_ones(kit: Any) -> None:
    class Turn(nn.Module):
        def forward(self, x: Tensor, tables: Any = None, *more: Tensor, mask: Any = None) -> Tensor:
            return x if tables is None else x * tables[0] + tables[1]

    class Kernel(nn.Module):
        def forward(self, x: Tensor, tables: Any = None, *more: Tensor, mask: Any = None) -> Tensor:
            if mask is not None and mask.sum() > 100:
                tables[1].add_(1)
                raise RuntimeError("half done")
            return x if tables is None else torch.addcmul(tables[1], x, tables[0])

    layer, wanted = Turn(), kit.candidate(Kernel)
    kit.swap_in(layer, [wanted])
    x, tables, mask = torch.ones(4), (torch.ones(4), torch.ones(4)), torch.ones(4)
    for _ in range(2):
        layer(x, tables, mask, mask=mask)
        layer(x)
        layer(x, None, mask)
        layer(x, tables, mask=mask)
    assert wanted.binding.state == "active"


def test_checkpoints_end_a_recomputed_forward_early(kit: Any) -> None:
    layer, wanted = Scale(), kit.candidate(kernel_that(raising(RuntimeError("never")), 10**9))
    kit.swap_in(layer, [wanted])
    source = torch.randn(4, 8, requires_grad=True)
    for _ in range(3):
        checkpoint(lambda x: layer(x) * 2, source, use_reentrant=False).sum().backward()
    assert wanted.binding.state == "active"


def test_a_transform_says_nothing_about_a_kernel(kit: Any) -> None:
    class Kernel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError("vmap is not for this kernel")
            return x * self.w

    layer, wanted = Scale().eval(), kit.candidate(Kernel)
    kit.swap_in(layer, [wanted])
    x = torch.randn(4, 8)
    layer(x)
    assert torch.equal(torch.vmap(layer)(x), x * layer.w)
    assert wanted.binding.state == "active"


def test_functions_that_fail_later(kit: Any) -> None:
    def scale(x: Tensor, factor: float = 2) -> Tensor:
        return x * factor

    def kernel(x: Tensor, factor: float = 2) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("CUDA error")
        return x * factor

    calls: list[int] = []
    wanted = kit.function_candidate(kernel)
    made = dispatcher(scale, [wanted])
    with pytest.warns(TwinkleWarning, match="CUDA error"):
        found = [made(kit.x) for _ in range(6)]
    assert all(torch.equal(one, kit.x * 2) for one in found)
    assert len(calls) == 4


def test_a_coroutine_that_fails_later(kit: Any) -> None:
    async def fetch(x: int) -> int:
        return x

    async def kernel(x: int) -> int:
        calls.append(1)
        await asyncio.sleep(0)
        if len(calls) == 3:
            raise RuntimeError("gone")
        return x

    calls: list[int] = []
    wanted = kit.function_candidate(kernel)
    made = dispatcher(fetch, [wanted])

    async def main() -> list[int]:
        return [await made(n) for n in range(5)]

    with pytest.warns(TwinkleWarning, match="gone"):
        assert asyncio.run(main()) == [0, 1, 2, 3, 4]
    assert len(calls) == 3


def test_a_generator_that_fails_before_it_gave_anything(kit: Any) -> None:
    def items(n: int) -> Iterator[int]:
        yield from range(n)

    def kernel(n: int) -> Iterator[int]:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("gone")
        yield from range(n)

    calls: list[int] = []
    made = dispatcher(items, [kit.function_candidate(kernel)])
    with pytest.warns(TwinkleWarning, match="gone"):
        assert [list(made(n)) for n in range(5)] == [list(range(n)) for n in range(5)]


def test_the_text_of_a_dispatch_reads_no_more_than_it_must(kit: Any) -> None:
    layer = Scale()
    kit.swap_in(layer, [kit.candidate(kernel_that(raising(RuntimeError()), 10**9, draws=False))])
    layer(torch.ones(4, 8))
    dispatch = placed(layer)
    assert dispatch is not None
    assert dispatch.text.count("._version") == 3  # before, after, and where it raised
    assert "_tw_random" not in dispatch.text


@pytest.mark.parametrize("given", ["expanded", "strided", "empty", "integers", "nan", "leaf", "buffer"])
def test_arguments_of_any_kind_are_as_they_were_after_a_first_call(kit: Any, given: str) -> None:
    class Pick(Scale):
        def forward(self, x: Tensor, more: Tensor) -> Tensor:
            return x * 2

    class Kernel(nn.Module):
        def forward(self, x: Tensor, more: Tensor) -> Tensor:
            more.data.numpy()[...] = 7  # not counted by torch
            raise RuntimeError("half done")

    more = {
        "expanded": torch.ones(1, 8).expand(4, 8),
        "strided": torch.arange(32.0).view(8, 4).t(),
        "empty": torch.ones(0, 3),
        "integers": torch.arange(6),
        "nan": torch.tensor([float("nan"), 1.0]),
        "leaf": torch.ones(3, requires_grad=True),
        "buffer": torch.zeros(3),
    }[given]
    if given == "expanded":  # numpy gives no way to write to it
        more.data.numpy().setflags(write=False)
    before = more.detach().clone()
    layer, wanted = Pick(), kit.candidate(Kernel)
    kit.swap_in(layer, [wanted])
    x = torch.randn(4, 8)
    with pytest.warns(TwinkleWarning):
        assert torch.equal(layer(x, more), x * 2)
    torch.testing.assert_close(more.detach(), before, equal_nan=True, rtol=0, atol=0)
    assert wanted.binding.state == "quarantined"


@pytest.mark.parametrize("name", ["column", "dtype", "nothing", "tuple", "raises"])
def test_what_is_at_hand_shows_a_wrong_form_at_any_call(kit: Any, name: str) -> None:
    layer, wanted = Scale().eval(), kit.candidate(kernel_that(FAULTS[name], 101))
    kit.swap_in(layer, [wanted])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(103):
            x = torch.randn(4, 8)
            assert torch.equal(layer(x), x * layer.w)
    assert wanted.binding.state == "quarantined"


def test_a_result_of_as_many_bytes_is_found_within_eight_calls(kit: Any) -> None:
    layer, wanted = Scale().eval(), kit.candidate(kernel_that(turned, 101))
    kit.swap_in(layer, [wanted])
    with pytest.warns(TwinkleWarning, match=r"gave \[8, 4\]"):
        shapes = [tuple(layer(torch.randn(4, 8)).shape) for _ in range(120)]
    assert shapes.count((8, 4)) < 8
    assert wanted.binding.state == "quarantined"
