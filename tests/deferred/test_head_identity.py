"""The head of a model that defers is a plain ``nn.Linear`` for everyone who looks between two calls."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch
from causal_models import causal_model, deferring
from torch import nn

transformers = pytest.importorskip("transformers")

from twinkle.deferred.install import install, uninstall  # noqa: E402
from twinkle.deferred.logits import DeferredLogits  # noqa: E402
from twinkle.match.structure import recognise  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_size")

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def model():
    return deferring(causal_model(vocab_size=64))


def deferred(model):
    return type(model(input_ids=IDS, labels=IDS).logits) is DeferredLogits


def test_the_class_of_the_head_is_linear_before_and_after_a_call(model):
    state = dict(vars(model.lm_head))
    assert type(model.lm_head) is nn.Linear
    assert deferred(model)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.__class__ is nn.Linear
    assert vars(model.lm_head) == state


def test_tables_by_exact_type_find_the_head(model):
    @functools.singledispatch
    def kind(module):
        return "other"

    kind.register(nn.Linear, lambda module: "linear")
    deferred(model)
    assert kind(model.lm_head) == {nn.Linear: "linear"}[type(model.lm_head)]


def test_dynamic_quantisation_takes_the_head(model):
    deferred(model)
    quantised = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(quantised.lm_head).__module__
    with torch.no_grad():
        assert type(quantised(input_ids=IDS, labels=IDS).logits) is torch.Tensor
    assert deferred(model)


def test_the_head_is_linear_again_after_an_error(model):
    with pytest.raises(IndexError):
        model(input_ids=IDS + 1000, labels=IDS)
    assert type(model.lm_head) is nn.Linear
    assert deferred(model)


def test_the_head_has_the_name_of_its_class_while_it_defers(model):
    seen = []
    model.model.register_forward_hook(
        lambda *_: seen.append((repr(model), isinstance(model.lm_head, nn.Linear)))
    )
    before = repr(model)
    assert deferred(model)
    assert seen == [(before, True)]


def test_a_copy_made_inside_a_forward_defers_by_itself_alone(model):
    twins = []
    hook = model.model.register_forward_hook(lambda *_: twins.append(copy.deepcopy(model.lm_head)))
    assert deferred(model)
    hook.remove()
    hidden = torch.randn(3, 16)
    assert type(twins[0](hidden)) is torch.Tensor
    assert torch.equal(twins[0](hidden), model.lm_head(hidden))


def test_another_thread_gets_logits_from_a_head_that_defers_in_this_one(model):
    hidden, seen = torch.randn(3, 16), []

    def look(*_):
        thread = threading.Thread(target=lambda: seen.append(model.lm_head(hidden)))
        thread.start()
        thread.join()

    hook = model.model.register_forward_hook(look)
    assert deferred(model)
    hook.remove()
    assert type(seen[0]) is torch.Tensor
    assert torch.equal(seen[0], model.lm_head(hidden))


def test_a_head_shared_by_two_forwards_defers_until_the_last_one_ends(model):
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.model = copy.deepcopy(model.model)
    results = []
    hook = model.model.register_forward_hook(lambda *_: results.append(deferred(other)))
    assert deferred(model)
    hook.remove()
    assert results == [True]
    assert type(model.lm_head) is nn.Linear


@pytest.mark.slow
def test_a_compiled_model_with_and_without_labels(model):
    torch._dynamo.reset()
    plain, graphs = copy.deepcopy(model), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        output = compiled(input_ids=IDS, labels=IDS)
        assert type(output.logits) is DeferredLogits
        logits = compiled(input_ids=IDS).logits
        assert type(logits) is torch.Tensor
    assert len(graphs) == 2
    torch.testing.assert_close(output.loss, plain(input_ids=IDS, labels=IDS).loss)
    torch.testing.assert_close(logits, plain(input_ids=IDS).logits)
    assert type(model.lm_head) is nn.Linear
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_step_leaves_the_head_alone(model):
    torch._dynamo.reset()
    state = dict(vars(model.lm_head))
    step = torch.compile(lambda: model(input_ids=IDS, labels=IDS).loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(step(), model(input_ids=IDS, labels=IDS).loss)
    step()
    assert type(model.lm_head) is nn.Linear
    assert vars(model.lm_head) == state
    torch._dynamo.reset()


def test_uninstalling_touches_no_head(model):
    installed = install(transformers.LlamaForCausalLM(model.config), recognise(transformers.LlamaForCausalLM))
    head = installed.model.lm_head
    uninstall(installed)
    assert installed.model.lm_head is head
    assert not deferred(installed.model)
