"""Whole models with their losses in one recording: logits that are computed when they are read."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from causal_models import causal_model, deferring, tokens_and_labels
from torch import Tensor

from twinkle.deferred.logits import DeferredLogits

from .emulated import put_in

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("every_size")

VOCAB = 64


def models(family: str = "llama", **more: Any) -> tuple[Any, Any, Any]:
    """A deferring model, another in one recording, and its stack."""
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": 128, **more}
    plain, ours = (deferring(causal_model(family, **sizes)) for _ in range(2))
    return plain, ours, put_in([ours], is_trunk=True)


def batch(at: int) -> dict[str, Tensor]:
    given: dict[str, Tensor] = tokens_and_labels(VOCAB)
    return {"input_ids": (given["input_ids"] + at) % VOCAB, "labels": given["labels"]}


def trained(model: Any, use: Any = None, steps: int = 8) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    seen: list[Tensor] = []
    for at in range(steps):
        out = model(**batch(at))
        assert type(out.logits) is DeferredLogits
        loss = out.loss if use is None else use(out, at, seen)
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
        optimizer.zero_grad(set_to_none=at % 2 == 0)
    return seen


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_a_loss(family: str, tied: bool) -> None:
    plain, ours, stack = models(family, tie_word_embeddings=tied)
    for mine, theirs in zip(trained(ours), trained(plain), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert stack.record.replays == 6, stack.record.calls


def scaled(out: Any, at: int, seen: list[Tensor]) -> Any:
    return out.loss * (0.1 + at)


def read(out: Any, at: int, seen: list[Tensor]) -> Any:
    if at % 2:
        seen += [out.logits.detach() + 0, out.logits[:, -1].argmax(-1)]
    return out.loss


def beside(out: Any, at: int, seen: list[Tensor]) -> Any:
    """A loss of logits beside that of the model, whose backward is not what was recorded."""
    return out.loss + out.logits[:, -1].float().square().mean() if at in (4, 6) else out.loss


@pytest.mark.parametrize("use", [scaled, read, beside])
def test_what_is_done_with_loss_and_logits(use: Any) -> None:
    plain, ours, stack = models()
    for mine, theirs in zip(trained(ours, use), trained(plain, use), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert stack.record.replays == 6, stack.record.calls


def test_logits_of_a_step_before_are_those_of_its_weights() -> None:
    plain, ours, stack = models()
    found = []
    for model in (plain, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        kept = []
        for at in range(6):
            out = model(**batch(at))
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.append(out.logits)
        found.append([one.detach() + 0 for one in kept])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert stack.record.replays == 4


def test_a_head_that_is_replaced() -> None:
    plain, ours, stack = models()
    found = []
    for model in (plain, ours):
        seen = trained(model, steps=4)
        torch.manual_seed(7)
        model.set_output_embeddings(torch.nn.Linear(16, VOCAB, bias=False))
        found.append(seen + trained(model))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert stack.record.replays == 2 + 5, stack.record.calls


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("granite", {"logits_scaling": 3.0}),
        ("cohere", {"logit_scale": 0.3}),
    ],
)
def test_logits_that_are_scaled_or_capped(family: str, more: dict[str, Any]) -> None:
    plain, ours, stack = models(family, **more)
    for mine, theirs in zip(trained(ours, read), trained(plain, read), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert stack.record.replays == 6, stack.record.calls


def test_some_of_the_rows_are_left_to_what_is_inside() -> None:
    plain, ours, stack = models()
    for model in (plain, ours):
        model.forward = functools.partial(last_rows, model.forward)
    for _ in range(5):
        assert torch.equal(ours(**batch(0)).logits + 0, plain(**batch(0)).logits + 0)
    assert stack.record.replays == 0
    assert stack.record.calls["its result is logits that are not computed yet"] == 3


def last_rows(forward: Any, **given: Any) -> Any:
    out = forward(**given)
    out.logits = out.logits[:, -2:]
    return out


def test_a_loss_without_gradient() -> None:
    plain, ours, stack = models()
    with torch.no_grad():
        for at in range(5):
            assert torch.equal(ours(**batch(at)).loss, plain(**batch(at)).loss)
            assert torch.equal(ours(**batch(at)).logits + 0, plain(**batch(at)).logits + 0)
    assert stack.record.replays == 8
