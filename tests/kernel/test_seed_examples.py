"""Every example of the API's document, as written but for paths and, without a GPU, the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path

    from twinkle.registry import Registry

pytestmark = pytest.mark.usefixtures("clean_registry", "my_pkg")

HERE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICES = [HERE, "cuda"] if HERE == "cpu" else ["cuda"]


def run(source: str, **names: object) -> dict[str, object]:
    scope: dict[str, object] = {"__name__": "example", **names}
    exec(compile(source, "<example>", "exec"), scope)
    return scope


def states(registry: Registry) -> dict[tuple[str, str], str]:
    return {(b.target, b.mode): b.state for b in registry.bindings}


LOCAL_REPO = """
from twinkle.kernel import (
    kernelize_model,
    register_layer_kernel,
    register_external_layer,
)
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
# 1) Register the layer kernel from a local repo
register_layer_kernel(
    kernel_name="MyAwesomeMLP",
    repo_path=REPO,
    package_name="my_kernels",
    layer_name="Qwen2MLPTrainingKernel",
    device=DEVICE,
    mode="train",
)
# 2) Bind external layer to kernel name
register_external_layer(Qwen2MLP, "MyAwesomeMLP")
# 3) Build the model and apply kernelization
config = Qwen2Config(
    hidden_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=256,
    use_cache=False,
)
model = Qwen2ForCausalLM(config)
model = kernelize_model(model, mode="train", device=DEVICE, use_fallback=True)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_layer_example_1_local_repo(device: str, local_repo: Path, clean_registry: Registry) -> None:
    scope = run(LOCAL_REPO, REPO=str(local_repo), DEVICE=device)
    (state,) = states(clean_registry).values()
    assert state == ("active" if device == HERE else "skipped")
    model = scope["model"].to(HERE)  # type: ignore[attr-defined]
    out = model(torch.arange(8, device=HERE)[None])
    assert torch.isfinite(out.logits).all()


HUB_REPO = """
import torch
import torch.nn as nn
from twinkle.kernel import (
    kernelize_model,
    register_layer_kernel,
    register_external_layer,
)
# 1) Define the custom layer
class SiluAndMul(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        return nn.functional.silu(x1) * x2
# 2) Register the Hub kernel and bind the layer
register_layer_kernel(
    kernel_name="SiluAndMulKernel",
    repo_id="kernels-community/activation",
    layer_name="SiluAndMul",
    device="cuda",
    mode="train",
)
register_external_layer(SiluAndMul, "SiluAndMulKernel")
# 3) Apply to a model
class SimpleModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation = SiluAndMul()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(x)
model = SimpleModel()
model = kernelize_model(model, mode="train", device="cuda", use_fallback=True)
"""


def test_layer_example_2_hub_repo(clean_registry: Registry) -> None:
    scope = run(HUB_REPO)
    x = torch.randn(2, 8)
    expected = torch.nn.functional.silu(x[:, :4]) * x[:, 4:]
    assert torch.equal(scope["model"](x), expected)  # type: ignore[operator]
    (binding,) = clean_registry.bindings
    assert binding.state != "active"
    assert binding.reason


BATCH = """
from twinkle.kernel import register_kernels, kernelize_model
# 1) Register function kernels
config = {
    "functions": {
        "add": {
            "target_module": "my_pkg.math_ops",
            "func_impl": lambda x, y: x + y + 1,
            "device": DEVICE,
            "mode": "inference",
        },
    },
}
register_kernels(config)
# 2) Apply (model can be None when only functions are used)
kernelize_model(model=None, mode="inference", device=DEVICE, use_fallback=True)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_function_example_1_batch_registration(device: str) -> None:
    scope = run(BATCH, DEVICE=device)
    from my_pkg.math_ops import add

    assert add(1, 2) == (4 if device == HERE else 3)
    config = scope["config"]
    assert set(config["functions"]["add"]) == {"target_module", "func_impl", "device", "mode"}  # type: ignore[index]


SOURCES = """
from twinkle.kernel.function import (
    register_function_kernel,
    apply_function_kernel,
)
import torch.nn as nn
from twinkle.kernel import kernelize_model
TARGET_MODULE = "my_pkg.math_ops"
# 1) Direct implementation
def fast_add(x, y):
    return x + y + 1
register_function_kernel(
    func_name="add",
    target_module=TARGET_MODULE,
    func_impl=fast_add,
    device=DEVICE,
    mode="inference",
)
# 2) Repo object (FuncRepositoryProtocol)
class MyFuncRepo:
    def load(self):
        return MyKernelFunc
class MyKernelFunc(nn.Module):
    def forward(self, x, y):
        return x * y
register_function_kernel(
    func_name="mul",
    target_module=TARGET_MODULE,
    repo=MyFuncRepo(),
    device=DEVICE,
    mode="compile",
)
# 3) Hub repo
register_function_kernel(
    func_name="silu_and_mul",
    target_module="my_pkg.activations",
    repo_id="kernels-community/activation",
    revision="main", # or version="0.1.0"
    device="cuda",
    mode="inference",
)
# 4) Apply function kernels
applied = apply_function_kernel(
    target_module=TARGET_MODULE,
    device=DEVICE,
    mode="inference",
    strict=False,
)
print("patched:", applied)
# 5) Optional: unified entry via kernelize_model
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
kernelize_model(model=model, mode="inference", device=DEVICE, use_fallback=True)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_function_example_2_sources(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    scope = run(SOURCES, DEVICE=device)
    from my_pkg.math_ops import add, mul

    here = device == HERE
    assert scope["applied"] == (["my_pkg.math_ops.add"] if here else [])
    assert capsys.readouterr().out == f"patched: {scope['applied']}\n"
    assert add(1, 2) == (4 if here else 3)
    assert mul(2, 3) == 6000, "a kernel registered for compile is left alone by inference"


@pytest.mark.parametrize("device", DEVICES)
def test_function_example_2_applies_mul_for_compile(device: str) -> None:
    scope = run(SOURCES, DEVICE=device)
    from my_pkg import math_ops

    applied = scope["apply_function_kernel"](math_ops.__name__, device=device, mode="compile")  # type: ignore[operator]
    here = device == HERE
    assert applied == (["my_pkg.math_ops.mul"] if here else [])
    assert math_ops.mul(2, 3) == (6 if here else 6000)
    assert math_ops.add(1, 2) == 3, "a kernel registered for inference is left alone by compile"


UNIFIED = """
from twinkle.kernel import register_kernels, kernelize_model
import torch.nn as nn
# 1) Register layer + function kernels
config = {
    "layers": {
        "linear": {
            "repo_id": "kernels-community/linear",
            "layer_name": "Linear",
            "version": "0.1.0",
            "device": "cuda",
            "mode": "train",
        },
        "conv2d": {
            "repo_path": REPO,
            "package_name": "my_kernels",
            "layer_name": "Conv2d",
            "device": DEVICE,
        },
    },
    "functions": {
        "add": {
            "target_module": "my_pkg.math_ops",
            "func_impl": lambda x, y: x + y + 1,
            "device": DEVICE,
            "mode": "inference",
        },
        "relu": {
            "target_module": "my_pkg.activations",
            "repo_id": "kernels-community/activation",
            "revision": "main",
            "device": "cuda",
        },
    },
}
register_kernels(config)
# 2) Apply via kernelize_model
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
kernelize_model(model=model, mode="train", device=DEVICE, use_fallback=True)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_unified_registration(device: str, local_repo: Path) -> None:
    scope = run(UNIFIED, REPO=str(local_repo), DEVICE=device)
    from my_pkg.math_ops import add

    assert add(1, 2) == 3, "an inference kernel is not used in training"
    model = scope["model"].to(HERE)  # type: ignore[attr-defined]
    assert model(torch.randn(2, 8, device=HERE)).shape == (2, 8)


def test_unified_registration_binds_external_layers(local_repo: Path, clean_registry: Registry) -> None:
    scope = run(UNIFIED, REPO=str(local_repo), DEVICE=HERE)
    from torch import nn

    from twinkle.kernel import kernelize_model, register_external_layer

    register_external_layer(nn.Conv2d, "conv2d")
    model = kernelize_model(nn.Sequential(nn.Conv2d(1, 2, 3)).to(HERE), mode="train", device=HERE)
    assert model(torch.randn(1, 1, 4, 4, device=HERE)).shape == (1, 2, 2, 2)
    assert [b.state for b in clean_registry.bindings if b.target == "torch.nn.modules.conv:Conv2d"] == [
        "active"
    ]
    assert scope["config"]["layers"]["conv2d"]["device"] == HERE  # type: ignore[index]
