"""A small layer, kernels for it, and candidates made from any class or function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from twinkle.modes import Mode
from twinkle.records import Binding, FunctionKernel, LayerKernel
from twinkle.swap.candidate import Candidate, FunctionCandidate
from twinkle.swap.layers import Plan, matches, placed, plan

if TYPE_CHECKING:
    from collections.abc import Iterable


class Source:
    """A source that counts how often it is asked."""

    def __init__(self, thing: object, kind: str = "code") -> None:
        self.thing = thing
        self.kind = kind
        self.loads = 0

    def describe(self) -> str:
        return repr(self.thing)

    def load(self) -> object:
        self.loads += 1
        if isinstance(self.thing, BaseException):
            raise self.thing
        return self.thing


class Gate(nn.Module):
    """The layer that is swapped in these tests."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.proj(x)) * x


class GateKernel(nn.Module):
    """Twice what the original gives: a test can tell which of the two ran."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * torch.sigmoid(self.proj(x)) * x


class Model(nn.Module):
    """Two of the layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Gate()
        self.second = Gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def kernel_times(factor: float, **members: Any) -> type[nn.Module]:
    """A kernel class whose output is ``factor`` times the original's."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return factor * (torch.sigmoid(self.proj(x)) * x)

    return type(f"Times{factor}", (nn.Module,), {"forward": forward, **members})


def candidate(
    thing: object,
    *,
    device: str | None = None,
    mode: str | None = None,
    strict: bool = False,
    attributes: dict[str, object] | None = None,
    kind: str = "code",
    watch: int = 0,
) -> Candidate:
    """A candidate; with the kind ``embedded`` it is one of Twinkle's own, for which modules are marked."""
    parsed = Mode.parse(mode)
    kernel = LayerKernel("Kernel", Source(thing, kind), device=device, mode=parsed, attributes=attributes)
    binding = Binding("layer", "tests:Gate", "Kernel", repr(thing), device=device, mode=parsed)
    return Candidate(kernel, binding, strict=strict, watch=watch)


def function_candidate(
    thing: object, *, device: str | None = None, mode: str | None = None, strict: bool = False
) -> FunctionCandidate:
    parsed = Mode.parse(mode)
    kernel = FunctionKernel("f", "tests", Source(thing), device=device, mode=parsed)
    binding = Binding("function", "tests:f", "f", repr(thing), device=device, mode=parsed)
    return FunctionCandidate(kernel, binding, strict=strict)


def swap_in(
    module: nn.Module,
    candidates: Iterable[Candidate],
    *,
    target: type[nn.Module] | None = None,
    pinned: Mode | None = None,
) -> bool:
    """Plan and commit; false where the module is left alone, and the bindings then say why."""
    if target is not None and not matches(module, target):
        return False
    candidates = tuple(candidates)
    made = plan(module, candidates, pinned=pinned)
    if isinstance(made, str):
        for one in candidates:
            one.binding.note(made)
        return False
    made.commit()
    return True


def is_swapped(module: nn.Module) -> bool:
    return placed(module) is not None


def resolve_now(module: nn.Module) -> None:
    """Load the kernels that a swapped module would run, ahead of its first forward."""
    dispatch = placed(module)
    assert dispatch is not None
    Plan(module, dispatch).resolve()


class Kit:
    """What the tests of this room use, in one fixture (test files import nothing from each other)."""

    Gate = Gate
    GateKernel = GateKernel
    Model = Model
    candidate = staticmethod(candidate)
    function_candidate = staticmethod(function_candidate)
    kernel_times = staticmethod(kernel_times)
    swap_in = staticmethod(swap_in)
    is_swapped = staticmethod(is_swapped)
    resolve_now = staticmethod(resolve_now)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(3, 4)

    def factor(self, module: nn.Module, **options: Any) -> float:
        """How many times the original's output a (swapped) gate gives: which kernel ran."""
        expected = torch.sigmoid(module.proj(self.x)) * self.x
        return round((module(self.x, **options) / expected).mean().item(), 3)


@pytest.fixture
def kit() -> Kit:
    return Kit()


@pytest.fixture
def gate(kit: Kit) -> Gate:
    return kit.Gate()
