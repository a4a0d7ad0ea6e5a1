"""Sums before a LayerNorm inside the forward of a user's own module, and of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from rounding import assert_near
from torch import nn

from twinkle.apply.layers import kernelize_layers
from twinkle.fuse import residual_norm
from twinkle.kernel import unkernelize_model
from twinkle.ops.residual_norm import triton_layer_norm
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from twinkle.registry import Registry


@pytest.fixture
def at_any_size(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device, with a kernel for small sums as well."""
    monkeypatch.setattr(triton_layer_norm, "LEAST", 0)
    monkeypatch.setattr(residual_norm, "LEAST", 0)
    return device


def states(registry: Registry) -> dict[str, tuple[str, str]]:
    return {b.kernel: (b.state, b.proof.partition(":")[0]) for b in registry.bindings}


class Post(nn.Module):
    """As the output layers of BERT: the dropout is before the sum, the norm of the sum alone is returned."""

    def __init__(self, **norm: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(8, **norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.dropout(self.dense(x))
        return self.norm(h + x)


class Pre(nn.Module):
    """As the layers of GPT-2: the sum goes on beside the norm."""

    def __init__(self, **norm: Any) -> None:
        super().__init__()
        self.mix, self.grow = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8, **norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(x)
        return x + self.grow(self.norm(x))


class OverItsWeight(nn.Module):
    """A LayerNorm of one's own, over the shape of its weight; the bias may be None."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.bias = nn.Parameter(torch.rand(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Own(Pre):
    """As the blocks of programs in plain PyTorch."""

    def __init__(self, **norm: Any) -> None:
        super().__init__()
        self.norm = OverItsWeight(8, **norm)  # type: ignore[assignment]


def step(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # of the dropout
    y = module(x)
    wanted = [x, *module.parameters()]
    return [y, *torch.autograd.grad(y.float().sin().sum(), wanted)]


@pytest.mark.parametrize(
    ("cls", "norm"),
    [
        *[
            (cls, norm)
            for cls in (Post, Pre)
            for norm in ({}, {"bias": False}, {"elementwise_affine": False})
        ],
        (Own, {}),
        (Own, {"bias": False}),
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_the_original(
    at_any_size: torch.device, counted: dict[str, int], clean_registry: Registry, cls: type, norm: Any
) -> None:
    torch.manual_seed(0)
    module = cls(**norm).to(at_any_size)
    x = torch.randn(2, 3, 8, device=at_any_size)
    expected = step(module, x)
    kernelize_layers(module)
    found = step(module, x)
    assert states(clean_registry) == {"residual_norm": ("active", "proven")}
    before = counted["residual_norm"]
    again = step(module, x)
    assert counted["residual_norm"] == before + 1
    for ours, once_more, theirs in zip(found, again, expected, strict=True):
        assert_near(ours, theirs, 200)
        assert torch.equal(ours, once_more)


def test_a_sum_that_nobody_reads_is_not_written(
    at_any_size: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = []
    run = residual_norm.run
    monkeypatch.setattr(residual_norm, "run", lambda *args: wanted.append(args[8:]) or run(*args))
    x = torch.randn(2, 3, 8, device=at_any_size)
    for cls, expected in ((Post, (False,)), (Pre, (True,))):
        module = cls().to(at_any_size).eval()
        kernelize_layers(module)
        with torch.no_grad():
            module(x)
            wanted.clear()
            module(x)
        assert wanted == [expected]


def test_small_sums_take_the_original_steps(device: torch.device, counted: dict[str, int]) -> None:
    module = Post().to(device)
    kernelize_layers(module)
    x = torch.randn(2, 3, 8, device=device)
    found = step(module, x)
    step(module, x)
    assert counted["residual_norm"] == 0
    unkernelize_model(module)
    for ours, theirs in zip(found, step(module, x), strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_sums_half_precision_and_float32(
    at_any_size: torch.device, counted: dict[str, int], clean_registry: Registry
) -> None:
    """The linear layer gives half precision, the norm before it gave float32, and so does this norm."""
    torch.manual_seed(0)
    module = Post().to(at_any_size)
    x = torch.randn(2, 3, 8, device=at_any_size)
    with torch.autocast(at_any_size.type, torch.bfloat16):
        expected = step(module, x)
        kernelize_layers(module)
        found = step(module, x)
    assert states(clean_registry) == {"residual_norm": ("active", "proven")}
    assert counted["residual_norm"] > 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert_near(ours, theirs, 40, dtype=torch.bfloat16)


def test_half_precision_under_autocast_takes_the_original_steps(
    at_any_size: torch.device, counted: dict[str, int]
) -> None:
    """Both addends are half precision: on a GPU the norm of torch makes float32 of their sum there."""
    module = Post().to(at_any_size).eval()
    x = torch.randn(2, 3, 8, device=at_any_size, dtype=torch.bfloat16)
    with torch.autocast(at_any_size.type, torch.bfloat16):
        expected = module(x)
        kernelize_layers(module)
        assert torch.equal(module(x), expected)
    assert counted["residual_norm"] == 0


@pytest.mark.parametrize("change", ["hook", "eps", "shape", "class", "weight"])
def test_a_norm_that_is_another_now_runs_itself(
    at_any_size: torch.device, counted: dict[str, int], change: str
) -> None:
    module = Pre().to(at_any_size)
    kernelize_layers(module)
    x = torch.randn(2, 3, 8, device=at_any_size)
    module(x)
    before = counted["residual_norm"]
    if change == "hook":
        module.norm.register_forward_hook(lambda m, a, y: y * 2)
    elif change == "eps":
        module.norm.eps = 1  # an int: the kernel is for what it was proven with
    elif change == "shape":
        module.norm.normalized_shape = (4,)
    elif change == "class":
        module.norm = nn.Identity()  # type: ignore[assignment]
    else:
        module.norm.weight = None  # type: ignore[assignment]
    if change == "shape":
        with pytest.raises(RuntimeError, match="normalized_shape"):
            module(x)
        assert counted["residual_norm"] == before
        return
    found = module(x)
    assert counted["residual_norm"] == before + (change == "weight"), "torch's norm does without a weight"
    unkernelize_model(module)
    assert_near(found, module(x), 200)


def test_a_compiler_sees_the_op(at_any_size: torch.device, counted: dict[str, int]) -> None:
    torch.manual_seed(0)
    module = Pre().to(at_any_size)
    x = torch.randn(2, 3, 8, device=at_any_size)
    expected = step(module, x)
    kernelize_layers(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_near(compiled(x), expected[0], 200)
    assert counted["residual_norm"] > 0


MODELS = {
    "Bert": ("BertConfig", "BertModel", {}),
    "GPT2": ("GPT2Config", "GPT2Model", {"n_positions": 16}),
    "ViT": ("ViTConfig", "ViTModel", {"image_size": 8, "patch_size": 4}),
}


@pytest.mark.parametrize("family", MODELS)
def test_models_of_transformers(
    at_any_size: torch.device, counted: dict[str, int], clean_registry: Registry, family: str
) -> None:
    transformers = pytest.importorskip("transformers")
    config, model, more = MODELS[family]
    small = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = getattr(transformers, config)(**small, intermediate_size=24, max_position_embeddings=16, **more)
    torch.manual_seed(0)
    built = getattr(transformers, model)(made).to(at_any_size).eval()
    if family == "ViT":
        given = {"pixel_values": torch.randn(2, 3, 8, 8, device=at_any_size)}
    else:
        given = {"input_ids": torch.arange(10, device=at_any_size).view(2, 5)}
    with torch.no_grad():
        expected = built(**given).last_hidden_state
        kernelize_layers(built)
        found = built(**given).last_hidden_state
    assert_near(found, expected, 400)
    assert states(clean_registry) == {"residual_norm": ("active", "proven")}
    assert counted["residual_norm"] >= 2
    ops = ("residual_norm", "qk_norm_rotary", "modulated_norm", "group_norm")
    assert runtime.options.kernels == ops
