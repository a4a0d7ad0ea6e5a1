"""Losses in the forward of plain modules, as programs write them: which are found, and what they give."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from rounding import assert_near
from torch import nn

from twinkle.apply.embedded import plan_deferral
from twinkle.deferred.install import install
from twinkle.deferred.logits import DeferredLogits
from twinkle.match.structure import recognise
from twinkle.runtime import runtime

pytestmark = pytest.mark.usefixtures("every_size")

VOCAB, WIDTH = 67, 16
OPERATIONS = 2 * (VOCAB + WIDTH + 24 + 30)


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.lm_head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.criterion = nn.CrossEntropyLoss(ignore_index=-1)
        self.softcap, self.cut = 15, VOCAB

    def trunk(self, idx):
        return self.norm(self.wte(idx))


class NanoGPT(Language):
    def forward(self, idx, targets=None):
        x = self.trunk(idx)
        if targets is not None:
            logits = self.lm_head(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        else:
            logits = self.lm_head(x[:, [-1], :])
            loss = None
        return logits, loss


class NanoChat(Language):
    def forward(self, idx, targets=None, loss_reduction="mean"):
        softcap = 15
        logits = self.lm_head(self.trunk(idx))
        logits = logits[..., : self.cut]
        logits = logits.float()
        logits = softcap * torch.tanh(logits / softcap)
        if targets is not None:
            loss = F.cross_entropy(
                logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1, reduction=loss_reduction
            )
            return logits, loss
        return logits


class Summed(Language):
    def forward(self, input_seq, target_seq):
        logits = self.lm_head(self.trunk(input_seq)).float()
        logits = self.softcap * torch.tanh(logits / self.softcap)
        rows = logits.view(-1, logits.size(-1))
        return logits, F.cross_entropy(
            rows, target_seq.flatten(), ignore_index=-1, reduction="sum" if self.training else "mean"
        )


class Shifted(Language):
    def forward(self, tokens):
        logits = self.lm_head(self.trunk(tokens))
        shift_logits = logits[:, :-1, :].contiguous()
        shift_labels = tokens[:, 1:].contiguous()
        loss = F.cross_entropy(shift_logits.view(-1, VOCAB), shift_labels.view(-1), label_smoothing=0.1)
        return logits, loss


class Criterion(Language):
    def forward(self, idx, y):
        logits = self.lm_head(self.trunk(idx))
        B, T, C = logits.shape
        return logits, self.criterion(logits.view(B * T, C), y.view(B * T))


class Constructed(Language):
    def forward(self, idx, labels=None):
        out = self.lm_head(self.trunk(idx))
        loss = None
        if labels is not None:
            loss = nn.CrossEntropyLoss(ignore_index=-1)(out.reshape(-1, VOCAB), labels.reshape(-1).long())
        return {"logits": out, "loss": loss}


class EachRow(Language):
    def forward(self, idx, targets):
        logits = self.lm_head(self.trunk(idx))
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
        return logits, losses.view_as(targets).pow(2).mean()


class InAMethod(Language):
    def loss(self, logits, targets):
        return F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1), ignore_index=-1)

    def forward(self, idx, targets):
        logits = self.lm_head(self.trunk(idx))
        return logits, self.loss(logits, targets)


class WithZLoss(Language):
    def forward(self, idx, targets):
        logits = self.lm_head(self.trunk(idx))
        loss = F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1), ignore_index=-1)
        return logits, loss + 1e-2 * logits.logsumexp(-1).pow(2).mean()


class WithAccuracy(Language):
    def forward(self, idx, targets):
        logits = self.lm_head(self.trunk(idx))
        loss = F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1), ignore_index=-1)
        return logits, loss, (logits.argmax(-1) == targets).float().mean()


class HeadModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.decoder = nn.Linear(WIDTH, VOCAB)

    def forward(self, x):
        return self.decoder(self.norm(F.gelu(self.dense(x))))


class Masked(Language):
    def __init__(self):
        super().__init__()
        self.lm_head = HeadModule()
        self.lm_head.decoder.weight = self.wte.weight

    def forward(self, idx, labels=None):
        logits = self.lm_head(self.trunk(idx))
        if labels is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1), ignore_index=-1)


class Biased(Language):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.randn(1, VOCAB))

    def forward(self, idx, labels):
        logits = self.lm_head(self.trunk(idx)) + self.shift
        return logits, F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1), ignore_index=-1)


FOUND = (
    *(NanoGPT, NanoChat, Summed, Shifted, Criterion, Constructed, EachRow, InAMethod, WithZLoss),
    *(WithAccuracy, Masked, Biased),
)


def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (2, 12), generator=generator)
    targets = torch.randint(0, VOCAB, (2, 12), generator=generator)
    targets[0, :5] = -1
    return tokens, targets


def given(model):
    tokens, targets = batch()
    return (tokens,) if type(model) is Shifted else (tokens, targets)


def first_of(output):
    output = output.values() if isinstance(output, dict) else output
    return output if isinstance(output, torch.Tensor) else next(iter(output))


def outcome(model, call=None):
    model.zero_grad()
    output = (model if call is None else call)(*given(model))
    logits, loss, *_ = output.values() if isinstance(output, dict) else output
    loss.backward()
    return logits, [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("cls", FOUND)
def test_loss_is_found_and_right(cls):
    model = cls()
    logits, expected = outcome(model)
    assert not isinstance(install(model), str)
    ours, found = outcome(model)
    assert type(ours) is DeferredLogits
    assert ours.is_deferred or cls is WithZLoss
    assert (ours.shape, ours.dtype) == (logits.shape, logits.dtype)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, OPERATIONS)
    assert torch.equal(ours.detach() + 0, logits.detach())


@pytest.mark.parametrize("cls", [NanoGPT, NanoChat, Constructed, Masked])
def test_without_labels_logits_are_plain(cls):
    model = cls()
    tokens, _ = batch()
    before = first_of(model(tokens))
    install(model)
    after = first_of(model(tokens))
    assert type(after) is torch.Tensor
    assert torch.equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("cls", FOUND)
def test_compiled(cls):
    torch._dynamo.reset()
    model = cls()
    _, expected = outcome(model)
    assert not isinstance(install(model), str)
    _, found = outcome(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, OPERATIONS)
    torch._dynamo.reset()


# -- look-alikes ----------------------------------------------------------------------------------


class Weighted(Language):
    def forward(self, idx, targets):
        logits = self.lm_head(self.trunk(idx))
        weight = torch.ones(VOCAB)
        return F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1), weight, ignore_index=-1)


class Transposed(Language):
    def forward(self, idx, targets):
        return F.cross_entropy(self.lm_head(self.trunk(idx)).transpose(1, 2), targets, ignore_index=-1)


class NotOfAHead(Language):
    def forward(self, idx, targets):
        x = self.trunk(idx)
        logits = x @ self.wte.weight.T
        return F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1), ignore_index=-1)


class TwoHeads(Language):
    def forward(self, idx, targets):
        x = self.trunk(idx)
        logits = self.lm_head(x) + self.lm_head(self.wte(idx))
        return F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1), ignore_index=-1)


class OtherLoss(Language):
    def forward(self, idx, targets):
        return F.multi_margin_loss(self.lm_head(self.trunk(idx)).view(-1, VOCAB), targets.view(-1))


class MadeLabels(Language):
    def forward(self, idx):
        logits = self.lm_head(self.trunk(idx)).view(-1, VOCAB)
        return F.cross_entropy(logits, torch.arange(len(logits)))


class Choices(Language):
    def forward(self, idx, targets):
        # As models for multiple choice: a number for each of some choices.
        logits = self.lm_head(self.trunk(idx))
        return F.cross_entropy(logits.view(-1, idx.shape[1]), targets.view(-1)[:VOCAB] % 12)


LOOK_ALIKES = (
    Choices,
    Weighted,
    Transposed,
    NotOfAHead,
    TwoHeads,
    OtherLoss,
    MadeLabels,
)


@pytest.mark.parametrize("cls", LOOK_ALIKES)
def test_look_alike_is_left_alone(cls):
    assert recognise(cls).op is None
    assert isinstance(install(cls()), str)


def test_weights_of_a_criterion_need_the_logits():
    model = Criterion()
    model.criterion = nn.CrossEntropyLoss(weight=torch.ones(VOCAB))
    assert "weights of the classes" in str(install(model))


def test_weights_that_come_later_get_the_logits():
    model = Criterion()
    install(model)
    weight = torch.rand(VOCAB)
    model.criterion.weight = weight
    plain = Criterion()
    plain.criterion.weight = weight
    for one, other in zip(outcome(model)[1], outcome(plain)[1], strict=True):
        assert_near(one, other, OPERATIONS)


def test_part_of_the_vocabulary_is_left_alone():
    model = NanoChat()
    model.cut = VOCAB - 1
    assert "its loss is of 66 of the 67 columns" in str(install(model))


def test_a_vocabulary_that_is_cut_later_is_right():
    model, plain = NanoChat(), NanoChat()
    install(model)
    model.cut = plain.cut = VOCAB - 1
    tokens, targets = batch()
    for one, other in zip(model(tokens, targets % 66), plain(tokens, targets % 66), strict=True):
        assert_near(one.detach() + 0, other.detach(), OPERATIONS)


def test_head_of_a_classifier_is_left_alone():
    model = NanoGPT()
    model.lm_head = nn.Linear(WIDTH, WIDTH)
    assert "a classifier's" in str(install(model))


def test_a_bias_that_trains_gets_its_gradient():
    model = Biased()
    model.shift = nn.Parameter(model._buffers.pop("shift"))
    plain = copy.deepcopy(model)
    install(model)
    for one, other in zip(outcome(model)[1], outcome(plain)[1], strict=True):
        assert_near(one, other, OPERATIONS)


def test_a_bias_changed_after_the_forward_changes_no_logits():
    model = Biased()
    expected = model(*batch())[0].detach().clone()
    install(model)
    logits = model(*batch())[0]
    model.shift.zero_()
    assert logits.is_deferred
    assert torch.equal(logits.detach() + 0, expected)


def test_a_method_that_changes_later_takes_the_head_back(monkeypatch):
    model = InAMethod()
    install(model)
    assert type(model(*batch())[0]) is DeferredLogits
    monkeypatch.setattr(InAMethod, "loss", lambda self, logits, targets: logits.mean())
    logits, loss = model(*batch())
    assert type(logits) is torch.Tensor
    assert torch.equal(loss, logits.mean())


# -- the entry for hooks --------------------------------------------------------------------------


@pytest.mark.usefixtures("clean_registry")
def test_a_plan_is_made_for_any_module():
    runtime.options.kernels = "auto"
    model = NanoGPT()
    assert plan_deferral(model, lambda module: module is model.lm_head) is None
    assert plan_deferral(Transposed(), lambda module: False) is None
    made = plan_deferral(model, lambda module: False)
    assert made is not None
    assert type(model(*batch())[0]) is torch.Tensor
    made.commit()
    assert type(model(*batch())[0]) is DeferredLogits
    made.undo()
    assert type(model(*batch())[0]) is torch.Tensor


def test_a_program_needs_no_configuration(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nsys.path[:0] = {sys.path!r}\n"
        "from tests.deferred.test_plain_losses import NanoGPT, batch\n"
        "model = NanoGPT()\n"
        "for _ in range(2):\n"
        "    logits, loss = model(*batch())\n"
        "    loss.backward()\n"
        "    print(type(logits).__name__)\n"
    )
    command = [sys.executable, "-m", "twinkle", "run", str(program)]
    environment = {**os.environ, "TWINKLE_SIZES": "all"}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.split() == ["DeferredLogits", "DeferredLogits"]


def test_transformers_is_not_imported():
    code = (
        "import sys\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from tests.deferred.test_plain_losses import FOUND, install, outcome\n"
        "for cls in FOUND:\n"
        "    model = cls()\n"
        "    assert not isinstance(install(model), str)\n"
        "    outcome(model)\n"
        "print('transformers' in sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False"]
