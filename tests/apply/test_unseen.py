"""Models that nobody saw constructed have no kernels, and the report says so."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from twinkle.apply.activation import Activation, watch_new
from twinkle.apply.unseen import Constructed
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


def made(state: dict[str, Any]) -> Any:
    model = StateOfItsOwn.__new__(StateOfItsOwn)
    model.__dict__.update(state)
    return model


class StateOfItsOwn(transformers.GPT2LMHeadModel):
    """Is made past its constructor and every ``__setstate__``, which nobody sees."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return made, (self.__dict__,)


class SetsItsState(transformers.GPT2LMHeadModel):
    """Takes its state past torch's own function."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def loaded_again(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_model_from_a_file_is_served(model: Any) -> None:
    unkernelize_model(model)
    loaded = loaded_again(model)
    assert without_kernels() == []
    assert loaded.config.n_embd == 16


def test_a_model_that_sets_its_state_itself_is_served(model: Any) -> None:
    other = unkernelize_model(SetsItsState(model.config))
    loaded = loaded_again(other)
    assert without_kernels() == []
    assert loaded in runtime.of(Constructed)


def test_a_model_that_takes_its_state_unseen_is_named(model: Any) -> None:
    other = unkernelize_model(StateOfItsOwn(model.config))
    loaded = loaded_again(other)
    (text,) = without_kernels()
    assert text.startswith(f"1 {__name__}:StateOfItsOwn without kernels")
    del loaded
    assert without_kernels() == []


def test_constructed_models_and_their_copies_are_not(model: Any) -> None:
    twin = copy.deepcopy(model)
    assert without_kernels() == []
    del twin


def test_a_constructed_model_whose_kernels_were_taken_out_is_not(model: Any) -> None:
    unkernelize_model(model)
    assert without_kernels() == []
