"""Models that nobody saw constructed have no kernels, and the report says so."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from twinkle.apply.activation import Activation, watch_new
from twinkle.kernel import unkernelize_model
from twinkle.report import snapshot
from twinkle.runtime import runtime

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model(clean_registry: Any) -> Any:
    runtime.options.kernels = "auto"
    runtime.of(Activation).active = True
    watch_new()
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def without_kernels() -> list[str]:
    remarks: Any = snapshot()["remarks"]
    return [text for text in remarks if "without kernels" in text]


def test_a_model_from_a_file_of_a_plain_process_is_named(model: Any) -> None:
    file = io.BytesIO()
    unkernelize_model(model)
    torch.save(model, file)
    file.seek(0)
    del model
    loaded = torch.load(file, weights_only=False)
    (text,) = without_kernels()
    assert text.startswith("1 transformers.models.gpt2.modeling_gpt2:GPT2LMHeadModel without kernels")
    del loaded
    assert without_kernels() == []


def test_constructed_models_and_their_copies_are_not(model: Any) -> None:
    twin = copy.deepcopy(model)
    assert without_kernels() == []
    del twin


def test_a_constructed_model_whose_kernels_were_taken_out_is_not(model: Any) -> None:
    unkernelize_model(model)
    assert without_kernels() == []
