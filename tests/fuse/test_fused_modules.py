"""Fused kernels inside the forward of a user's own module, and what its rewritten forward still is."""

from __future__ import annotations

import copy
import inspect
import pickle
import traceback
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rounding import assert_near
from torch import nn

from twinkle.apply.layers import kernelize_layers
from twinkle.fuse import residual_norm
from twinkle.fuse.rewrite import CannotRewrite, Draft
from twinkle.kernel import kernelize_model, register_kernels, unkernelize_model
from twinkle.swap.layers import placed
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from twinkle.registry import Registry


def close(ours: Any, theirs: Any) -> None:
    assert_near(ours, theirs, 200)


def states(registry: Registry) -> dict[str, tuple[str, str]]:
    return {b.kernel: (b.state, b.proof.partition(":")[0]) for b in registry.bindings}


class Doubled(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.norm(x)


@pytest.mark.parametrize("change", ["replaced", "parametrized", "forward"])
def test_a_norm_that_is_another_now_runs_itself(
    device: torch.device, counted: dict[str, int], change: str
) -> None:
    block = Block().to(device)
    kernelize_layers(block)
    x = torch.randn(1, 2, 8, device=device)
    block(x)
    before = counted["residual_norm"]
    if change == "replaced":
        block.after = Doubled(block.after)
    elif change == "parametrized":
        torch.nn.utils.parametrize.register_parametrization(block.after, "scale", nn.Softplus())
    else:
        block.after.forward = lambda x: x * 3
    found = block(x)
    assert counted["residual_norm"] == before
    unkernelize_model(block)
    assert torch.equal(found, block(x))


def test_half_precision_next_to_full_takes_the_original_steps(
    device: torch.device, counted: dict[str, int], clean_registry: Registry
) -> None:
    block = Block().to(device)
    kernelize_layers(block)
    block.mix.to(torch.bfloat16)
    x = torch.randn(1, 2, 8, device=device)
    found = block(x)
    unkernelize_model(block)
    assert torch.equal(found, block(x))
    assert counted["residual_norm"] == 0
    assert any("no kernel for" in note for b in clean_registry.bindings for note in b.notes)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.tiny = 1e-5

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        wide = values.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.tiny)
        return self.scale * wide.to(values.dtype)


class Block(nn.Module):
    """As people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.grow = nn.Linear(8, 8)
        self.before = Norm()
        self.after = Norm()

    def forward(self, x: torch.Tensor, *, fail: bool = False) -> torch.Tensor:
        """A block."""
        x = x + self.mix(self.before(x).to(self.mix.weight.dtype))
        x = x + self.grow(self.after(x))
        if fail:
            raise RuntimeError("asked to")
        return x


def test_another_dtype_is_compared_again(device: torch.device, counted: dict[str, int]) -> None:
    torch.manual_seed(0)
    block = Block().to(device)
    kernelize_layers(block)
    x = torch.randn(1, 2, 8, device=device)
    runs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):
        before = counted["residual_norm"]
        block.to(dtype)(x.to(dtype))
        runs.append(counted["residual_norm"] - before)
    assert min(runs[:2]) > 3, "a comparison calls the kernel several times"
    assert runs[2:] == [1, 1]


def test_a_users_own_module(device: torch.device, clean_registry: Registry, counted: dict[str, int]) -> None:
    block = Block().to(device)
    x = torch.randn(1, 2, 8, device=device, requires_grad=True)
    expected = torch.autograd.grad(block(x).sin().sum(), [x, *block.parameters()])
    kernelize_layers(block)
    for _ in range(2):
        before = counted["residual_norm"]
        found = torch.autograd.grad(block(x).sin().sum(), [x, *block.parameters()])
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs)
    assert before > 3, "the proof calls the kernel several times"
    assert counted["residual_norm"] == before + 1
    [binding] = clean_registry.bindings
    assert (binding.target.rpartition(":")[2], binding.kernel, binding.state) == (
        "Block",
        "residual_norm",
        "active",
    )


class Switched(nn.Module):
    """As Gemma 4 writes its norm."""

    def __init__(self, weighs: bool) -> None:
        super().__init__()
        self.weighs = weighs
        if weighs:
            self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)
        if self.weighs:
            wide = wide * self.weight.float()
        return wide.type_as(x)


class Listed(nn.Module):
    """Norms in a list, one of them called with the sum itself."""

    def __init__(self, weighs: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.norms = nn.ModuleList([Switched(weighs), Switched(weighs)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x + self.mix(x)
        return self.norms[1](x + self.norms[0](total))


@pytest.mark.parametrize(("weighs", "runs"), [(True, 2), (False, 0)])
def test_norms_of_a_list_that_may_have_a_weight(
    device: torch.device, counted: dict[str, int], weighs: bool, runs: int
) -> None:
    block = Listed(weighs).to(device)
    x = torch.randn(1, 2, 8, device=device)
    expected = block(x)
    kernelize_layers(block)
    for _ in range(2):
        block(x)
    before = counted["residual_norm"]
    close(block(x), expected)
    assert counted["residual_norm"] == before + runs


class Hybrid(nn.Module):
    """One class for two kinds of layers, each with what it needs alone."""

    def __init__(self, turns: bool) -> None:
        super().__init__()
        self.turns = turns
        if turns:
            self.turn = nn.Linear(8, 8)
        else:
            self.mix = nn.Linear(8, 8)
        self.norm = Norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.turns:  # noqa: SIM108
            other = self.turn(x)
        else:
            other = self.mix(x)
        x = x + other
        return x + self.norm(x)


def test_layers_of_a_class_may_differ_in_what_they_have(
    device: torch.device, clean_registry: Registry, counted: dict[str, int]
) -> None:
    model = nn.Sequential(Hybrid(True), Hybrid(False)).to(device)
    x = torch.randn(1, 2, 8, device=device)
    expected = model(x)
    kernelize_layers(model)
    model(x)
    before = counted["residual_norm"]
    close(model(x), expected)
    assert counted["residual_norm"] == before + 2
    assert [(b.kernel, b.state, b.instances) for b in clean_registry.bindings] == [
        ("residual_norm", "active", 2)
    ]


def test_the_rewritten_forward_looks_like_the_original(device: torch.device) -> None:
    block = Block().to(device)
    kernelize_layers(block)
    x = torch.randn(1, 2, 8, device=device)
    block(x)
    assert inspect.signature(block.forward) == inspect.signature(Block().forward)
    assert block.forward.__doc__ == "A block."
    with pytest.raises(RuntimeError, match="asked to") as caught:
        block(x, fail=True)
    frame = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (frame.filename, frame.line) == (__file__, 'raise RuntimeError("asked to")')


def test_what_the_program_raises_is_raised_once(device: torch.device, clean_registry: Registry) -> None:
    block = Block().to(device)
    kernelize_layers(block)
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyError("the first time")

    block.grow.register_forward_hook(hook)
    x = torch.randn(1, 2, 8, device=device)
    with pytest.raises(KeyError, match="the first time"):
        block(x)
    assert len(calls) == 1
    block(x)
    assert states(clean_registry)["residual_norm"] == ("active", "proven")


def test_state_copies_and_pickles_are_those_of_the_original(device: torch.device) -> None:
    block = Block().to(device)
    names = list(block.state_dict())
    kernelize_layers(block)
    x = torch.randn(1, 2, 8, device=device)
    expected = block(x)
    assert list(block.state_dict()) == names
    close(copy.deepcopy(block)(x), expected)
    assert type(pickle.loads(pickle.dumps(block))) is Block


@pytest.mark.parametrize("wrong", ["scaled", "sum", "gradient", "nan", "raises"])
def test_a_wrong_kernel_never_runs(
    device: torch.device, clean_registry: Registry, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    right = residual_norm.run

    def run(*args: Any) -> Any:
        if wrong == "raises":
            raise RuntimeError("broken")
        total, normed = right(*args)
        if wrong == "scaled":
            return total, normed * 1.01
        if wrong == "sum":
            return total * 1.01, normed
        if wrong == "nan":
            return total, normed * float("nan")
        return total, normed + (normed - normed.detach()) * 0.5

    monkeypatch.setattr(residual_norm, "run", run)
    block = Block().to(device)
    x = torch.randn(1, 2, 8, device=device)
    expected = block(x)
    kernelize_layers(block)
    with pytest.warns(Warning, match="keeps its original"):
        found = block(x)
    assert torch.equal(found, expected)
    assert torch.equal(block(x), expected)
    [binding] = clean_registry.bindings
    assert binding.state == ("failed")


def test_a_users_kernel_for_the_norm_goes_first(device: torch.device, counted: dict[str, int]) -> None:
    class Mine(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values * 0 + 7

    register_kernels({"layers": {"mine": {"target": Norm, "layer_impl": Mine}}})
    block = Block().to(device)
    kernelize_layers(block)
    assert torch.equal(block.after(torch.ones(8, device=device)), torch.full((8,), 7.0, device=device))
    block(torch.randn(1, 2, 8, device=device))
    assert counted["residual_norm"] == 0


def test_a_users_kernel_for_the_layer_goes_first(device: torch.device, clean_registry: Registry) -> None:
    class Mine(nn.Module):
        def forward(self, x: torch.Tensor, *, fail: bool = False) -> torch.Tensor:
            return x + 1

    register_kernels({"layers": {"mine": {"target": Block, "layer_impl": Mine}}})
    block = Block().to(device)
    kernelize_layers(block)
    kernelize_model(block)
    assert {b.kernel for b in clean_registry.bindings} == {"mine"}


def test_a_forward_that_uses_super_is_left_alone(device: torch.device) -> None:
    class Child(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + super().forward(x)
            return self.after(x)

    with pytest.raises(CannotRewrite, match="super"):
        Draft(Child.forward)
    block = Child().to(device)
    kernelize_layers(block)
    assert placed(block) is None


def test_decorators_that_are_known_are_kept(device: torch.device) -> None:
    from transformers.utils.deprecation import deprecate_kwarg

    class Old(Block):
        @deprecate_kwarg("old", new_name="x", version="99.0")
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.mix(x)
            return x + self.grow(self.after(x))

    block = Old().to(device)
    kernelize_layers(block)
    assert placed(block) is not None
    assert type(block) is Old
    x = torch.randn(1, 2, 8, device=device)
    close(block(x), own_forward(Old)(block, x))
