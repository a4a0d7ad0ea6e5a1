"""Rotations of a program in plain PyTorch: found wherever the code has them from, proven, and run."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

import pytest
import torch

from twinkle.apply.layers import kernelize_layers
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from twinkle.registry import Registry

ROPE = """
import torch

def apply_rotary_emb(x, cos, sin):
    assert x.ndim == 4
    d = x.shape[3] // 2
    x1, x2 = x[..., :d], x[..., d:]
    y1 = x1 * cos + x2 * sin
    y2 = x1 * (-sin) + x2 * cos
    return torch.cat([y1, y2], 3)
"""
ATTENTION = """
import torch
from torch import nn
import torch.nn.functional as F
{imports}

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96, bias=False), nn.Linear(32, 32, bias=False)
        angle = torch.outer(torch.arange(16.0), 0.1 ** torch.arange(4))
        self.register_buffer("cos", angle.cos()[None, :, None, :])
        self.register_buffer("sin", angle.sin()[None, :, None, :])

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, 8).unbind(2)
        cos, sin = self.cos[:, :t], self.sin[:, :t]
        q, k = {call}(q, cos, sin), {call}(k, cos, sin)
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, t, 32))
{methods}
"""
STATIC = """
    @staticmethod
    def turned(x, cos, sin):
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)
"""
METHOD = """
    def turned(self, x, cos, sin):
        cos, sin = self.cos[:, : x.shape[1]], self.sin[:, : x.shape[1]]
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)
"""
TWICE = """
def turned(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)

def both(q, k, cos, sin):
    return turned(q, cos[:, :, None], sin[:, :, None]), turned(k, cos[:, :, None], sin[:, :, None])
"""
LAYER = """
class Rotation(nn.Module):
    def __init__(self):
        super().__init__()
        angle = torch.outer(torch.arange(16.0), 0.1 ** torch.arange(4))
        self.register_buffer("cache", torch.stack((angle.cos(), -angle.sin()), -1))

    def forward(self, x, *, input_pos=None):
        cache = self.cache[: x.size(1)] if input_pos is None else self.cache[input_pos]
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        cache = cache.view(-1, pairs.size(1), 1, pairs.size(3), 2)
        first = pairs[..., 0] * cache[..., 0] + pairs[..., 1] * cache[..., 1]
        second = pairs[..., 1] * cache[..., 0] - pairs[..., 0] * cache[..., 1]
        return torch.stack([first, second], -1).flatten(3)
"""
WAYS = {
    "in its module": (ROPE, "apply_rotary_emb", "", "rope_program:apply_rotary_emb"),
    "imported": (
        "from rope_helpers import apply_rotary_emb",
        "apply_rotary_emb",
        "",
        "rope_helpers:apply_rotary_emb",
    ),
    "renamed": (
        "from rope_helpers import apply_rotary_emb as turn",
        "turn",
        "",
        "rope_helpers:apply_rotary_emb",
    ),
    "of a module": (
        "import rope_helpers",
        "rope_helpers.apply_rotary_emb",
        "",
        "rope_helpers:apply_rotary_emb",
    ),
    "static method": ("", "self.turned", STATIC, "rope_program:Attention.turned"),
    "method": ("", "self.turned", METHOD, "rope_program:Attention.turned"),
}


@pytest.fixture
def program(clean_registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    def made(imports: str, call: str, methods: str) -> Any:
        text = ATTENTION.format(imports=imports, call=call, methods=methods)
        module: Any = None
        for name, source in (("rope_helpers", ROPE), ("rope_program", text)):
            path = tmp_path / f"{name}.py"
            path.write_text(source)
            module = types.ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            exec(compile(source, str(path), "exec"), vars(module))
        runtime.options.kernels = ("rotary",)
        return module

    return made


def step(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


@pytest.fixture
def launches(kernels: torch.device, unplanned: None, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each launch of the kernel was one for gradients."""
    from twinkle.ops.rotary import triton

    launch, found = triton.turn, []

    def turn(*args: Any, **named: Any) -> None:
        found.append(named["back"])
        launch(*args, **named)

    monkeypatch.setattr(triton, "turn", turn)
    return found


def active(registry: Registry) -> list[tuple[str, str, str]]:
    return [(b.target, b.state, b.source) for b in registry.bindings if "rope_" in b.target]


@pytest.mark.parametrize("way", WAYS)
def test_a_rotation_gets_a_kernel_wherever_its_code_is(
    program: Any, clean_registry: Registry, kernels: torch.device, launches: list[bool], way: str
) -> None:
    imports, call, methods, target = WAYS[way]
    torch.manual_seed(0)
    model = program(imports, call, methods).Attention().to(kernels)
    x = torch.randn(2, 9, 32).to(kernels)
    expected = step(model, x)
    kernelize_layers(model)
    step(model, x)  # is compared
    launches.clear()
    found = step(model, x)
    assert active(clean_registry) == [(target, "active", "embedded rotary (halves_inverse), triton")]
    assert launches == [False, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("positions", [None, [3, 1, 4, 1, 5]])
def test_a_rotation_that_is_a_layer_gets_a_kernel(
    program: Any,
    clean_registry: Registry,
    kernels: torch.device,
    launches: list[bool],
    positions: list[int] | None,
) -> None:
    model = program(LAYER, "print", "").Rotation().to(kernels)
    x = torch.randn(2, 5, 4, 8).to(kernels).requires_grad_()
    at = None if positions is None else torch.tensor(positions, device=kernels)
    expected = torch.autograd.grad(model(x, input_pos=at).square().sum(), x)
    kernelize_layers(model)
    model(x, input_pos=at)
    launches.clear()
    found = torch.autograd.grad(model(x, input_pos=at).square().sum(), x)
    target = ("rope_program:Rotation.forward", "active", "embedded rotary (pairs_inverse), triton")
    assert active(clean_registry) == [target]
    assert launches == [False, True]
    assert torch.equal(found[0], expected[0])
    assert [*model.state_dict()] == ["cache"]


def test_of_a_rotation_and_its_helper_the_whole_gets_the_kernel(
    program: Any, clean_registry: Registry, kernels: torch.device, launches: list[bool]
) -> None:
    module = program(TWICE, "", "")
    kernelize_layers(module.Attention())
    q, k = torch.randn(2, 5, 4, 8).to(kernels), torch.randn(2, 5, 1, 8).to(kernels)
    cos, sin = torch.randn(2, 2, 5, 4).to(kernels)
    with torch.no_grad():
        expected = module.both(q, k, cos, sin)
        launches.clear()
        assert all(map(torch.equal, module.both(q, k, cos, sin), expected))
    assert launches == [False]
    assert [target for target, _, _ in active(clean_registry)] == ["rope_program:both"]


def test_a_program_that_changes_the_function_gets_its_own(
    program: Any, clean_registry: Registry, kernels: torch.device
) -> None:
    module = program(ROPE, "apply_rotary_emb", "")
    model = module.Attention().to(kernels)
    kernelize_layers(model)
    x = torch.randn(2, 9, 32).to(kernels)
    before = model(x)
    module.apply_rotary_emb = lambda x, cos, sin: x
    assert not torch.equal(model(x), before)


def test_code_that_is_no_rotation_is_left_alone(program: Any, clean_registry: Registry) -> None:
    no_rotation = ROPE.replace("x1 * (-sin)", "x1 * sin")
    kernelize_layers(program(no_rotation, "apply_rotary_emb", "").Attention())
    assert active(clean_registry) == []
