"""What the recognition of a layer rests on, and whether a guard sees each change of it."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.nn.utils import prune

from twinkle.match.instance import Facts
from twinkle.match.structure import check_instance, recognise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from twinkle.match.reads import Guard

WIDE = True


def root(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def made_with(eps: float) -> tuple[Any, Any]:
    """A helper that has a number from the function around it, and what changes the number."""

    def normed(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def change(value: float) -> None:
        nonlocal eps
        eps = value

    return normed, change


normed, set_eps = made_with(1e-6)
TABLE = [F.silu, F.gelu]


class Norm(nn.Module):
    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.eps = eps

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return x * root(x, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float() if WIDE else x
        return self.weight * self.normed(wide).to(x.dtype)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(4, 4) for _ in range(3))
        self.act = nn.SiLU()

    def forward(this, x: torch.Tensor) -> torch.Tensor:
        return this.down(this.act(this.gate(x)) * this.up(x))


def facts_of(layer: nn.Module) -> Facts:
    facts = check_instance(recognise(type(layer)), layer)
    assert isinstance(facts, Facts), facts
    return facts


@contextmanager
def put(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def hooked(register: Callable[..., Any], *hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(*(hook or (lambda *given: None,)))
    try:
        yield
    finally:
        handle.remove()


def here() -> Any:
    import sys

    return sys.modules[__name__]


def other(*given: Any, **named: Any) -> Any:
    raise AssertionError("never called")


@contextmanager
def eps_of(value: float) -> Iterator[None]:
    set_eps(value)
    try:
        yield
    finally:
        set_eps(1e-6)


@contextmanager
def item(owner: Any, at: Any, value: Any) -> Iterator[None]:
    before = owner[at]
    owner[at] = value
    try:
        yield
    finally:
        owner[at] = before


NORM: dict[str, Callable[[Norm], Any]] = {
    "the code of its forward": lambda norm: put(Norm.forward, "__code__", other.__code__),
    "a method": lambda norm: put(Norm, "normed", other),
    "a method of the instance": lambda norm: hiding(norm, "normed"),
    "a helper": lambda norm: put(here(), "root", other),
    "the code of a helper": lambda norm: put(root, "__code__", other.__code__),
    "a flag of its module": lambda norm: put(here(), "WIDE", False),
    "torch's function": lambda norm: put(torch, "rsqrt", other),
    "an eps that is no number": lambda norm: put(norm, "eps", torch.tensor(1e-6)),
    "no weight": lambda norm: hiding_parameter(norm),
}
MLPS: dict[str, Callable[[MLP], Any]] = {
    "another activation": lambda mlp: put(mlp, "act", nn.ReLU()),
    "a forward hook": lambda mlp: hooked(mlp.act.register_forward_hook),
    "a forward pre-hook": lambda mlp: hooked(mlp.act.register_forward_pre_hook),
    "a backward hook": lambda mlp: hooked(mlp.act.register_full_backward_hook),
    "a backward pre-hook": lambda mlp: hooked(mlp.act.register_full_backward_pre_hook),
    "a forward of the activation's own": lambda mlp: hiding(mlp.act, "forward"),
    "the forward of the activation's class": lambda mlp: put(nn.SiLU, "forward", other),
    "a setting of the activation": lambda mlp: put(mlp.act, "inplace", True),
    "the function that the activation calls": lambda mlp: put(F, "silu", other),
    "a forward hook on all": lambda mlp: hooked(register_module_forward_hook),
    "a pre-hook on all": lambda mlp: hooked(register_module_forward_pre_hook),
    "a backward hook on all": lambda mlp: hooked(register_module_full_backward_hook),
}


@contextmanager
def hiding(layer: nn.Module, name: str) -> Iterator[None]:
    layer.__dict__[name] = other
    try:
        yield
    finally:
        del layer.__dict__[name]


@contextmanager
def hiding_parameter(norm: Norm) -> Iterator[None]:
    weight, norm.weight = norm.weight, None  # type: ignore[assignment]
    try:
        yield
    finally:
        norm.weight = weight


def check(guard: Guard, layer: nn.Module, change: Any) -> None:
    cls = type(layer)
    assert guard.changed(layer, cls) is None
    assert guard.holds(layer, cls)
    with change:
        assert not guard.holds(layer, cls)
        assert guard.changed(layer, cls)
    assert guard.holds(layer, cls)


@pytest.mark.parametrize("what", NORM)
def test_a_norm_rests_on(what: str) -> None:
    norm = Norm()
    check(facts_of(norm).handed_guard, norm, NORM[what](norm))


@pytest.mark.parametrize("what", MLPS)
def test_a_gated_mlp_rests_on(what: str) -> None:
    mlp = MLP()
    check(facts_of(mlp).handed_guard, mlp, MLPS[what](mlp))


def test_a_kernel_that_is_handed_numbers_and_layers_follows_them() -> None:
    norm, mlp = Norm(), MLP()
    of_norm, of_mlp = facts_of(norm), facts_of(mlp)
    norm.eps = 0.5
    mlp.down = nn.Sequential(mlp.down)  # type: ignore[assignment]
    assert of_norm.paths == {"eps": "eps"}
    assert of_norm.handed_guard.holds(norm, Norm)
    assert of_mlp.handed_guard.holds(mlp, MLP)
    assert of_norm.guard.changed(norm, Norm) == "eps"
    assert of_mlp.guard.changed(mlp, MLP) == "down"


def test_a_weight_that_a_hook_computes_is_still_the_weight() -> None:
    norm = Norm()
    guard = facts_of(norm).handed_guard
    prune.l1_unstructured(norm, "weight", 0.5)
    assert guard.holds(norm, Norm)
    assert facts_of(norm).handed_guard.holds(norm, Norm)


@pytest.mark.parametrize("affine", [True, False])
def test_torchs_layer_norm_rests_on_its_shape_and_on_having_a_weight(affine: bool) -> None:
    norm = nn.LayerNorm(4, elementwise_affine=affine)
    guard = facts_of(norm).handed_guard
    check(guard, norm, put(norm, "normalized_shape", (2, 2)))
    check(guard, norm, put(norm, "weight", None if affine else nn.Parameter(torch.ones(4))))
    check(guard, norm, put(F, "layer_norm", other))
    norm.eps = 0.5
    assert guard.holds(norm, nn.LayerNorm)


def test_layers_that_rest_on_the_same_have_equal_guards() -> None:
    a, b = MLP(), MLP()
    assert facts_of(a).handed_guard == facts_of(b).handed_guard
    assert facts_of(a).guard == facts_of(b).guard
    b.act = nn.Mish()  # type: ignore[assignment]
    assert facts_of(a).handed_guard != facts_of(b).handed_guard


def test_equal_numbers_shapes_and_partial_functions_of_layers_make_equal_guards() -> None:
    assert facts_of(Norm(float("1e-6"))).guard == facts_of(Norm(float("1e-6"))).guard
    assert facts_of(nn.LayerNorm((2, 4))).guard == facts_of(nn.LayerNorm((2, 4))).guard
    a, b = Tanh(), Tanh()
    mlps = [MLP(), MLP()]
    for mlp, act in zip(mlps, (a, b), strict=True):
        mlp.act = act  # type: ignore[assignment]
    guard = facts_of(mlps[0]).handed_guard
    assert facts_of(mlps[0])["activation"] == "gelu_tanh"
    assert guard == facts_of(mlps[1]).handed_guard
    check(guard, mlps[0], put(a, "act", partial(F.gelu, approximate="none")))


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = partial(F.gelu, approximate="tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x)


def test_a_class_is_recognised_anew_when_its_code_changed() -> None:
    class Changing(Norm):
        pass

    assert recognise(Changing).op == "rms_norm"
    with put(Changing, "forward", other):
        assert recognise(Changing).op is None
    assert recognise(Changing) is recognise(Changing)


SHAPE = 4


class Fused(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (SHAPE,), self.weight, 1e-6)


class Last(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


class Computed(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-2:], self.weight, 1e-6)


class OfAttributes(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.width,), self.weight, 1e-6)


def test_a_shape_of_numbers_is_a_fact_and_one_that_is_computed_is_not() -> None:
    assert recognise(Fused).facts["normalized_shape"] == (4,)
    check(facts_of(Fused()).handed_guard, Fused(), put(here(), "SHAPE", 2))
    assert "normalized_shape" not in recognise(Last).facts
    assert not recognise(Computed)


def test_a_number_in_a_shape_is_read_from_the_instance() -> None:
    layer = OfAttributes()
    layer.width = 4
    assert facts_of(layer)["normalized_shape"] == (4,)
    check(facts_of(layer).handed_guard, layer, put(layer, "width", 2))


class Closing(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * normed(x)


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(TABLE[0](self.gate(x)) * self.up(x))


def test_a_number_of_the_function_around_a_helper_is_watched() -> None:
    norm = Closing()
    check(facts_of(norm).handed_guard, norm, eps_of(0.5))


def test_an_item_of_a_list_in_a_global_is_watched() -> None:
    mlp = Choosing()
    guard = facts_of(mlp).handed_guard
    check(guard, mlp, item(TABLE, 0, F.relu))
    TABLE.append(F.relu)
    try:
        assert not guard.holds(mlp, Choosing)
    finally:
        TABLE.pop()


def test_the_implementation_of_experts_is_watched_and_so_is_the_table_it_is_looked_up_in() -> None:
    moe = pytest.importorskip("transformers.integrations.moe")
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config: Any = Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=8, num_experts=2)
    table = moe.ALL_EXPERTS_FUNCTIONS
    for name, home in (("eager", table._local_mapping), ("grouped_mm", table._global_mapping)):
        config._experts_implementation = name
        layer = Qwen3MoeExperts(config)
        guard = facts_of(layer).handed_guard
        check(guard, layer, put(config, "_experts_implementation", "batched_mm"))
        before = dict(home)
        home[name] = other
        try:
            assert "the table of" in str(guard.changed(layer, Qwen3MoeExperts))
        finally:
            home.clear()
            home.update(before)
        assert guard.holds(layer, Qwen3MoeExperts)


def test_a_property_of_the_class_counts_for_a_number() -> None:
    norm = Norm()
    guard = facts_of(norm).guard
    Norm.eps = property(lambda self: 0.5)  # type: ignore[assignment, method-assign]
    try:
        assert guard.changed(norm, Norm) == "eps"
    finally:
        del Norm.eps
    assert guard.holds(norm, Norm)


def test_a_guard_reads_no_global_or_builtin_of_the_function_it_stands_in() -> None:
    layers: tuple[nn.Module, ...] = (Norm(), MLP(), nn.LayerNorm(4))
    for layer in layers:
        facts = facts_of(layer)
        for guard in (facts.guard, facts.handed_guard):
            text, names = guard.of(type(layer)).inline("self", "_tw_guard0_")
            known = {"_tw_compiling", "_tw_type", "_tw_kept", "self", *names}
            free = {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}
            assert all(n.startswith(("_tw_at_", "_tw_forward", "_tw_state")) for n in free - known), free
