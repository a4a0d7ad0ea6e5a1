"""The triton kernel of the loss: against the plain path, in the interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from rounding import assert_near, rounding_bound, terms

from twinkle.ops.causal_lm_loss import chunks
from twinkle.ops.causal_lm_loss.row_loss import RowLoss

VARIANTS = [
    RowLoss(),
    RowLoss(pre=0.5),
    RowLoss(pre=0.25, post=4.0, tanh=True),
    RowLoss(pre=-0.25, post=4.0, tanh=True),
    RowLoss(label_smoothing=0.1),
    RowLoss(pre=0.5, post=3.0, tanh=True, label_smoothing=0.3, ignore_index=1),
]


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def test_kernel_in_the_interpreter():
    """The tests below in a process of their own: triton has to be imported with its interpreter on."""
    if torch.cuda.is_available() or INTERPRETED or importlib.util.find_spec("triton") is None:
        pytest.skip("the tests below run here, or there is no triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.fixture
def row_losses(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel's launcher; skips where neither a GPU nor triton's interpreter runs it."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if not torch.cuda.is_available() and not INTERPRETED:
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1")
    from twinkle.ops.causal_lm_loss import triton as kernel

    if not torch.cuda.is_available():
        # Small blocks, so that a row has whole ones and a rest.
        monkeypatch.setattr(kernel, "BLOCK", 256)
        try:
            kernel.row_losses(
                torch.ones(1, 8), None, torch.tensor([0]), torch.ones(1), None, RowLoss(), False
            )
        except Exception as error:
            if "numpy" not in str(error) and "0-dimensional" not in repr(error):
                raise
            pytest.skip(f"triton's interpreter does not work here: {error!r}")  # triton 3.6 with numpy 2.4
    return kernel.row_losses


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("vocab", [5, 256, 700])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("scale", ["none", "one", "each"])
def test_kernel_equals_the_plain_path(row_losses, variant, vocab, scale):
    torch.manual_seed(0)
    logits = (5 * torch.randn(3, vocab)).to(device())
    bias = torch.randn(vocab, device=device()) if vocab == 700 else None
    labels = torch.tensor([variant.ignore_index, 2, vocab - 1], device=device())
    factor = {"none": None, "one": torch.tensor(0.3), "each": torch.tensor([1.0, 2.0, 3.0])}[scale]
    factor = factor if factor is None else factor.to(device())
    found, expected = logits.clone(), logits.clone()
    losses, right = torch.full((2, 3), torch.nan, device=device()).unbind(0)
    row_losses(found, bias, labels, losses, factor, variant, True)
    chunks.plain_row_losses(expected, bias, labels, right, factor, variant, True)
    assert_near(losses, right, terms(vocab) + 30)
    assert_near(found, expected, terms(vocab) + 30)


def test_logits_stay_where_no_gradient_is_wanted(row_losses):
    logits = torch.randn(2, 300, device=device())
    before = logits.clone()
    row_losses(
        logits,
        None,
        torch.tensor([0, 1], device=device()),
        torch.empty(2, device=device()),
        None,
        RowLoss(),
        False,
    )
    assert torch.equal(logits, before)


def test_extreme_logits_give_a_finite_loss(row_losses):
    logits = torch.zeros(2, 300, device=device())
    logits[:, 7], logits[:, 8] = 1e4, -torch.inf
    losses = torch.empty(2, device=device())
    row_losses(logits, None, torch.tensor([7, 3], device=device()), losses, None, RowLoss(), True)
    assert losses.tolist() == [0.0, 1e4]
    assert logits.isfinite().all()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="reads no memory out of bounds, and stops the interpreter only"
)
def test_label_out_of_the_vocabulary_gives_no_number(row_losses):
    losses = torch.empty(1)
    row_losses(torch.zeros(1, 300), None, torch.tensor([300]), losses, None, RowLoss(), True)
    assert losses.isnan().all()


def test_factor_of_one_reads_nothing_and_another_scales(row_losses):
    from twinkle.ops.causal_lm_loss.triton import scale_

    values = torch.arange(10.0, device=device())
    assert torch.equal(scale_(values.clone(), torch.tensor(1.0, device=device())), values)
    assert torch.equal(scale_(values.clone(), torch.tensor(0.5, device=device())), values / 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [50257, 32000])
def test_gpu_errs_no_more_than_twice_as_much(dtype, vocab):
    from twinkle.ops.causal_lm_loss.linear_cross_entropy import linear_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(5000, 64, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(vocab, 64, device="cuda").to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (5000,), device="cuda")
    labels[::3] = -100

    def plain(hidden, weight, labels):
        return torch.nn.functional.cross_entropy(
            (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32)), labels
        )

    def outcome(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
        loss = function(*leaves, labels)
        return [loss.double(), *(g.double() for g in torch.autograd.grad(loss * 3, leaves))]

    exact, theirs, ours = (
        outcome(plain, torch.float64),
        outcome(plain, dtype),
        outcome(linear_cross_entropy, dtype),
    )
    for right, other, mine in zip(exact, theirs, ours, strict=True):
        room = rounding_bound(dtype if dtype == torch.float32 else torch.float16, 1, right.norm().item())
        assert (mine - right).norm() <= 2 * (other - right).norm() + room


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_leaves_out_ignored_rows_and_tells_a_wrong_bound():
    from twinkle.ops.causal_lm_loss.linear_cross_entropy import linear_cross_entropy

    hidden = torch.randn(3000, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda")
    labels = torch.randint(0, 1000, (3000,), device="cuda")
    labels[::2] = -100
    whole = linear_cross_entropy(hidden, weight, labels)
    part = linear_cross_entropy(hidden, weight, labels, most_rows=1600)
    assert_near(whole, part, terms(1000) + terms(1500) + 64)
    assert_near(
        torch.autograd.grad(whole, hidden), torch.autograd.grad(part, hidden), terms(1000) + terms(1500) + 64
    )
    assert linear_cross_entropy(hidden, weight, labels, most_rows=1000).isnan()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_memory_is_bounded_by_the_chunk():
    from twinkle.ops.causal_lm_loss.linear_cross_entropy import linear_cross_entropy

    rows, vocab = 131072, 64000
    hidden = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, labels).backward()
    assert torch.cuda.max_memory_allocated() - before < 3 * 2**30  # 2 GiB of logits, and the gradients
    assert rows * vocab * 2 > 15 * 2**30
