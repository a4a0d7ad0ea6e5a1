"""Whoever reads the logits of a model, by whatever road, gets what the plain program gets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from roads import BATCH, FAMILIES, IDS, NEXT, VOCAB, both, deferred_and_plain, gradients, rows
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("every_size")


class Focal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        shares = torch.softmax(logits.float(), -1)
        ctx.save_for_backward(shares, target)
        return -shares[torch.arange(len(target)), target].log().mean()

    @staticmethod
    def backward(ctx, grad):
        shares, target = ctx.saved_tensors
        found = shares.clone()
        found[torch.arange(len(target)), target] -= 1
        return found * grad / len(target), None


class InPlace(torch.autograd.Function):
    """Leaves the gradient in the memory of the logits, as liger's does."""

    @staticmethod
    def forward(ctx, logits, target):
        loss = F.cross_entropy(logits.detach(), target)
        memory = torch.from_numpy(logits.detach().numpy())
        memory.copy_(torch.softmax(memory, -1) - F.one_hot(target, VOCAB))
        ctx.save_for_backward(logits.detach())
        return loss

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad / len(ctx.saved_tensors[0]), None


with pytest.warns(DeprecationWarning, match="jit.script"):

    @torch.jit.script
    def scripted(x, y):
        # type: (torch.Tensor, torch.Tensor) -> torch.Tensor
        return torch.nn.functional.cross_entropy(x.float(), y)


ROADS = {
    "function": lambda o: Focal.apply(rows(o), NEXT),
    "function that writes to the memory": lambda o: InPlace.apply(rows(o), NEXT),
    "script": lambda o: scripted(rows(o), NEXT),
    "reentrant checkpoint": lambda o: checkpoint(Focal.apply, rows(o), NEXT, use_reentrant=True),
    "checkpoint": lambda o: checkpoint(F.cross_entropy, rows(o), NEXT, use_reentrant=False),
    "vmap": lambda o: vmap(lambda z: z.logsumexp(-1).square())(o.logits).mean(),
    "grad of a function": lambda o: (grad(lambda z: z.square().mean())(o.logits) * o.logits).sum(),
    "a loss of one's own": lambda o: F.cross_entropy(rows(o).float(), NEXT, label_smoothing=0.1),
    "nll": lambda o: F.nll_loss(rows(o).log_softmax(-1), NEXT),
    "gather": lambda o: -rows(o).log_softmax(-1).gather(-1, NEXT[:, None]).mean(),
    "entropy": lambda o: torch.distributions.Categorical(logits=rows(o)).entropy().mean(),
    "z-loss": lambda o: rows(o).logsumexp(-1).square().mean(),
    "in place": lambda o: o.logits.mul_(2).add_(1).square().mean(),
    "a view written to": lambda o: (o.logits[..., 3].zero_(), o.logits.square().mean())[1],
    "transposed": lambda o: F.cross_entropy(o.logits.transpose(1, 2)[..., :-1], IDS[:, 1:]),
    "parts": lambda o: sum(part.square().mean() for part in o.logits.split(1, dim=1)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("added", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("road", ROADS)
def test_loss_of_ones_own(road, added, family):
    if added and road in ("in place", "a view written to", "function that writes to the memory"):
        pytest.skip("the plain program changes logits that its loss has seen as well")

    def run(model):
        output = model(**BATCH)
        loss = ROADS[road](output) + (output.loss if added else 0)
        loss.backward()
        return [loss, *gradients(model)]

    both(run, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_with_respect_to_logits_hooks_and_retained_gradient(family):
    def run(model):
        output, seen = model(**BATCH), []
        output.logits.register_hook(seen.append)
        output.logits.retain_grad()
        (found,) = torch.autograd.grad(output.loss, output.logits, retain_graph=True)
        output.loss.backward()
        return [found, *seen, output.logits.grad, *gradients(model)]

    both(run, family)


def test_hook_that_changes_the_gradient():
    def run(model):
        output = model(**BATCH)
        output.logits.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        output.loss.backward()
        return gradients(model)

    both(run)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_second_derivative(family, reduction):
    def run(model):
        parameters = list(model.parameters())
        output = model(**BATCH)
        loss = F.cross_entropy(rows(output), NEXT, reduction=reduction, label_smoothing=0.2).square().mean()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        sum(g.square().sum() for g in first).backward()
        return [*first, *gradients(model)]

    both(run, family)


def test_a_batch_of_gradients():
    def run(model):
        losses = F.cross_entropy(rows(model(**BATCH)), NEXT, reduction="none")
        parameters = [model.lm_head.weight, model.model.norm.weight]
        each = torch.eye(len(NEXT))
        return torch.autograd.grad(losses, parameters, each, is_grads_batched=True)

    both(run)


def test_graph_that_is_kept():
    def run(model):
        loss = model(**BATCH).loss
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        return gradients(model)

    both(run)


# -- the function itself --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cross_entropy", "softmax", "log_softmax"])
def test_a_wrapped_function_is_called_once(name, monkeypatch):
    original, calls = getattr(F, name), []

    def wrapper(*args, **kwargs):
        calls.append(1)
        return 2 * original(*args, **kwargs)

    monkeypatch.setattr(F, name, wrapper)

    def run(model):
        calls.clear()
        output = model(**BATCH)
        of_the_model = len(calls)
        loss = (
            getattr(F, name)(rows(output), *((NEXT,) if name == "cross_entropy" else (-1,))).square().mean()
        )
        assert len(calls) == of_the_model + 1
        (loss + output.loss).backward()
        return [torch.tensor(1.0 + of_the_model), loss, output.loss, *gradients(model)]

    both(run)


@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_a_label_out_of_range_is_an_index_error(wrong):
    labels = BATCH["labels"].clone()
    labels[1, 3] = wrong
    for model in deferred_and_plain():
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            model(input_ids=IDS, labels=labels)
