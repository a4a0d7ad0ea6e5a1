"""When the weight of a head is copied for its logits, who shares the copy, and when it is freed."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from one_head import OneHead, flat

from twinkle.deferred.head import Head
from twinkle.deferred.weights import Weights
from twinkle.runtime import runtime


@pytest.fixture
def case():
    return OneHead()


def test_outputs_that_are_held_all_at_once_have_few_copies_of_the_weight(case):
    waiting = [case.deferred() for _ in range(6)]
    expected = case.plain().detach()
    kept = {id(logits.node.head.weight) for logits in waiting}
    assert len(kept) == 2
    assert case.linear.weight.data_ptr() not in {logits.node.head.weight.data_ptr() for logits in waiting}
    case.linear.weight.data.add_(1)
    waiting.append(case.deferred())
    for logits in waiting[:-1]:
        assert torch.equal(logits.detach() + 0, expected)
    assert torch.equal(waiting[-1].detach() + 0, case.plain())


@pytest.mark.parametrize(
    "end", [lambda z: z.sum(), lambda z: z.detach().numpy(), lambda z: None], ids=["sum", "numpy", "gone"]
)
def test_a_copy_is_freed_once_the_logits_are_computed_or_gone(case, end):
    logits = case.deferred()
    view = logits[:, 1:]
    head = logits.node.head
    copy = weakref.ref(head.weight)
    assert copy() is not case.linear.weight
    end(logits)
    assert (copy() is None) == (end(logits) is not None)
    del logits
    assert (copy() is None) == (not view.is_deferred)
    del view
    assert copy() is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_alone_keeps_the_copy_until_its_backward_begins(case, reduction):
    logits = case.deferred()
    copy = weakref.ref(logits.node.head.weight)
    loss = F.cross_entropy(logits.flatten(0, 1), case.labels.flatten(), reduction=reduction)
    del logits
    assert copy() is not None
    seen = []
    case.hidden.register_hook(lambda grad: seen.append(copy()))
    loss.sum().backward()
    assert seen == [None]


def test_a_loss_without_gradient_keeps_no_copy(case):
    with torch.no_grad():
        logits = case.deferred()
        copy = weakref.ref(logits.node.head.weight)
        loss = flat(logits, case.labels)
    del logits
    assert copy() is None
    assert not loss.requires_grad


def test_without_memory_for_a_copy_logits_are_computed_at_once(case, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Weights, "copy", fails)
    logits = case.deferred()
    expected = case.plain()
    assert not logits.is_deferred
    case.linear.weight.data.zero_()
    assert torch.equal(logits.detach(), expected)


def test_without_memory_for_either_a_change_is_noticed(case, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Weights, "copy", fails)
    monkeypatch.setattr(Head, "logits", fails)
    logits = case.deferred()
    monkeypatch.undo()
    assert torch.equal(logits[:1].detach() + 0, case.plain()[:1])
    with torch.no_grad():
        case.linear.weight.zero_()
    with pytest.raises(RuntimeError, match="TWINKLE_DISABLE=causal_lm_loss"):
        logits.sum()


def test_copies_are_kept_while_twinkle_begins_anew(case):
    waiting = case.deferred()
    expected = case.plain().detach()
    runtime.reset()
    case.linear.weight.data.zero_()
    assert torch.equal(waiting.detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_weight_is_copied_bit_by_bit(dtype):
    torch.manual_seed(0)
    weight = torch.randn(5001, 1000).to(dtype)
    weight[7, 7] = float("nan")
    copy = Weights(weight, None).copy((False, False, False))
    expected = weight.clone()
    weight.zero_()
    assert torch.equal(copy.weight.view(torch.int16), expected.view(torch.int16))
