"""Losses that a forward computes itself: encoder-decoders, speech, masked models, heads with a forward."""

from __future__ import annotations

import copy

import pytest
import torch
from causal_models import deferring
from loss_models import FAMILIES, loss_model
from rounding import rounding_bound

transformers = pytest.importorskip("transformers")

from twinkle.deferred.logits import DeferredLogits  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_size")

FEW = rounding_bound(torch.float32, 4)


def step(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return output, output.loss.detach().double(), torch.cat(gradients)


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def doubled(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_the_same_loss_and_gradients(family):
    model, inputs = loss_model(family)
    exact = step(copy.deepcopy(model).double(), doubled(inputs))[1:]
    before, *plain = step(model, inputs)
    logits = before.logits.detach().clone()

    output, *ours = step(deferring(model), inputs)
    assert type(output.logits) is DeferredLogits
    assert output.logits.is_deferred
    assert output.logits.shape == logits.shape
    assert output.logits.grad_fn is not None
    for found, other, right in zip(ours, plain, exact, strict=True):
        # One number may be right by luck.
        assert distance(found, right) <= 2 * distance(other, right) + FEW
    assert torch.equal(output.logits.detach() + 0, logits)
    del inputs["labels"]
    if FAMILIES[family][2] != "masked":
        inputs["decoder_input_ids"] = torch.full((2, 3), 5)
    assert type(model(**inputs).logits) is torch.Tensor
