"""kernelize_model and its way back, on plain modules and on a transformers model."""

from __future__ import annotations

import copy
import gc
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from twinkle.errors import ApplyError, ConfigError, TwinkleWarning
from twinkle.kernel import (
    kernelize_model,
    kernelized,
    register_external_layer,
    register_layer_kernel,
    unkernelize_model,
)
from twinkle.swap.layers import placed

if TYPE_CHECKING:
    from twinkle.registry import Registry

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


class Minus(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight - 1


class OtherNames(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class NeedsMore(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight * self.variance


X = torch.arange(4.0)


def states(registry: Registry) -> list[str]:
    return [binding.state for binding in registry.bindings]


def test_the_same_model_comes_back() -> None:
    register_layer_kernel("k", layer_impl=Plus)
    register_external_layer(Scale, "k")
    model = nn.Sequential(Scale())
    assert kernelize_model(model) is model
    assert torch.equal(model(X), X + 1)


def test_a_nested_and_a_root_module_are_both_layers() -> None:
    register_layer_kernel("k", layer_impl=Plus)
    register_external_layer(Scale, "k")
    root = kernelize_model(Scale())
    assert torch.equal(root(X), X + 1)


def test_two_models_do_not_affect_each_other() -> None:
    register_layer_kernel("k", layer_impl=Plus)
    register_external_layer(Scale, "k")
    first, second = nn.Sequential(Scale()), nn.Sequential(Scale())
    kernelize_model(first)
    assert torch.equal(second(X), X)
    kernelize_model(second)
    unkernelize_model(first)
    assert torch.equal(first(X), X)
    assert torch.equal(second(X), X + 1)


def test_unkernelize_restores_the_very_original() -> None:
    register_layer_kernel("k", layer_impl=Plus)
    register_external_layer(Scale, "k")
    model = nn.Sequential(Scale())
    before = dict(vars(model[0]))
    unkernelize_model(kernelize_model(model))
    assert type(model[0]) is Scale
    assert dict(vars(model[0])) == before


def test_kernelizing_twice_is_kernelizing_once(clean_registry: Registry) -> None:
    register_layer_kernel("k", layer_impl=Plus)
    register_external_layer(Scale, "k")
    model = nn.Sequential(Scale())
    kernelize_model(model)
    once = placed(model[0])
    kernelize_model(model)
    assert placed(model[0]) is once
    assert clean_registry.bindings[0].instances == 1
    unkernelize_model(model)
    assert type(model[0]) is Scale


def test_layers_that_came_since_get_the_kernel_as_well(clean_registry: Registry) -> None:
    register_layer_kernel("k", layer_impl=Plus)
    register_external_layer(Scale, "k")
    model = kernelize_model(nn.Sequential(Scale(), Scale()))
    model.append(Scale())
    kernelize_model(model)
    assert torch.equal(model(X), X + 3)
    assert clean_registry.bindings[0].instances == 3
    unkernelize_model(model)
    assert torch.equal(model(X), X)


def test_a_copy_of_a_model_is_counted_once_it_is_kernelized(clean_registry: Registry) -> None:
    register_layer_kernel("k", layer_impl=Plus)
    register_external_layer(Scale, "k")
    model = kernelize_model(nn.Sequential(Scale(), Scale()))
    twin = kernelize_model(copy.deepcopy(model))
    assert clean_registry.bindings[0].instances == 4
    assert torch.equal(twin(X), X + 2)


def test_the_mode_asked_for_holds_until_train_or_eval() -> None:
    register_layer_kernel("k", layer_impl=Plus, mode="train")
    register_layer_kernel("k", layer_impl=Minus, mode="inference")
    register_external_layer(Scale, "k")
    model = nn.Sequential(Scale())
    assert model.training
    kernelize_model(model, mode="inference")
    assert torch.equal(model(X), X - 1)
    model.train()
    assert torch.equal(model(X), X + 1)
    model.eval()
    assert torch.equal(model(X), X - 1)


def test_training_never_uses_an_inference_kernel() -> None:
    register_layer_kernel("k", layer_impl=Minus, mode="inference")
    register_external_layer(Scale, "k")
    model = kernelize_model(nn.Sequential(Scale()), mode="train")
    assert torch.equal(model(X), X)


def test_without_fallback_a_missing_mode_raises_and_changes_nothing() -> None:
    register_layer_kernel("k", layer_impl=Minus, mode="inference")
    register_external_layer(Scale, "k")
    model = nn.Sequential(Scale())
    with pytest.raises(ApplyError, match="cpu/train"):
        kernelize_model(model, mode="train", use_fallback=False)
    assert type(model[0]) is Scale


class Other(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_without_fallback_the_second_layers_error_leaves_the_first_as_it_was() -> None:
    register_layer_kernel("good", layer_impl=Plus)
    register_external_layer(Scale, "good")
    register_layer_kernel("bad", layer_impl=OtherNames)
    register_external_layer(Other, "bad")
    model = nn.Sequential(Scale(), Other())
    with pytest.raises(ApplyError, match="Other"), pytest.warns():
        kernelize_model(model, use_fallback=False)
    assert [type(module) for module in model] == [Scale, Other]


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [(OtherNames, "hidden"), (NeedsMore, "variance")],
    ids=["argument names", "attribute"],
)
def test_a_kernel_that_does_not_fit_leaves_the_original_and_says_why(
    kernel: type[nn.Module], reason: str, clean_registry: Registry
) -> None:
    register_layer_kernel("k", layer_impl=kernel)
    register_external_layer(Scale, "k")
    model = nn.Sequential(Scale())
    with pytest.warns(TwinkleWarning, match=reason):
        kernelize_model(model)
    assert torch.equal(model(X), X)
    (binding,) = clean_registry.bindings
    assert binding.state == "failed"
    assert reason in binding.reason


def test_an_absent_device_keeps_the_original_and_says_so(clean_registry: Registry) -> None:
    register_layer_kernel("k", layer_impl=Plus, device="npu")
    register_external_layer(Scale, "k")
    model = nn.Sequential(Scale())
    kernelize_model(model, device="npu")
    assert type(model[0]) is Scale
    assert [(b.state, "npu" in b.reason) for b in clean_registry.bindings] == [("skipped", True)]


def test_an_absent_device_without_fallback_raises() -> None:
    register_layer_kernel("k", layer_impl=Plus, device="npu")
    register_external_layer(Scale, "k")
    with pytest.raises(ApplyError, match="npu"):
        kernelize_model(nn.Sequential(Scale()), device="npu", use_fallback=False)


@pytest.mark.parametrize("model", [3, "model", Scale])
def test_what_is_no_model_is_refused(model: object) -> None:
    with pytest.raises(ConfigError, match="not a model"):
        kernelize_model(model)  # type: ignore[type-var]


def test_an_unknown_mode_is_refused_before_anything_changes() -> None:
    with pytest.raises(ConfigError, match="unknown mode"):
        kernelize_model(nn.Sequential(Scale()), mode="fast")


def test_the_context_manager_puts_back_what_was_there() -> None:
    register_layer_kernel("k", layer_impl=Plus, mode="train")
    register_layer_kernel("k", layer_impl=Minus, mode="inference")
    register_external_layer(Scale, "k")
    model = nn.Sequential(Scale()).train()
    with kernelized(model, mode="train") as inside:
        assert torch.equal(inside(X), X + 1)
        with kernelized(model, mode="inference"):
            assert torch.equal(model(X), X - 1)
        assert torch.equal(model(X), X + 1)
    assert type(model[0]) is Scale


def test_the_context_manager_puts_back_also_when_the_block_raises() -> None:
    register_layer_kernel("k", layer_impl=Plus)
    register_external_layer(Scale, "k")
    model = nn.Sequential(Scale())
    block = kernelized(model)
    block.__enter__()
    assert torch.equal(model(X), X + 1)
    assert not block.__exit__(RuntimeError, RuntimeError("mine"), None)
    assert torch.equal(model(X), Scale()(X))


def test_a_class_that_carries_kernel_layer_name_is_a_target() -> None:
    class Decorated(Scale):
        kernel_layer_name = "k"

    register_layer_kernel("k", layer_impl=Plus)
    assert torch.equal(kernelize_model(nn.Sequential(Decorated()))(X), X + 1)


def test_a_string_target_is_bound_by_name() -> None:
    register_layer_kernel("k", layer_impl=Plus)
    register_external_layer(f"{Scale.__module__}:Scale", "k")
    assert torch.equal(kernelize_model(nn.Sequential(Scale()))(X), X + 1)


def test_a_pattern_target_gets_one_record_a_class(clean_registry: Registry) -> None:
    register_layer_kernel("k", layer_impl=Plus)
    register_external_layer(f"{Scale.__module__}:Sc*", "k")
    model = kernelize_model(nn.Sequential(Scale(), Scale()))
    assert [(b.target, b.instances) for b in clean_registry.bindings] == [(f"{Scale.__module__}:Scale", 2)]
    del model
    gc.collect()
    assert [b.instances for b in clean_registry.bindings] == [0]  # who is gone is not counted


def test_a_meta_model_loads_nothing_until_it_has_data(clean_registry: Registry) -> None:
    register_layer_kernel("k", layer_impl="no_such_module_anywhere:Kernel")
    register_external_layer(Scale, "k")
    with torch.device("meta"):
        model = nn.Sequential(Scale())
    kernelize_model(model)
    assert states(clean_registry) == ["pending"]
    model.to_empty(device="cpu")
    with pytest.warns(TwinkleWarning, match="no_such_module_anywhere"):
        model(X)
    assert states(clean_registry) == ["failed"]


def tiny_qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        vocab_size=64,
    )
    return Qwen3ForCausalLM(config)


class SameMLP(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        SameMLP.calls += 1
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    calls = 0


def test_a_transformers_model_runs_the_kernel_and_computes_the_same(clean_registry: Registry) -> None:
    model = tiny_qwen3()
    tokens = torch.arange(12)[None]
    expected = model(tokens, labels=tokens).loss
    register_layer_kernel("mlp", layer_impl=SameMLP, mode="train")
    register_external_layer("transformers.models.qwen3.modeling_qwen3:Qwen3MLP", "mlp")
    kernelize_model(model, mode="train")
    loss = model(tokens, labels=tokens).loss
    assert torch.equal(loss, expected)
    assert [(b.state, b.instances) for b in clean_registry.bindings] == [("active", 2)]


def test_functions_are_applied_after_layers(my_pkg: None) -> None:
    from my_pkg import math_ops

    from twinkle.kernel import register_function_kernel

    register_function_kernel("add", "my_pkg.math_ops", func_impl=lambda x, y: x + y + 1)
    with kernelized(None, mode="train"):
        assert math_ops.add(1, 2) == 4
    assert math_ops.add(1, 2) == 3


CANNOT_BE = {
    "name of no kernel": (Scale, "kk", "bound to 'kk', and no kernel has that name; did you mean 'k'?"),
    "misspelt module": ("torch.nnn:Linear", "k", "there is no module torch.nnn; did you mean 'nn'?"),
    "misspelt package": ("tw_no_such_package.x:Y", "k", "there is no module tw_no_such_package"),
    "misspelt class": ("torch.nn:Linaer", "k", "torch.nn has no Linaer; did you mean"),
}


@pytest.mark.parametrize(("layer", "name", "said"), CANNOT_BE.values(), ids=CANNOT_BE.keys())
def test_what_cannot_be_is_a_warning_or_an_error(
    clean_registry: Registry, layer: type | str, name: str, said: str
) -> None:
    register_layer_kernel("k", layer_impl=Plus)
    register_external_layer(layer, name)
    model = nn.Sequential(Scale())
    with pytest.warns(TwinkleWarning) as caught:
        kernelize_model(model)
    (warning,) = caught
    assert said in str(warning.message)
    assert "test_kernelize.py" in str(warning.message)
    with pytest.raises(ApplyError) as raised:
        kernelize_model(model, use_fallback=False)
    assert said.partition(";")[0] in str(raised.value)
    assert type(model[0]) is Scale


def test_kernel_may_be_registered_behind_its_layer(clean_registry: Registry) -> None:
    register_external_layer(Scale, "k")
    register_layer_kernel("k", layer_impl=Plus)
    kernelize_model(nn.Sequential(Scale()))


def test_report_names_the_layer_that_was_bound_to_no_kernel(clean_registry: Registry) -> None:
    from twinkle import report

    register_external_layer(Scale, "NoSuchKernel")
    (remark,) = [text for text in report.snapshot()["remarks"] if "NoSuchKernel" in text]
    assert "no kernel has that name" in remark
