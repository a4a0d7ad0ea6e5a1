"""Single methods of the forward that defers, without an installed model."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from twinkle.deferred import forward as module
from twinkle.deferred.forward import DeferringForward
from twinkle.deferred.head import LabelMemory
from twinkle.deferred.logits import DeferredLogits
from twinkle.ops.plain import at_every_size


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(4, 32, bias=False)

    def forward(self, hidden, labels=None, fail=False):
        if fail:
            raise RuntimeError("asked to")
        heads = [head for head, _, _ in module.deferring_heads()]
        return (module.defer(self.lm_head, hidden) if self.lm_head in heads else self.lm_head(hidden),)


LABELS = torch.zeros(1, 3, dtype=torch.long)
HIDDEN = torch.randn(1, 3, 4)


@pytest.fixture
def model():
    with at_every_size():
        yield Model()


def deferring(model, path="lm_head", **labels):
    given = labels or {"labels": 1}
    return DeferringForward(
        Model.forward, path, given, recognised=True, softcapped=False, owner=weakref.ref(model)
    )


def test_labels_are_taken_by_name_and_by_position(model):
    ours = deferring(model)
    assert ours.head_and_labels(model, (HIDDEN, LABELS), {}) == (model.lm_head, LABELS)
    assert ours.head_and_labels(model, (HIDDEN,), {"labels": LABELS}) == (model.lm_head, LABELS)


def test_there_is_no_head_without_labels_or_where_it_cannot_defer(model):
    ours = deferring(model)
    assert ours.head_and_labels(model, (HIDDEN,), {}) == (None, None)
    assert deferring(model, "elsewhere").head_and_labels(model, (HIDDEN, LABELS), {}) == (None, None)
    model.lm_head.register_forward_hook(lambda *_: None)
    assert ours.head_and_labels(model, (HIDDEN, LABELS), {}) == (None, None)


def test_a_head_defers_inside_the_forward_alone(model):
    forward = deferring(model).layer_class().forward
    assert isinstance(forward(model, HIDDEN, LABELS)[0], DeferredLogits)
    assert not isinstance(forward(model, HIDDEN)[0], DeferredLogits)
    assert module.deferring_heads() == []


def test_a_forward_that_raises_leaves_no_head_deferring(model):
    forward = deferring(model).layer_class().forward
    with pytest.raises(RuntimeError, match="asked to"):
        forward(model, HIDDEN, LABELS, fail=True)
    assert module.deferring_heads() == []


def test_a_model_that_is_gone_is_not_verified():
    model = Model()
    ours = deferring(model)
    assert ours.verified_ahead()
    del model
    assert not ours.verified_ahead()


def test_only_targets_that_are_some_of_the_labels_are_among_those_counted():
    labels = torch.arange(24).view(2, 12)
    memory = LabelMemory.of(labels)
    assert memory.holds(labels.view(-1))
    assert memory.holds(labels[1])
    assert not memory.holds(labels.clone())
    assert not memory.holds(labels[:, 1:])  # dense, by a copy, in any forward that flattens them
    shifted = torch.arange(25)
    assert not LabelMemory.of(shifted[:-1]).holds(shifted[1:])
    labels[0, 0] = 3
    assert not memory.holds(labels.view(-1))
