"""Losses that a forward computes itself: encoder-decoders, speech, masked models, heads with a forward."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from causal_models import deferring
from loss_models import FAMILIES, VOCAB, loss_model
from memory import peak_bytes
from rounding import rounding_bound

transformers = pytest.importorskip("transformers")

from twinkle.deferred import forward  # noqa: E402
from twinkle.deferred.logits import DeferredLogits  # noqa: E402
from twinkle.ops.causal_lm_loss import chunks, op  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_size")

FEW = rounding_bound(torch.float32, 4)


def step(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return output, output.loss.detach().double(), torch.cat(gradients)


def logits_of(output):
    return output.prediction_logits if "prediction_logits" in output else output.logits


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def doubled(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_the_same_loss_and_gradients(family):
    model, inputs = loss_model(family)
    exact = step(copy.deepcopy(model).double(), doubled(inputs))[1:]
    before, *plain = step(model, inputs)
    logits = logits_of(before).detach().clone()

    output, *ours = step(deferring(model), inputs)
    found_logits = logits_of(output)
    assert type(found_logits) is DeferredLogits
    assert found_logits.is_deferred
    assert found_logits.shape == logits.shape
    assert found_logits.grad_fn is not None
    for found, other, right in zip(ours, plain, exact, strict=True):
        # One number may be right by luck.
        assert distance(found, right) <= 2 * distance(other, right) + FEW
    assert torch.equal(found_logits.detach() + 0, logits)
    del inputs["labels"]
    if FAMILIES[family][2] not in ("masked", "two", "inner"):
        inputs["decoder_input_ids"] = torch.full((2, 3), 5)
    inputs.pop("next_sentence_label", None)
    assert type(logits_of(model(**inputs))) is torch.Tensor


# -- other uses of the logits ---------------------------------------------------------------------


def distillation(output, inputs):
    teacher = torch.linspace(-1, 1, VOCAB).expand_as(output.logits)
    kl = F.kl_div(
        F.log_softmax(output.logits / 2, -1),
        F.log_softmax(teacher, -1),
        log_target=True,
        reduction="batchmean",
    )
    return output.loss + kl


def preference(output, inputs):
    labels = inputs["labels"].clamp(min=0)
    chosen = output.logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    first, second = chosen.sum(-1)
    return -F.logsigmoid(0.1 * (first - second))


def z_loss(output, inputs):
    return output.loss + 1e-3 * output.logits.logsumexp(-1).square().mean()


def weighted(output, inputs):
    rows, labels = output.logits.reshape(-1, VOCAB), inputs["labels"].reshape(-1)
    return F.cross_entropy(rows, labels, torch.linspace(0.5, 1, VOCAB).to(rows.dtype))


def smoothed(output, inputs):
    rows, labels = output.logits.reshape(-1, VOCAB), inputs["labels"].reshape(-1)
    return F.cross_entropy(rows, labels, label_smoothing=0.1, reduction="sum") / len(rows)


def other_labels(output, inputs):
    # More of them count than of those that the model was given.
    labels = torch.arange(inputs["labels"].numel()) % VOCAB
    return output.loss + F.cross_entropy(output.logits.reshape(-1, VOCAB), labels)


USES = (distillation, preference, z_loss, weighted, smoothed, other_labels)


@pytest.mark.parametrize("family", ["t5", "bart", "bert", "llama4"])
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_other_losses_on_the_logits_stay_right(family, use):
    model, inputs = loss_model(family)

    def run(model, inputs):
        model.zero_grad()
        loss = use(model(**inputs), inputs)
        loss.backward()
        gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
        return loss.detach().double(), torch.cat(gradients)

    exact = run(copy.deepcopy(model).double(), inputs)
    plain = run(model, inputs)
    ours = run(deferring(model), inputs)
    for found, other, right in zip(ours, plain, exact, strict=True):
        assert distance(found, right) <= 2 * distance(other, right) + FEW


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_generate_is_the_same(family):
    model, inputs = loss_model(family)
    del inputs["labels"]
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.eval().generate(**inputs, **options)
    assert torch.equal(deferring(model).generate(**inputs, **options), expected)


def test_metrics_of_the_logits():
    model, inputs = loss_model("bert")
    with torch.no_grad():
        expected = model(**inputs).logits
        logits = deferring(model)(**inputs).logits
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert logits.is_deferred
    assert (logits.numpy() == expected.numpy()).all()


# -- rows that do not count -----------------------------------------------------------------------


def test_only_rows_that_count_reach_the_head(monkeypatch):
    model, inputs = loss_model("bert")
    counted = int((inputs["labels"] != -100).sum())
    rows = []
    in_chunks = op.in_chunks
    monkeypatch.setattr(op, "in_chunks", lambda *a: (rows.append(len(a[0])), in_chunks(*a))[1])
    deferring(model)
    model(**inputs)  # compares
    rows.clear()
    model(**inputs).loss.backward()
    assert rows == [counted]
    assert counted < inputs["labels"].numel() / 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["bert", "t5", "bart"])
def test_gpu_counts_labels_ahead(family, monkeypatch):
    monkeypatch.setattr(forward, "LEAST_COUNTED", 0)
    model, inputs = loss_model(family)
    model, inputs = model.cuda(), {k: v.cuda() for k, v in inputs.items()}
    _, *plain = step(model, inputs)
    output, *ours = step(deferring(model), inputs)
    counted = int((inputs["labels"] != -100).sum())
    assert output.logits.node.head.counted.bound(inputs["labels"], -100) == counted
    for found, other in zip(ours, plain, strict=True):
        assert distance(found, other) < rounding_bound(torch.float32, 400)
    # Of other labels, more of which count.
    loss = F.cross_entropy(output.logits.view(-1, VOCAB), inputs["labels"].clamp(min=0).view(-1))
    assert not loss.isnan()


@pytest.mark.parametrize("family", ["t5", "bart", "bert"])
def test_a_step_never_holds_the_logits(monkeypatch, family):
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows, *_, **__: min(rows, 16))
    vocab = 20000
    model, inputs = loss_model(family, vocab, tokens=62)
    ours = deferring(copy.deepcopy(model))
    step(ours, inputs)
    ours.zero_grad()
    logits = 4 * vocab * inputs["labels"].numel()
    assert peak_bytes(lambda: ours(**inputs).loss.backward()) < 1.5 * logits
    assert peak_bytes(lambda: model(**inputs).loss.backward()) > 2.5 * logits
