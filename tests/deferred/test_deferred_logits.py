"""Deferred logits by themselves: what is recorded, and that everything else computes them."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from multiprocessing.reduction import ForkingPickler

import numpy
import pytest
import torch
import torch.nn.functional as F
from one_head import OPERATIONS, VOCAB, OneHead, flat
from rounding import assert_near

from twinkle.deferred.logits import DeferredLogits


@pytest.fixture
def case():
    return OneHead()


LOSSES = {
    "transformers": lambda z, y: flat(z.float(), F.pad(y, (0, 1), value=-100)[..., 1:]),
    "shifted rows": lambda z, y: flat(z[..., :-1, :].contiguous(), y[..., 1:]),
    "rows of a slice": lambda z, y: F.cross_entropy(z[:, :-1].reshape(-1, VOCAB), y[:, 1:].flatten()),
    "rows of a mask": lambda z, y: F.cross_entropy(z[y != -100], y[y != -100]),
    "rows of each sequence": lambda z, y: flat(z[:, [0, 3, 3]], y[:, [0, 3, 3]]),
    "rows by number": lambda z, y: F.cross_entropy(z[[0, 1], [3, 4]], y[[0, 1], [3, 4]]),
    "one row": lambda z, y: F.cross_entropy(z[1, 3][None], y[1, 3:4]),
    "one sequence": lambda z, y: F.cross_entropy(z[1], y[1]),
    "module": lambda z, y: torch.nn.CrossEntropyLoss()(z.reshape(18, VOCAB), y.flatten()),
    "scale": lambda z, y: flat(z * 0.5, y),
    "division": lambda z, y: flat(z / 4.0, y),
    "division in place": lambda z, y: flat(z.div_(4.0), y),
    "operator in place": lambda z, y: flat(z.__imul__(3), y),
    "softcap": lambda z, y: flat(torch.tanh(z / 3.0) * 3.0, y),
    "scale and softcap": lambda z, y: flat((2 * z / 3.0).tanh() * 3.0, y),
    "softcap in float32": lambda z, y: flat(torch.tanh(z.to(torch.float32) / 3.0) * 3.0, y),
    "sum": lambda z, y: flat(z, y, reduction="sum") / 11,
    "each row": lambda z, y: flat(z, y, reduction="none") * torch.arange(18),
    "label smoothing": lambda z, y: flat(z, y, label_smoothing=0.1),
    "ignore_index": lambda z, y: flat(z, y.where(y != -100, 4), ignore_index=4),
    "same device": lambda z, y: flat(z.to("cpu", torch.float32), y),
    "like another": lambda z, y: flat(z.to(torch.zeros(1)), y),
}

COMPUTED = {
    "class weights": lambda z, y: flat(z, y, weight=torch.arange(1.0, VOCAB + 1)),
    "targets of probabilities": lambda z, y: F.cross_entropy(
        z.view(-1, VOCAB), torch.full((18, VOCAB), 1 / VOCAB)
    ),
    "classes in the middle": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "log_softmax": lambda z, y: F.nll_loss(F.log_softmax(z, -1).view(-1, VOCAB), y.view(-1)),
    "logsumexp": lambda z, y: z.logsumexp(-1),
    "gather": lambda z, y: z.gather(-1, y.clamp_min(0).unsqueeze(-1)),
    "a column": lambda z, y: z[..., 3],
    "sum with others": lambda z, y: torch.cat([z, z + 1]).pow(2),
    "in place": lambda z, y: z.mul_(2).add_(1).pow(2) + z,
    "assignment": lambda z, y: (z.__setitem__((0, 0), 0.0), z.pow(2))[1],
    "scale by a tensor": lambda z, y: flat(z * torch.full((), 0.5), y),
    "two tanhs": lambda z, y: flat(z.tanh().tanh(), y),
    "einsum": lambda z, y: torch.einsum("bnv,v->bn", z, torch.ones(VOCAB)),
    "out": lambda z, y: torch.softmax(z, -1),
    "iteration": lambda z, y: torch.stack([row.sum() for row in z]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_needs_no_logits(case, name):
    assert case.compare(LOSSES[name]).is_deferred


@pytest.mark.parametrize("name", COMPUTED)
def test_anything_else_computes_them(case, name):
    logits = case.compare(COMPUTED[name])
    # Where only something recorded of them was computed, they themselves still wait.
    recorded = ("class weights", "targets of probabilities", "log_softmax", "out", "two tanhs")
    assert logits.is_deferred == (name in recorded)


@pytest.mark.parametrize("name", ["transformers", "softcap", "each row", "label smoothing"])
def test_head_with_a_bias(name):
    assert OneHead(bias=True).compare(LOSSES[name]).is_deferred


def test_it_is_a_tensor_of_the_same_shape_dtype_and_device(case):
    logits, plain = case.deferred(), case.plain()
    assert isinstance(logits, torch.Tensor)
    assert torch.is_tensor(logits)
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "layout", "is_cuda"):
        assert getattr(logits, name) == getattr(plain, name), name
    assert (logits.size(), logits.dim(), logits.numel(), len(logits)) == (plain.size(), 3, plain.numel(), 2)
    assert logits.size(-1) == VOCAB
    assert logits.stride() == plain.stride()
    assert logits.is_floating_point()
    assert logits.is_deferred


def test_shape_of_what_is_recorded(case):
    changes = (
        lambda z: z[:, 2:5],
        lambda z: z[None],
        lambda z: z[0, 1:],
        lambda z: z.view(3, 6, VOCAB),
        lambda z: z.view(-1, VOCAB),
        lambda z: z[..., None, :],
        lambda z: z[torch.tensor([0, 1]), torch.tensor([2, 3])],
        lambda z: z.half(),
    )
    for change in changes:
        found, expected = change(case.deferred()), change(case.plain())
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.stride() == expected.stride()
        assert found.is_deferred
        assert_near(found + 0, expected, OPERATIONS)


@pytest.mark.parametrize(
    "wrong",
    [lambda z: z.view(-1, VOCAB + 1), lambda z: z[0, 0, 0, 0], lambda z: z[5], lambda z: z.view(5, -1)],
    ids=range(4),
)
def test_what_is_wrong_raises_what_torch_raises(case, wrong):
    with pytest.raises(Exception, match=r".") as expected:
        wrong(case.plain())
    with pytest.raises(type(expected.value)):
        wrong(case.deferred())


def test_rows_alone_are_computed_of_a_slice(case):
    logits = case.deferred()
    assert (logits[:, -1] + 0).shape == (2, VOCAB)
    assert logits.is_deferred


def test_a_change_is_seen_through_every_view(case):
    logits, plain = case.deferred(), case.plain().detach()
    views = logits.view(-1, VOCAB)[2:]
    assert (views + 0).shape == (16, VOCAB)
    with torch.no_grad():
        logits.fill_(3.0)
    assert (views == 3.0).all()
    assert plain.shape == logits.shape


def test_a_cast_is_a_copy_that_a_change_does_not_reach(case):
    logits = case.deferred()
    cast, before = logits.double(), case.plain().double()
    with torch.no_grad():
        logits.zero_()
    assert_near(cast + 0, before, OPERATIONS)


def test_argmax_needs_no_logits(case):
    logits, plain = case.deferred(), case.plain()
    assert torch.equal(logits.argmax(-1), plain.argmax(-1))
    assert torch.equal(torch.argmax(logits / 2, dim=2, keepdim=True), plain.argmax(2, keepdim=True))
    assert logits.is_deferred
    assert logits.argmax() == plain.argmax()


def test_detached_logits_have_no_gradient(case):
    detached = case.deferred().detach()
    assert detached.is_deferred
    assert not detached.requires_grad
    assert not (detached * 2 + 1).requires_grad
    assert_near(detached + 0, case.plain().detach(), OPERATIONS)


def test_computed_under_no_grad_they_still_have_a_gradient(case):
    logits = case.deferred()
    with torch.no_grad():
        logits.softmax(-1)
    assert logits.requires_grad
    (expected,) = torch.autograd.grad(case.plain().pow(2).sum(), case.hidden)
    assert_near(torch.autograd.grad(logits.pow(2).sum(), case.hidden)[0], expected, OPERATIONS)


def test_made_under_no_grad_they_have_none(case):
    with torch.no_grad():
        logits = case.deferred()
    assert not logits.requires_grad
    assert not flat(logits, case.labels).requires_grad
    assert not logits.sum().requires_grad


@pytest.mark.parametrize(
    "leave",
    [
        lambda z: z.detach().numpy(),
        lambda z: z.tolist(),
        lambda z: pickle.loads(pickle.dumps(z)),
        copy.deepcopy,
        copy.copy,
        lambda z: _saved(z),
        lambda z: z.as_subclass(torch.Tensor),
    ],
    ids=["numpy", "tolist", "pickle", "deepcopy", "copy", "save", "as_subclass"],
)
def test_they_leave_as_plain_tensors(case, leave):
    with torch.no_grad():
        logits, plain = case.deferred(), case.plain()
    found = leave(logits)
    assert not isinstance(found, DeferredLogits)
    assert_near(torch.as_tensor(found), plain, OPERATIONS)


def test_data_that_is_set_is_what_they_are(case):
    logits, before = case.deferred(), case.plain()
    view = logits.view(-1, VOCAB)
    logits.data = torch.ones(2, 9, VOCAB)
    assert torch.equal(logits.detach() + 0, torch.ones(2, 9, VOCAB))
    assert_near(view.detach() + 0, before.view(-1, VOCAB), OPERATIONS)


def test_a_copy_of_deferred_logits_is_deferred(case):
    logits = case.deferred()
    copied = logits.clone()
    assert copied.is_deferred
    with torch.no_grad():
        logits.zero_()
    assert_near(copied + 0, case.plain(), OPERATIONS)


def _saved(tensor):
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def test_memory_that_is_taken_past_the_dispatcher_is_refused(case):
    with torch.no_grad():
        logits = case.deferred()
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(logits)
    assert_near(torch.from_dlpack(logits), case.plain(), OPERATIONS)


def test_repr_shows_the_numbers(case):
    assert repr(case.deferred())[:20] == repr(case.plain())[:20]


def test_autocast_of_the_call_holds_when_they_are_computed(case):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, plain = case.deferred(), case.plain()
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits + 0, plain)
    loss = flat(logits.float(), case.labels)
    assert_near(loss, flat(plain.float(), case.labels), OPERATIONS)
    assert loss.dtype == torch.float32


def test_loss_of_half_precision_logits_has_their_dtype(case):
    case.linear.bfloat16()
    case.hidden = case.hidden.detach().bfloat16().requires_grad_()
    assert flat(case.deferred(), case.labels).dtype == torch.bfloat16


def test_inference_mode(case):
    with torch.inference_mode():
        assert torch.equal(case.deferred() + 0, case.plain())
    logits = case.deferred()
    with torch.inference_mode():
        logits.sum()
    assert logits.sum().requires_grad


def test_gradient_of_the_logits_is_what_it_is(case):
    def gradient(logits):
        seen = []
        logits.register_hook(seen.append)
        logits.retain_grad()
        flat(logits.float() * 2, case.labels).backward()
        assert seen[0].shape == logits.grad.shape == logits.shape
        return [logits.grad + 0, seen[0] + 0]

    assert_near(gradient(case.deferred()), gradient(case.plain()), OPERATIONS)


def test_a_hook_that_changes_the_gradient_changes_what_comes_of_it(case):
    def outcome(logits):
        logits.register_hook(lambda grad: 3 * grad)
        return torch.autograd.grad(flat(logits, case.labels), [case.hidden, *case.linear.parameters()])

    assert_near(outcome(case.deferred()), outcome(case.plain()), OPERATIONS)


def test_a_gradient_handed_back_is_differentiated_again(case):
    def outcome(logits):
        leaf = logits.detach().requires_grad_()
        (found,) = torch.autograd.grad(flat(leaf, case.labels), leaf)
        first = torch.autograd.grad(logits, case.hidden, found, retain_graph=True)
        (again,) = torch.autograd.grad(logits, case.hidden, found, create_graph=True)
        return [*first, *torch.autograd.grad(again.square().sum(), case.linear.weight)]

    assert_near(outcome(case.deferred()), outcome(case.plain()), OPERATIONS)


def test_gradient_with_respect_to_the_logits_alone(case):
    def gradient(logits):
        return torch.autograd.grad(flat(logits[:, 1:].float().contiguous(), case.labels[:, 1:]), logits)[0]

    found = gradient(case.deferred())
    assert found.is_deferred
    assert_near(found + 0, gradient(case.plain()), OPERATIONS)


def test_recording_warns_of_nothing(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flat(case.deferred().float(), case.labels).backward()


def test_loss_of_a_compiled_function(case):
    compiled = torch.compile(flat, backend="eager")
    assert_near(compiled(case.deferred(), case.labels), flat(case.plain(), case.labels), OPERATIONS)


MEMORY = {
    "numpy": lambda z: torch.from_numpy(numpy.asarray(z)),
    "numpy of dlpack": lambda z: torch.from_numpy(numpy.from_dlpack(z)),
    "dlpack": torch.from_dlpack,
    "storage": lambda z: torch.empty(0).set_(z.untyped_storage(), 0, z.shape),
    "pickle": lambda z: pickle.loads(pickle.dumps(z)),
    "another process": lambda z: pickle.loads(ForkingPickler.dumps(z)),
    "list": lambda z: torch.tensor(z.tolist()),
}


@pytest.mark.parametrize("reader", MEMORY)
def test_who_asks_for_memory_gets_the_values(case, reader):
    with torch.no_grad():
        logits = case.deferred()
    found = MEMORY[reader](logits)
    assert type(found) is torch.Tensor
    assert torch.equal(found, case.plain())
    if "dlpack" in reader or reader == "storage":
        with torch.no_grad():
            found.zero_()
        assert not logits.any()


def test_a_pointer_taken_past_python_is_an_error(case):
    with torch.no_grad():
        logits = case.deferred()
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(logits)
    assert torch.equal(torch.from_dlpack(torch.utils.dlpack.to_dlpack(logits + 0)), case.plain())
