"""Linear cross entropy in chunks, against `F.cross_entropy` of the logits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rounding import rounding_bound
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from twinkle.ops import machine
from twinkle.ops.causal_lm_loss import chunks
from twinkle.ops.causal_lm_loss.linear_cross_entropy import linear_cross_entropy
from twinkle.ops.causal_lm_loss.row_loss import RowLoss

OPERATIONS = 101 + 16 + 2 * 48 + 20
"""Behind a loss and its gradients: products over the vocabulary, the width and the rows, there and back."""
FLOAT64 = 2 * rounding_bound(torch.float64, OPERATIONS)
FLOAT32 = 2 * rounding_bound(torch.float32, OPERATIONS)
# Logits, their softmax, their gradient, the gradients and the scaler: each is rounded once or twice.
HALF = rounding_bound(torch.float16, 10)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"scale": 0.25},
    {"scale": -0.5},
    {"softcap": 3.0},
    {"scale": 2.0, "softcap": 5.0},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.2, "softcap": 2.0, "reduction": "none"},
    {"num_items_in_batch": 17},
    {"num_items_in_batch": torch.tensor(17)},
    {"shift": True},
    {"ignore_index": 3},
]


def reference(
    hidden,
    weight,
    labels,
    *,
    bias=None,
    scale=None,
    softcap=None,
    num_items_in_batch=None,
    reduction="mean",
    shift=False,
    ignore_index=-100,
    label_smoothing=0.0,
):
    logits = F.linear(hidden, weight, bias)
    if scale is not None:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if logits.dtype != torch.float64:
        logits = logits.float()
    if shift:
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = F.cross_entropy(
        logits.view(-1, weight.shape[0]),
        labels.reshape(-1),
        ignore_index=ignore_index,
        reduction="sum" if num_items_in_batch is not None else reduction,
        label_smoothing=label_smoothing,
    )
    loss = loss / num_items_in_batch if num_items_in_batch is not None else loss
    return loss.view(labels.shape) if loss.dim() else loss


def inputs(vocab=101, rows=(2, 24), width=16, *, bias=False, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) / 2
    extra = torch.randn(vocab, generator=generator)
    labels = torch.randint(4, vocab, rows, generator=generator)
    labels[0, :5] = -100
    leaves = [
        t.to(device, dtype).requires_grad_() for t in ([hidden, weight, extra] if bias else [hidden, weight])
    ]
    return leaves, labels.to(device)


def outcome(function, leaves, labels, factor=None, **options):
    """Loss and gradients, in one list."""
    hidden, weight, *bias = leaves
    loss = function(hidden, weight, labels, bias=bias[0] if bias else None, **options)
    factor = (
        torch.arange(1, loss.numel() + 1, device=loss.device).view(loss.shape) if factor is None else factor
    )
    return [loss.detach(), *torch.autograd.grad((loss * factor).sum(), leaves)]


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def assert_same(found, expected, bound):
    assert max(error(f, e) for f, e in zip(found, expected, strict=True)) < bound


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks where the sizes of a test would make one."""
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows, *_, **__: min(rows, 7))


@pytest.fixture(params=[True, False], ids=["products in half", "products in float32"])
def products(request, monkeypatch):
    """Half precision where the processor multiplies it, and where it does not: both, on any."""
    monkeypatch.setattr(machine, "multiplies", lambda dtype: request.param)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_loss_and_gradients_are_those_of_cross_entropy(options, bias, small_chunks):
    leaves, labels = inputs(bias=bias)
    if options.get("ignore_index") == 3:
        labels = labels.where(labels != -100, 3)
    assert_same(
        outcome(linear_cross_entropy, leaves, labels, **options),
        outcome(reference, leaves, labels, **options),
        FLOAT32,
    )


@pytest.fixture
def aligned_products(monkeypatch):
    """Products of vocabularies cut at a multiple of 64, as on a GPU for 16 bits; counts those that were."""
    cut = []

    def products(vocab, dtype, *, gpu):
        found = split(vocab, torch.float16, gpu=True)
        cut.extend(found[1:])
        return found

    split = chunks.products
    monkeypatch.setattr(chunks, "products", products)
    monkeypatch.setattr(chunks, "LEAST_SPLIT", 64)
    return cut


@pytest.mark.parametrize("vocab", [64, 101, 129, 300])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_vocabulary_of_any_size_is_multiplied_by_aligned_parts(
    options, vocab, small_chunks, aligned_products
):
    leaves, labels = inputs(vocab=vocab, bias=True)
    labels = labels.where(labels != -100, options.get("ignore_index", -100))
    found = outcome(linear_cross_entropy, leaves, labels, **options)
    assert_same(found, outcome(reference, leaves, labels, **options), FLOAT32)
    assert bool(aligned_products) == bool(vocab % 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_aligned_parts_err_no_more_in_half_precision(dtype, small_chunks, products, aligned_products):
    test_half_precision_errs_no_more_than_twice_as_much(dtype, small_chunks, products)


def test_large_vocabularies_of_16_bits_are_cut_on_a_gpu():
    parts = chunks.products
    assert parts(51865, torch.bfloat16, gpu=True) == [(51840, 51865), (0, 51840)]
    assert parts(51840, torch.bfloat16, gpu=True) == [(0, 51840)]
    assert parts(51865, torch.float32, gpu=True) == [(0, 51865)]
    assert parts(51865, torch.bfloat16, gpu=False) == [(0, 51865)]
    assert parts(1001, torch.bfloat16, gpu=True) == [(0, 1001)]  # too small to be worth two launches
    assert parts(0, torch.bfloat16, gpu=True) == [(0, 0)]


def test_float64_stays_float64(small_chunks):
    leaves, labels = inputs(dtype=torch.float64)
    assert_same(outcome(linear_cross_entropy, leaves, labels), outcome(reference, leaves, labels), FLOAT64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_no_more_than_twice_as_much(dtype, small_chunks, products):
    leaves, labels = inputs(vocab=300, rows=(4, 40), width=32)
    exact = outcome(reference, leaves, labels, factor=3.0)
    rounded = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    exact = outcome(
        reference, [leaf.detach().float().requires_grad_() for leaf in rounded], labels, factor=3.0
    )
    plain = outcome(reference, rounded, labels, factor=3.0)
    ours = outcome(linear_cross_entropy, rounded, labels, factor=3.0)
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        # One number may happen to be off by nothing at all.
        assert error(mine, right) <= 2 * error(theirs, right) + rounding_bound(dtype, 1)


def test_gradients_survive_a_loss_scaler_in_float16(small_chunks, products):
    leaves, labels = inputs(dtype=torch.float16, rows=(4, 100))
    exact = outcome(
        reference, [leaf.detach().float().requires_grad_() for leaf in leaves], labels, factor=1.0
    )
    hidden, weight = leaves
    loss = linear_cross_entropy(hidden, weight, labels, num_items_in_batch=10**6)
    found = torch.autograd.grad(loss * 2.0**14, leaves)
    count = (labels != -100).sum()
    assert_same([g.float() / 2.0**14 * 10**6 / count for g in found], exact[1:], HALF)


def test_batch_of_ignored_labels_is_as_in_torch():
    leaves, labels = inputs()
    labels.fill_(-100)
    loss, *gradients = outcome(linear_cross_entropy, leaves, labels)
    assert loss.isnan()
    assert all((gradient == 0).all() for gradient in gradients)
    loss, *gradients = outcome(linear_cross_entropy, leaves, labels, num_items_in_batch=5)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_no_rows_at_all():
    leaves, labels = inputs(rows=(1, 8))
    hidden, weight = leaves[0][:, :0], leaves[1]
    loss = linear_cross_entropy(hidden, weight, labels[:, :0], reduction="sum")
    loss.backward()
    assert loss == 0
    assert (weight.grad == 0).all()


def test_ignored_rows_are_left_out_of_the_products(monkeypatch):
    leaves, labels = inputs(rows=(2, 100))
    labels[1] = -100
    seen = []
    monkeypatch.setattr(
        torch, "mm", lambda left, right, mm=torch.mm, **o: seen.append(left.shape) or mm(left, right, **o)
    )
    linear_cross_entropy(*leaves, labels)
    assert seen[0] == (int((labels != -100).sum()), 16)


def test_a_few_ignored_rows_are_not_worth_copies_of_the_others(monkeypatch):
    leaves, labels = inputs(rows=(2, 100))  # 5 of 200
    seen = []
    monkeypatch.setattr(
        torch, "mm", lambda left, right, mm=torch.mm, **o: seen.append(left.shape) or mm(left, right, **o)
    )
    linear_cross_entropy(*leaves, labels)
    assert seen[0] == (200, 16)


class Sizes(TorchDispatchMode):
    """The largest tensor that comes out of an operator."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def test_memory_is_bounded_by_the_chunk():
    rows, vocab = 4096, 4000
    hidden, weight = torch.randn(rows, 8), torch.randn(vocab, 8)
    labels = torch.randint(0, vocab, (rows,))
    # Below the operator, which shows such a mode only what comes out of it.
    with Sizes() as sizes:
        chunks.in_chunks(hidden, weight, None, labels, None, RowLoss(), chunks.Wanted(True, True))
    assert sizes.largest <= 17 * 2**20
    assert sizes.largest < rows * vocab * 4 / 3


@pytest.fixture
def large_gpu(monkeypatch):
    monkeypatch.setattr(chunks, "gpu_memory", lambda: 140 << 30)


def rows_of_a_chunk(vocab, width, rows=1 << 20):
    return chunks.chunk_rows(rows, vocab, width, 2, gpu=True)


@pytest.mark.parametrize(
    ("vocab", "width", "expected"),
    [(151936, 1024, 4096), (128256, 4096, 8192), (262144, 1152, 4096), (262144, 8192, 16384)],
)
def test_chunks_on_a_gpu_are_large(large_gpu, vocab, width, expected):
    assert rows_of_a_chunk(vocab, width) == expected


def test_chunks_on_a_gpu_are_bounded_by_its_memory(monkeypatch):
    monkeypatch.setattr(chunks, "gpu_memory", lambda: 16 << 30)
    for vocab, width in ((10**6, 8192), (151936, 1024)):
        assert rows_of_a_chunk(vocab, width) * vocab * 2 <= (16 << 30) / 16


def test_rows_that_need_no_sum_in_float32_are_one_chunk(large_gpu):
    assert rows_of_a_chunk(151936, 3072, rows=4096 + 3072) == 4096 + 3072
    assert rows_of_a_chunk(151936, 1024, rows=8192) == 4096


def test_gradients_only_where_they_are_wanted():
    leaves, labels = inputs()
    hidden, weight = leaves
    loss = linear_cross_entropy(hidden, weight.detach(), labels)
    expected = torch.autograd.grad(reference(hidden, weight, labels), hidden)
    assert_same(torch.autograd.grad(loss, hidden), expected, FLOAT32)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_backward_twice_over_a_kept_graph():
    leaves, labels = inputs()
    loss = linear_cross_entropy(*leaves, labels)
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_on_the_cpu_are_those_of_the_forward_not_copies():
    leaves, labels = inputs()
    loss = 3 * linear_cross_entropy(*leaves, labels)
    computed = {tensor.data_ptr() for tensor in loss.grad_fn.next_functions[0][0].saved_tensors}
    loss.backward()
    assert {leaf.grad.data_ptr() for leaf in leaves} <= computed


def test_several_gradients_of_the_loss_at_once():
    leaves, labels = inputs()
    loss = linear_cross_entropy(*leaves, labels)
    (one,) = torch.autograd.grad(loss, leaves[:1], retain_graph=True)
    (found,) = torch.autograd.grad(loss, leaves[:1], torch.tensor([1.0, 2.0]), is_grads_batched=True)
    assert_same([found], [torch.stack([one, 2 * one])], FLOAT32)


def test_second_derivative_is_refused():
    leaves, labels = inputs()
    loss = linear_cross_entropy(*leaves, labels)
    (gradient,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


def test_accumulated_gradients_are_those_of_one_batch():
    leaves, labels = inputs(rows=(4, 24))
    count = int((labels != -100).sum())
    expected = outcome(reference, leaves, labels, factor=1.0)[1:]
    hidden, weight = leaves
    for part in range(4):
        loss = linear_cross_entropy(hidden[part], weight, labels[part], num_items_in_batch=count)
        loss.backward()
    assert_same([hidden.grad, weight.grad], expected, FLOAT32)


def test_inputs_that_are_not_contiguous():
    leaves, labels = inputs(rows=(6, 24))
    hidden = leaves[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    weight = leaves[1].detach().t().contiguous().t().requires_grad_()
    assert_same(
        outcome(linear_cross_entropy, [hidden, weight], labels), outcome(reference, leaves, labels), FLOAT32
    )


def test_autocast_computes_as_the_linear_layer_would():
    leaves, labels = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = outcome(linear_cross_entropy, leaves, labels), outcome(reference, leaves, labels)
    assert [t.dtype for t in found] == [torch.float32] * 3
    assert_same(found, expected, rounding_bound(torch.bfloat16, 6))


def test_labels_out_of_the_vocabulary_are_an_error_on_the_cpu():
    leaves, labels = inputs()
    labels[0, 0] = 10**6
    with pytest.raises(Exception, match=r"out of (bounds|range)"):
        linear_cross_entropy(*leaves, labels)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"reduction": "avg"}, "reduction"),
        ({"labels": torch.zeros(3)}, "labels"),
        ({"weight": torch.ones(5, 3)}, "weight"),
    ],
    ids=["reduction", "labels", "weight"],
)
def test_wrong_arguments_are_told(change, text):
    leaves, labels = inputs()
    given = {"hidden": leaves[0], "weight": leaves[1], "labels": labels, **change}
    with pytest.raises(ValueError, match=text):
        linear_cross_entropy(**given)


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, False, False)], ids=str)
def test_operator_passes_opcheck(wanted):
    leaves, labels = inputs(bias=True)
    hidden, weight, bias = leaves
    leaves = [hidden.flatten(0, 1), weight, bias]
    given = [leaf.detach().requires_grad_(want) for leaf, want in zip(leaves, wanted, strict=True)]
    arguments = (*given, labels.flatten(), torch.tensor(5.0), None, 1.0, 2.0, True, -100, 0.1, *wanted)
    import twinkle.ops.causal_lm_loss.op  # noqa: F401

    tests = (
        ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        if any(wanted)
        else ("test_schema", "test_faketensor")
    )
    torch.library.opcheck(torch.ops.twinkle.linear_cross_entropy.default, arguments, test_utils=tests)


def test_operator_of_rows_passes_opcheck():
    leaves, labels = inputs()
    arguments = (
        leaves[0].flatten(0, 1).detach().requires_grad_(),
        leaves[1],
        None,
        labels.flatten(),
        1.0,
        1.0,
        False,
        -100,
        0.0,
    )
    torch.library.opcheck(torch.ops.twinkle.linear_cross_entropy_rows.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_break(reduction):
    leaves, labels = inputs()

    def step(hidden, weight, labels):
        return linear_cross_entropy(hidden * 2, weight, labels, reduction=reduction).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(*leaves, labels), leaves)
    assert_same(torch.autograd.grad(compiled(*leaves, labels), leaves), expected, FLOAT32)


def test_import_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, twinkle.deferred.install\n"
        "from twinkle.ops.causal_lm_loss.linear_cross_entropy import linear_cross_entropy as f\n"
        "print(f(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 1])).item())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.startswith("1.098"), result.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "vocab"), [(24, 99), (512, 99), (512, 501), (100, 64)])
def test_nothing_comes_of_memory_that_was_not_written(rows, vocab, dtype):
    """oneDNN reads behind the rows of logits; torch fills new memory with NaN in this mode."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, 32).to(dtype).requires_grad_()
    weight = torch.randn(vocab, 32).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows,))
    labels[:3] = -100
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        loss = linear_cross_entropy(hidden, weight, labels)
        found = torch.autograd.grad(loss, [hidden, weight])
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(t.isfinite().all() for t in (loss, *found))
