"""Registration: what adds up, what replaces, what is refused, and that a refusal registers nothing."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from twinkle.errors import ConfigError
from twinkle.kernel import (
    register_external_layer,
    register_function_kernel,
    register_kernels,
    register_layer_kernel,
)

if TYPE_CHECKING:
    from twinkle.registry import Registry


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Triple(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 3


def test_modes_and_devices_under_one_name_add_up(clean_registry: Registry) -> None:
    register_layer_kernel("k", layer_impl=Double, mode="train")
    register_layer_kernel("k", layer_impl=Triple, mode="inference")
    register_layer_kernel("k", layer_impl=Triple, mode="train", device="cuda")
    assert [(k.device, str(k.mode)) for k in clean_registry.kernels_named("k")] == [
        (None, "train"),
        (None, "inference"),
        ("cuda", "train"),
    ]


def test_the_same_name_device_and_mode_again_replaces(clean_registry: Registry) -> None:
    register_layer_kernel("k", layer_impl=Double, mode="train")
    register_layer_kernel("k", layer_impl=Triple, mode="train")
    (kernel,) = clean_registry.kernels_named("k")
    assert kernel.source.load() is Triple


def test_cuda_0_is_cuda(clean_registry: Registry) -> None:
    register_layer_kernel("k", layer_impl=Double, device="cuda:0")
    register_layer_kernel("k", layer_impl=Double, device=torch.device("cuda", 1))
    assert [k.device for k in clean_registry.kernels_named("k")] == ["cuda"]


def test_where_a_kernel_was_registered_is_remembered(clean_registry: Registry) -> None:
    register_layer_kernel("k", layer_impl=Double)
    assert "test_register.py:" in clean_registry.kernels_named("k")[0].origin


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "(?i)source|repo_id|layer_impl"),
        ({"repo_path": "/r", "package_name": "p", "repo_id": "a/b"}, "repo_id"),
        ({"repo_path": "/r"}, "package_name"),
        ({"layer_impl": Double, "mode": "trian"}, "did you mean 'train'"),
        ({"layer_impl": Double, "device": "cuda:x"}, "unknown device"),
        ({"layer_impl": Double(), "device": "cpu"}, "class"),
        ({"repo_id": "a/b", "version": "one"}, "version"),
    ],
)
def test_what_cannot_be_right_is_refused_and_nothing_is_registered(
    arguments: dict[str, object], message: str, clean_registry: Registry
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        register_layer_kernel("k", **arguments)  # type: ignore[arg-type]
    assert "test_register.py" in str(caught.value), "the message names the line of the call"
    assert clean_registry.layer_kernels == ()


def test_the_seed_versions_register(clean_registry: Registry) -> None:
    register_layer_kernel("a", repo_id="kernels-community/linear", layer_name="Linear", version="0.1.0")
    register_layer_kernel("b", repo_id="kernels-community/activation", layer_name="SiluAndMul")
    assert len(clean_registry.layer_kernels) == 2


@pytest.mark.parametrize("layer", [3, Double(), "no.colon", object])
def test_what_is_no_layer_class_is_refused(layer: object, clean_registry: Registry) -> None:
    with pytest.raises(ConfigError):
        register_external_layer(layer, "k")  # type: ignore[arg-type]
    assert clean_registry.layer_targets == ()


def test_a_list_of_functions_registers_each(clean_registry: Registry) -> None:
    register_kernels(
        {
            "functions": [
                {"func_name": "f", "target_module": "m", "func_impl": lambda: 1, "mode": "train"},
                {"func_name": "f", "target_module": "m", "func_impl": lambda: 2, "mode": "inference"},
            ]
        }
    )
    assert [str(f.mode) for f in clean_registry.functions_of("m")] == ["train", "inference"]


def test_the_callers_dict_is_never_changed(clean_registry: Registry) -> None:
    def implementation() -> None:
        pass

    config = {
        "layers": {"k": {"layer_impl": Double, "target": [Triple], "mode": "train"}},
        "functions": {"f": {"target_module": "m", "func_impl": implementation}},
    }
    before = copy.deepcopy(config)
    register_kernels(config)
    assert config == before


def test_one_mistake_registers_nothing_of_the_rest(clean_registry: Registry) -> None:
    config = {
        "layers": {"good": {"layer_impl": Double}, "bad": {"layer_impl": Double, "mdoe": "train"}},
        "functions": {"f": {"target_module": "m", "func_impl": len}},
    }
    with pytest.raises(ConfigError, match=r"did you mean.*mode"):
        register_kernels(config)
    assert (clean_registry.layer_kernels, clean_registry.function_kernels) == ((), ())


def test_repo_must_have_load(clean_registry: Registry) -> None:
    with pytest.raises(ConfigError, match="load"):
        register_function_kernel("f", "m", repo=object())  # type: ignore[arg-type]
    assert clean_registry.function_kernels == ()
