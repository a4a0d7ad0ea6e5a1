"""Logits are those of the weights of their forward, by whatever means a program changes these afterwards."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from causal_models import causal_model, deferring, tokens_and_labels
from rounding import rounding_bound
from torch import nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

transformers = pytest.importorskip("transformers")

from twinkle.deferred.logits import DeferredLogits  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_size")

VOCAB = 48
BATCH = tokens_and_labels(VOCAB, tokens=7, ignored=2)
NEXT = BATCH["input_ids"][:, 1:].reshape(-1)
# Products over 8 to 48 terms, there and back.
SAME = 2 * rounding_bound(torch.float32, 2000)


def build(family="llama", **more):
    return causal_model(family, vocab_size=VOCAB, **more)


def rows(output):
    return output.logits[:, :-1].reshape(-1, VOCAB)


@torch.no_grad()
def _minus(model):
    for p in model.parameters():
        p -= 0.5


@torch.no_grad()
def _foreach(model):
    parameters = list(model.parameters())
    torch._foreach_add_(parameters, [torch.ones_like(p) for p in parameters], alpha=-0.5)


def _data(model):
    for p in model.parameters():
        p.data.sub_(0.5)


def _one_number(model):
    model.lm_head.weight.data[5, 3] += 7


def _vector(model):
    vector = parameters_to_vector(model.parameters())
    vector_to_parameters(vector * 2, model.parameters())


def _freed(model):
    for p in model.parameters():
        p.untyped_storage().resize_(0)


def _load(model, **options):
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, **options)


def _step(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    model.zero_grad()


def _average(model):
    """Weights are exchanged with their moving average, and back after an evaluation."""
    average = torch.optim.swa_utils.AveragedModel(copy.deepcopy(model))
    for p in average.parameters():
        p.data.mul_(0.9)
    for p, mean in zip(model.parameters(), average.module.parameters(), strict=True):
        p.data, mean.data = mean.data, p.data


def _averaged_in_place(model):
    for p in model.parameters():
        p.data.lerp_(torch.ones_like(p), 0.1)


def _merge(model):
    """As an adapter is merged into its layer."""
    weight = model.lm_head.weight
    weight.data += torch.ones(VOCAB, 2) @ torch.ones(2, weight.shape[1])


def _swap_tensors(model):
    model.zero_grad()
    other = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.lm_head.weight.data, other.data = other.data, model.lm_head.weight.data


def _numpy(model):
    model.lm_head.weight.detach().view(torch.uint8).numpy()[:] = 0


def _prune(model):
    prune.l1_unstructured(model.lm_head, "weight", 0.5)


CHANGES = {
    "minus": _minus,
    "foreach": _foreach,
    "data": _data,
    "one number": _one_number,
    "vector": _vector,
    "loaded": _load,
    "loaded and assigned": lambda model: _load(model, assign=True),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "optimizer": _step,
    "average": _average,
    "averaged in place": _averaged_in_place,
    "merged": _merge,
    "exchanged": _swap_tensors,
    "numpy": _numpy,
    "initialised": lambda model: model.apply(
        lambda m: nn.init.zeros_(m.weight) if isinstance(m, nn.Linear) else None
    ),
    "copied": lambda model: model.lm_head.weight.data.copy_(torch.zeros(1)),
    "pruned": _prune,
    "another head": lambda model: setattr(model, "lm_head", nn.Linear(16, VOCAB, bias=False)),
}
FREED = {**CHANGES, "freed": _freed}


def _frozen(model):
    model.lm_head.requires_grad_(False)


SETTINGS = {
    "gradient": {},
    "bias": {"family": "phi"},
    "soft cap": {"family": "gemma2", "final_logit_softcapping": 3.0},
    "no gradient": {"mode": torch.no_grad},
    "inference": {"mode": torch.inference_mode},
    "frozen": {"before": _frozen},
    "all frozen": {"before": lambda model: model.requires_grad_(False)},
    "head alone": {"before": lambda model: (model.requires_grad_(False), model.lm_head.requires_grad_())},
    "tied": {"tie_word_embeddings": True},
    "bfloat16": {"before": lambda model: model.bfloat16()},
    "autocast": {"mode": lambda: torch.autocast("cpu", torch.bfloat16)},
}


def prepared(setting, *, deferred):
    given = dict(SETTINGS[setting])
    mode, before = given.pop("mode", contextlib.nullcontext), given.pop("before", lambda model: None)
    model = build(**given)
    before(model)
    return deferring(model) if deferred else model, mode


def outcomes(run, setting):
    """What a run gives, or the kind of error that it raises, with deferred logits and without."""
    found = []
    for deferred in (True, False):
        model, mode = prepared(setting, deferred=deferred)
        try:
            found.append([t.detach() for t in run(model, mode)])
        except (RuntimeError, TypeError) as error:
            found.append([type(error).__name__])
    return found


def compare(run, setting):
    found, expected = outcomes(run, setting)
    assert len(found) == len(expected), (found, expected)
    same = 0.04 if setting in ("bfloat16", "autocast") else SAME
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, str) or isinstance(one, str):
            assert one == other
        else:
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            one, other = one.double(), other.double()
            assert (one - other).norm() <= same * other.norm()


def read(output, views):
    return [output.logits + 0, views + 0, output.logits.argmax(-1), output.logits[0, 1:].float().exp()]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("change", FREED)
def test_logits_read_after_a_change(change, setting):
    plain, mode = prepared(setting, deferred=False)
    with mode():
        output = plain(**BATCH)
        expected = read(output, output.logits[:, 1:].float())
    model, mode = prepared(setting, deferred=True)
    with mode():
        output = model(**BATCH)
        views = output.logits[:, 1:].float()
    assert isinstance(output.logits, DeferredLogits)
    FREED[change](model)
    with mode():
        found = read(output, views)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("change", CHANGES)
def test_loss_of_ones_own_after_a_change(change, setting):
    """The gradient of hidden states is that of the weight as it is in the backward, or an error."""

    def run(model, mode):
        with mode():
            output = model(**BATCH)
        CHANGES[change](model)
        with mode():
            loss = F.cross_entropy(rows(output).float(), NEXT)
        if loss.requires_grad:
            loss.backward()
        return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]

    compare(run, setting)


@pytest.mark.parametrize("setting", ["gradient", "bias", "frozen", "tied"])
@pytest.mark.parametrize("change", FREED)
def test_logits_read_after_a_backward_and_a_change(change, setting):
    plain, mode = prepared(setting, deferred=False)
    with mode():
        expected = plain(**BATCH).logits.detach().clone()
    model, mode = prepared(setting, deferred=True)
    with mode():
        output = model(**BATCH)
    if output.loss.requires_grad:
        output.loss.backward()
    FREED[change](model)
    assert torch.equal(output.logits.detach() + 0, expected)


@pytest.mark.parametrize("change", CHANGES)
def test_outputs_of_many_steps(change):
    if change in ("half", "double", "another head", "pruned", "exchanged"):
        pytest.skip("a change for once")
    batches = [{k: v.roll(n, 1) for k, v in BATCH.items()} for n in range(4)]

    def run(model, mode):
        outputs = []
        for inputs in batches:
            outputs += [model(**inputs), model(**inputs), model(**inputs)]
            CHANGES[change](model)
        return [output.logits for output in outputs]

    compare(run, "gradient")


@pytest.mark.parametrize("change", ["minus", "data"])
def test_accumulated_losses_before_a_change(change):
    def run(model, mode):
        first, second = model(**BATCH), model(**{k: v.flip(0) for k, v in BATCH.items()})
        (first.loss + second.loss).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        CHANGES[change](model)
        return [*gradients, first.logits, second.logits]

    compare(run, "gradient")


@pytest.mark.parametrize("change", ["minus", "foreach", "loaded", "optimizer"])
def test_backward_of_the_loss_after_a_change_in_place_is_the_same_error(change):
    def run(model, mode):
        loss = model(**BATCH).loss
        CHANGES[change](model)
        loss.backward()
        return []

    found, expected = outcomes(run, "gradient")
    assert found == expected == ["RuntimeError"]


def test_hidden_states_that_are_written_to():
    def run(model, mode):
        output = model(**BATCH, output_hidden_states=True)
        with torch.no_grad():
            output.hidden_states[-1].zero_()
        return [output.logits, output.logits[:, 2:4].float()]

    compare(run, "gradient")


def test_weights_that_change_in_the_backward():
    """LOMO updates a weight as soon as it has its gradient."""

    def run(model, mode):
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: p.data.sub_(0.5 * p.grad))
        output = model(**BATCH)
        output.loss.backward()
        return [output.logits, *model.parameters()]

    compare(run, "gradient")


def test_gradient_that_a_hook_has_taken_and_a_second_derivative_after_a_change():
    def run(model, mode):
        output, seen = model(**BATCH), []
        output.logits.register_hook(seen.append)
        output.loss.backward()
        del output
        _data(model)
        return [seen[0] + 0]

    compare(run, "gradient")


def test_second_derivative_of_a_loss_whose_output_is_gone():
    def run(model, mode):
        loss = model(**BATCH).loss
        model.lm_head.weight.data.mul_(2)
        (found,) = torch.autograd.grad(loss, model.lm_head.weight, create_graph=True)
        (second,) = torch.autograd.grad(found.square().sum(), model.model.norm.weight)
        return [found, second]

    compare(run, "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_logits_of_a_compiled_model_read_after_a_change(change):
    torch._dynamo.reset()
    expected = build()(**BATCH).logits.detach()
    model = deferring(build())
    output = torch.compile(model, backend="eager")(**BATCH)
    views = output.logits[:, 1:]
    assert isinstance(views, DeferredLogits)
    CHANGES[change](model)
    assert torch.equal(output.logits.detach() + 0, expected)
    assert torch.equal(views.detach() + 0, expected[:, 1:])
