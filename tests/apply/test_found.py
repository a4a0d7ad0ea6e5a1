"""``match`` for functions: a kernel for every function beside a model's classes that is an op."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from twinkle.apply.layers import kernelize_layers
from twinkle.kernel import kernelize_model, register_kernels
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from twinkle.registry import Registry

PROGRAM = """
import torch
from torch import nn

def halves(x):
    middle = x.shape[-1] // 2
    return torch.cat((-x[..., middle:], x[..., :middle]), dim=-1)

def turn(queries, keys, cosine, sine):
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    return queries * cosine + halves(queries) * sine, keys * cosine + halves(keys) * sine

def other(queries, keys):
    return queries + keys

class Attention(nn.Module):
    def forward(self, q, k, cos, sin):
        return turn(q, k, cos, sin)
"""
INPUTS = (torch.rand(1, 2, 5, 8), torch.rand(1, 2, 5, 8), torch.rand(1, 5, 8), torch.rand(1, 5, 8))


@pytest.fixture
def program(clean_registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    path = tmp_path / "found_program.py"
    path.write_text(PROGRAM)
    module: Any = types.ModuleType("found_program")
    exec(compile(PROGRAM, str(path), "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "found_program", module)
    return module


def zeros(queries: Any, keys: Any, cosine: Any, sine: Any) -> Any:
    return queries * 0, keys * 0


def ones(queries: Any, keys: Any, cosine: Any, sine: Any) -> Any:
    return queries * 0 + 1, keys * 0


class Fitted(nn.Module):
    """A kernel that has a function for each variant, with the arguments of the original."""

    asked: Any = None

    def forward(self, queries: Any, keys: Any, cosine: Any, sine: Any) -> Any:
        raise AssertionError("for_variant gives another one")

    @staticmethod
    def for_variant(variant: Any, facts: Any, original: Any) -> Any:
        Fitted.asked = (variant.name, facts["cos"], original.__name__)
        return zeros


def bind(spec: dict[str, Any]) -> None:
    register_kernels({"functions": {"mine": {"match": "rotary", "verify": "off", **spec}}})


def is_zero(module: Any) -> bool:
    return not any(part.any() for part in module.Attention()(*INPUTS))


@pytest.mark.parametrize("way", ["hook", "kernelize_model"])
def test_a_function_is_found_by_its_code(program: Any, clean_registry: Registry, way: str) -> None:
    bind({"func_impl": zeros})
    kernelize_layers(program.Attention()) if way == "hook" else kernelize_model(program.Attention())
    assert is_zero(program)
    assert torch.equal(program.other(*INPUTS[:2]), INPUTS[0] + INPUTS[1])
    assert [(b.target, b.state) for b in clean_registry.bindings] == [("found_program:turn", "active")]


def test_a_kernel_may_have_a_function_for_each_variant(program: Any) -> None:
    bind({"func_impl": Fitted})
    kernelize_layers(program.Attention())
    assert is_zero(program)
    assert Fitted.asked == ("half", "cosine", "turn")


def test_what_was_found_is_proven_before_it_runs(program: Any, clean_registry: Registry) -> None:
    expected = program.Attention()(*INPUTS)
    bind({"func_impl": zeros, "verify": None})
    kernelize_layers(program.Attention())
    with pytest.warns(match="does not compute the same"):
        found = program.Attention()(*INPUTS)
    assert all(map(torch.equal, found, expected))


def test_a_kernel_bound_by_name_goes_first(program: Any) -> None:
    bind({"func_impl": zeros})
    given = {"target_module": "found_program", "func_impl": ones}
    register_kernels({"functions": {"turn": given}})
    kernelize_model(program.Attention())
    assert program.Attention()(*INPUTS)[0].eq(1).all()


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_a_programs_own_kernel_goes_before_the_embedded_one(program: Any, first: str) -> None:
    runtime.options.kernels = ("rotary",)
    if first == "ours":
        kernelize_layers(program.Attention())
    bind({"func_impl": zeros})
    kernelize_layers(program.Attention())
    assert is_zero(program)


def test_one_that_is_switched_off_is_left_alone(program: Any, clean_registry: Registry) -> None:
    bind({"func_impl": zeros})
    runtime.options.disabled = ("mine",)
    kernelize_layers(program.Attention())
    assert not is_zero(program)
    assert [(b.target, b.state) for b in clean_registry.bindings] == [("match:rotary", "skipped")]


def test_one_that_was_not_met_is_pending(clean_registry: Registry) -> None:
    bind({"func_impl": zeros})
    assert [(b.target, b.reason) for b in clean_registry.bindings] == [
        ("match:rotary", "no such function was met yet")
    ]
