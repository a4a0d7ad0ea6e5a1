"""Compiled functions of the program that are given deferred logits are given plain ones."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from one_head import OPERATIONS, VOCAB, OneHead
from rounding import assert_near
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from twinkle.deferred.compiled import tell_dynamo
from twinkle.deferred.logits import DeferredLogits
from twinkle.hooks import imports

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh():
    tell_dynamo()
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def case():
    return OneHead(bias=True)


def own_loss(logits, labels):
    wide = logits[:, :-1].reshape(-1, VOCAB).float()
    return F.cross_entropy(wide, labels[:, 1:].reshape(-1)) + 0.1 * logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize("full", [True, False], ids=["full graph", "graph"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_loss_and_its_gradients(case, backend, full):
    compiled = torch.compile(own_loss, backend=backend, fullgraph=full)
    found = case.outcome(compiled, case.deferred())
    for one, other in zip(found, case.outcome(own_loss, case.plain()), strict=True):
        assert_near(one, other, OPERATIONS)
    assert not counters["graph_break"]


def test_lengths_that_differ_are_two_graphs(case):
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(own_loss, backend=backend, fullgraph=True)
    for tokens in (9, 11, 13, 7, 12, 13):
        case.hidden = torch.randn(2, tokens, 16, requires_grad=True)
        case.labels = torch.randint(0, VOCAB, (2, tokens))
        for _ in range(2):
            assert_near(
                compiled(case.deferred(), case.labels), own_loss(case.plain(), case.labels), OPERATIONS
            )
    assert backend.frame_count == 2


def test_plain_logits_and_no_gradient_after_deferred_ones(case):
    compiled = torch.compile(own_loss, backend="eager", fullgraph=True)
    expected = own_loss(case.plain(), case.labels)
    for logits in (case.deferred(), case.plain(), case.deferred()):
        assert_near(compiled(logits, case.labels), expected, OPERATIONS)
        with torch.no_grad():
            assert_near(compiled(logits, case.labels), expected, OPERATIONS)
    with torch.inference_mode():
        assert_near(compiled(case.deferred(), case.labels), expected, OPERATIONS)


@pytest.mark.parametrize("given", ["dict", "tuple", "closure", "module", "attribute"])
def test_wherever_they_come_from(case, given):
    logits = case.deferred()
    expected = case.plain().argmax(-1)

    class Holder(nn.Module):
        def forward(self, logits):
            return logits.argmax(-1)

    holder = Holder()
    if given == "attribute":
        holder.logits = logits
    functions = {
        "dict": lambda: compiled_of(lambda o: o["logits"].argmax(-1))({"logits": logits}),
        "tuple": lambda: compiled_of(lambda o: o[1].argmax(-1))((None, logits)),
        "closure": lambda: compiled_of(lambda: logits.argmax(-1))(),
        "module": lambda: compiled_of(holder)(logits),
        "attribute": lambda: compiled_of(lambda: holder.logits.argmax(-1))(),
    }
    assert torch.equal(functions[given](), expected)


def compiled_of(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def test_logits_and_a_view_of_them_and_their_loss(case):
    def metric(logits, view, loss):
        return (logits[:, 1:] - view).abs().sum() + loss + logits.square().mean()

    def run(logits, labels):
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return compiled_of(metric)(logits, logits[:, 1:], loss)

    found = case.outcome(run, case.deferred())
    for one, other in zip(found, case.outcome(run, case.plain()), strict=True):
        assert_near(one, other, OPERATIONS)


def test_logits_after_a_change_in_place(case):
    def run(logits, labels):
        compiled = compiled_of(lambda z: z.square().mean())
        first = compiled(logits)
        logits.mul_(2)
        return first.detach() + compiled(logits)

    found = case.outcome(run, case.deferred())
    for one, other in zip(found, case.outcome(run, case.plain()), strict=True):
        assert_near(one, other, OPERATIONS)


def test_a_dimension_that_is_marked_dynamic(case):
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda z: z.square().sum(), backend=backend, fullgraph=True)
    for tokens in (9, 12):
        case.hidden = torch.randn(2, tokens, 16)
        logits = case.deferred()
        torch._dynamo.mark_dynamic(logits, 1)
        assert_near(compiled(logits), case.plain().square().sum(), OPERATIONS)
    assert backend.frame_count == 1


class Doubled(nn.Module):
    def forward(self, logits):
        return (2 * logits).logsumexp(-1)


def test_an_exported_module(case):
    logits = case.deferred()
    program = torch.export.export(Doubled(), (logits,), strict=False).module()
    assert_near(program(case.deferred()), Doubled()(case.plain()), OPERATIONS)
    with pytest.raises(Exception, match=r"outputs.logits \+ 0"):
        torch.export.export(Doubled(), (logits,), strict=True)


def test_dynamo_is_told_again_after_the_watches_were_cancelled(case):
    imports.uninstall()
    builder = sys.modules["torch._dynamo.variables.builder"]
    builder.VariableBuilder._type_dispatch().pop(DeferredLogits)
    tell_dynamo()
    expected = case.plain().argmax(-1)
    assert torch.equal(compiled_of(lambda z: z.argmax(-1))(case.deferred()), expected)


PROGRAM = """
import sys, torch
from twinkle.deferred.compiled import tell_dynamo
from twinkle.deferred.logits import DeferredLogits
from twinkle.hooks import imports
from twinkle.deferred.forward import defer
tell_dynamo()
assert "torch._dynamo.variables.builder" not in sys.modules, "nothing to wait for"
linear, hidden = torch.nn.Linear(4, 5), torch.randn(2, 3, 4)
logits = defer(linear, hidden)
found = torch.compile(lambda z: z.argmax(-1), backend="eager", fullgraph=True)(logits)
assert torch.equal(found, linear(hidden).argmax(-1))
"""


def test_dynamo_that_is_imported_later_is_told():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    if "nothing to wait for" in done.stderr:
        pytest.skip("something imports dynamo at once")
    assert done.returncode == 0, done.stderr
