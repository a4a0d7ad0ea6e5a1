"""``kernelize_model(model, only=…)``: the layers of a model that get kernels, and those that stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from twinkle.errors import ApplyError, ConfigError, TwinkleWarning
from twinkle.kernel import (
    kernelize_model,
    kernelized,
    register_external_layer,
    register_kernels,
    register_layer_kernel,
)

pytestmark = pytest.mark.usefixtures("clean_registry")


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Plus(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Scale()
        self.layers = nn.ModuleList([Scale() for _ in range(3)])

    def chosen(self) -> str:
        x = torch.zeros(4)
        return "".join(str(int(layer(x)[0].item())) for layer in (self.first, *self.layers))


def register() -> None:
    register_layer_kernel("Plus", layer_impl=Plus)
    register_external_layer(Scale, "Plus")


CHOICES = [
    ("layers", "0111"),
    ("!first", "0111"),
    ("first", "1000"),
    (["layers.*", "!layers.[-1]"], "0110"),
    (("first", "Model:layers.0"), "1100"),
    (lambda name, module: name == "layers.1" and isinstance(module, Scale), "0010"),
]


@pytest.mark.parametrize(("only", "expected"), CHOICES)
def test_only_what_is_meant_gets_a_kernel(only, expected):
    register()
    model = Model()
    assert kernelize_model(model, only=only) is model
    assert model.chosen() == expected


def test_calls_add_up_and_a_block_takes_back_its_own():
    register()
    model = kernelize_model(Model(), only="first")
    with kernelized(model, only="layers.0"):
        assert model.chosen() == "1100"
    assert model.chosen() == "1000"


def test_a_part_of_a_model_is_named_from_itself():
    register()
    model = Model()
    kernelize_model(model.layers, only="[0]")
    assert model.chosen() == "0100"


def test_what_means_no_layer_is_a_warning_or_an_error():
    register()
    model = Model()
    with pytest.warns(TwinkleWarning, match=r"\"layer.0\" means none of 4 layers.*layers\.\*"):
        kernelize_model(model, only="layer.0")
    with pytest.raises(ApplyError, match="means none of 4 layers") as caught:
        kernelize_model(model, only=["first", "!layer.0"], use_fallback=False)
    assert __file__ in str(caught.value)
    with pytest.raises(ApplyError, match="only means none"):
        kernelize_model(model, only=lambda name, module: False, use_fallback=False)
    assert model.chosen() == "0000"


@pytest.mark.parametrize("only", [3, Scale, [], "a..b", ["first", 1]])
def test_what_is_no_choice_is_an_error(only):
    register()
    with pytest.raises(ConfigError):
        kernelize_model(Model(), only=only)


def test_both_the_call_and_the_registration_have_to_mean_a_layer():
    register_layer_kernel("Plus", layer_impl=Plus)
    register_external_layer(Scale, "Plus", where="!first")
    model = kernelize_model(Model(), only=["first", "layers.0"])
    assert model.chosen() == "0100"


def test_a_dict_registers_for_places():
    register_kernels({"layers": {"Plus": {"target": Scale, "layer_impl": Plus, "where": ["layers.[1:]"]}}})
    assert kernelize_model(Model()).chosen() == "0011"


def test_a_place_of_a_registration_is_checked_at_the_call():
    with pytest.raises(ConfigError) as caught:
        register_external_layer(Scale, "Plus", where="a, b")
    assert __file__ in str(caught.value)
