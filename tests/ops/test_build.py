"""Layers and functions written for the names of any class."""

from __future__ import annotations

import math

import pytest
import torch

from twinkle.ops.build import forward_class, plain_function


def clamp(x: torch.Tensor, limit: float) -> torch.Tensor:
    return x.clamp(max=limit)


@pytest.mark.parametrize("limit", [0.5, math.inf])
def test_a_number_of_a_layer_may_be_infinite(limit: float) -> None:
    layer = forward_class("Clamp", clamp, {"x": "hidden", "limit": limit}, inputs=("x",))()
    assert torch.equal(layer(torch.ones(2)), torch.full((2,), min(1.0, limit)))


def test_a_number_of_a_function_may_be_infinite() -> None:
    def original(hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    made = plain_function(original, clamp, {"x": "hidden", "limit": math.inf})
    assert torch.equal(made(torch.ones(2)), torch.ones(2))
