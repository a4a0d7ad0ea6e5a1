"""What is gone from a program is gone from Twinkle: models of hooks that failed, and generated texts."""

from __future__ import annotations

import gc
import linecache
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from twinkle.codegen import compile_source
from twinkle.errors import TwinkleWarning
from twinkle.hooks import guard
from twinkle.hooks.construction import watch_class
from twinkle.kernel import kernelize_model, register_external_layer, register_layer_kernel

pytestmark = pytest.mark.filterwarnings("ignore::twinkle.errors.TwinkleWarning")


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.weight


class Kernel(nn.Module):
    def forward(self, x):
        return x * self.weight


def texts() -> int:
    gc.collect()
    return sum(name.startswith("<twinkle ") for name in linecache.cache)


def test_models_of_a_hook_that_raises_are_let_go(clean_hooks: Any, clean_registry: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()

    def broken(model: nn.Module) -> None:
        held = model  # a local of the frame that the exception refers to
        try:
            raise KeyError("the first")
        except KeyError:
            raise RuntimeError(f"cannot be applied to {type(held).__name__}") from None

    before = len(guard.failures())
    watch_class(Model, broken)
    with pytest.warns(TwinkleWarning, match="cannot be applied to Model"):
        models = [weakref.ref(Model()) for _ in range(5)]
    gc.collect()
    assert [model() for model in models] == [None] * 5
    assert len(guard.failures()) == before + 1


@pytest.mark.parametrize("mode", [None, "train"])
def test_texts_go_with_their_models(mode: str | None, clean_registry: Any) -> None:
    register_layer_kernel("Scale", layer_impl=Kernel)
    register_external_layer(Scale, "Scale")

    def build() -> None:
        model = kernelize_model(nn.Sequential(Scale(), Scale()), mode=mode)
        model(torch.ones(4)).sum().backward()

    for _ in range(3):
        build()
    before = texts()
    for _ in range(10):
        build()
    assert texts() <= before + 1


def test_a_text_is_there_as_long_as_one_of_its_functions() -> None:
    before = texts()
    scope: dict[str, Any] = {}
    compile_source("def f():\n    return 1\n\ndef g():\n    return 2\n", "test of texts", scope)
    assert texts() == before + 1
    del scope["f"]
    assert texts() == before + 1
    assert linecache.getline(scope["g"].__code__.co_filename, 5) == "    return 2\n"
    code = scope["g"].__code__
    scope.clear()
    assert texts() == before + 1
    del code
    assert texts() == before
