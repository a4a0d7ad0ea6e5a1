"""Deferred logits under torch.compile: the graph has the loss as one operator, and no logits."""

from __future__ import annotations

import pytest
import torch
from causal_models import causal_model, deferring, tokens_and_labels
from rounding import assert_near as near
from rounding import rounding_bound, terms
from torch._dynamo.backends.common import aot_autograd

transformers = pytest.importorskip("transformers")

from twinkle.deferred.logits import DeferredLogits  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_size")

VOCAB = 501
TOKENS = 40
OPERATIONS = 400 + 2 * terms(VOCAB)
"""Behind a number of a model and its gradients: ten products over 8 to 40 terms, there and back."""


def build(family="llama", **more):
    return causal_model(family, vocab_size=VOCAB, **more)


def batch():
    return tokens_and_labels(VOCAB, 1, TOKENS, ignored=0)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_close(found, expected):
    off = ((found - expected).norm() / expected.norm()).item()
    assert off < 2 * rounding_bound(torch.float32, OPERATIONS)


class Graphs:
    """A backend that keeps what it is given, forward and backward."""

    def __init__(self):
        self.graphs = []
        self.backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, graph, _):
        self.graphs.append(graph)
        return graph.forward

    def largest(self):
        """The most elements of anything computed in them."""
        sizes = [0]
        for graph in self.graphs:
            for node in graph.graph.nodes:
                value = node.meta.get("val")
                if node.op == "call_function" and isinstance(value, torch.Tensor):
                    sizes.append(int(value.numel()))
        return max(sizes)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_model_computes_no_logits():
    model, inputs = build(), batch()
    expected = model(**inputs)
    wanted = gradients(model, expected.loss)
    kept = Graphs()
    compiled = torch.compile(deferring(model), fullgraph=True, backend=kept.backend)
    output = compiled(**inputs)
    assert type(output.logits) is DeferredLogits
    assert output.logits.is_deferred
    assert_close(output.loss.detach(), expected.loss.detach())
    assert_close(gradients(model, output.loss), wanted)
    assert kept.largest() < TOKENS * VOCAB
    assert len(kept.graphs) == 2
    compiled(**inputs)
    assert len(kept.graphs) == 2


@pytest.mark.slow
def test_logits_of_a_compiled_model_have_values_and_gradients():
    model, inputs = build("gemma2", final_logit_softcapping=3.0), batch()
    expected = model(**inputs).logits
    wanted = gradients(model, expected.pow(2).sum())
    compiled = torch.compile(deferring(model), fullgraph=True, backend="aot_eager")
    output = compiled(**inputs)
    assert type(output.logits) is DeferredLogits
    assert torch.equal(output.logits.argmax(-1), expected.argmax(-1))
    assert_close(output.logits.detach(), expected.detach())
    assert_close(gradients(model, output.logits.pow(2).sum()), wanted)


@pytest.mark.slow
def test_model_inside_a_compiled_step_computes_logits_only_if_they_are_used():
    model, inputs = build(), batch()
    expected = model(**inputs)
    wanted = gradients(model, expected.loss)
    deferring(model)
    kept = Graphs()
    loss = torch.compile(lambda **given: model(**given).loss, fullgraph=True, backend=kept.backend)(**inputs)
    assert_close(gradients(model, loss), wanted)
    assert kept.largest() < TOKENS * VOCAB
    output = torch.compile(lambda **given: model(**given), fullgraph=True, backend="aot_eager")(**inputs)
    assert type(output.logits) is torch.Tensor
    assert_close(output.logits.detach(), expected.logits.detach())
    assert_close(gradients(model, output.logits.sum()), gradients(model, model(**inputs).logits.sum()))


@pytest.mark.slow
def test_compiled_model_without_labels_gives_plain_logits():
    model, inputs = deferring(build()), batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**inputs)
    found = compiled(input_ids=inputs["input_ids"])
    assert type(found.logits) is torch.Tensor
    assert_close(found.logits.detach(), model(input_ids=inputs["input_ids"]).logits.detach())


@pytest.mark.slow
def test_forward_with_a_graph_break_defers():
    model, inputs = build(), batch()
    wanted = gradients(model, model(**inputs).loss)
    norm = type(model.model.norm).forward
    model.model.norm.forward = lambda x: (torch._dynamo.graph_break(), norm(model.model.norm, x))[1]
    compiled = torch.compile(deferring(model), backend="aot_eager")
    output = compiled(**inputs)
    assert type(output.logits) is DeferredLogits
    assert_close(gradients(model, output.loss), wanted)


@pytest.mark.slow
def test_autocast_and_a_tuple_in_a_compiled_model():
    model, inputs = build(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**inputs, return_dict=False)
        compiled = torch.compile(deferring(model), fullgraph=True, backend="aot_eager")
        found = compiled(**inputs, return_dict=False)
    assert type(found[1]) is DeferredLogits
    assert found[1].dtype == torch.bfloat16
    near(found[0], expected[0], 8, dtype=torch.bfloat16)
    near(found[1] + 0, expected[1], 8, dtype=torch.bfloat16)
