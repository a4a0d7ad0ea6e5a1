"""How far a result is from that of the original in higher precision, and how far it may be.

The whole, each row, and all but the outliers are looked at for themselves: one large number hides any error
elsewhere in the norm of the whole. Where numbers are not finite is compared by position.

A bound is twice the original's own error and a little. Rounding errors scatter: the fewer numbers make up a
norm, the further two of them are apart by chance. A row counts as many numbers as carry its norm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from twinkle.proof.verdict import Rejected

__all__ = ["HIGHER_PRECISION", "SLACK", "row_norms", "worst"]

HIGHER_PRECISION = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
    torch.float64: torch.float64,
}
"""The dtype that a result is compared in, from that of the inputs."""
SLACK = {torch.bfloat16: 2e-3, torch.float16: 1e-3, torch.float32: 2e-6, torch.float64: 1e-12}
"""What a kernel may add to twice the original's error, as a share of the result's norm."""
_ROW_FACTOR = 2.0
"""How much further off than the whole a single row may be."""
_OUTLIER = 10.0
"""Numbers larger than so many times the median are left out in the look past the outliers."""
_SAMPLE = 4096
_NOISE = 64
"""Rounding errors in a number that is none but these; inputs and gradients of results are about one."""


def worst(
    what: str,
    ours: list[Any],
    theirs: list[Any],
    exact: list[Any],
    slack: float,
    noise: list[Any] | None = None,
) -> tuple[float, float]:
    """The largest relative error of the kernel, and the original's own there.

    Args:
        what: ``result`` or ``gradient``, for messages.
        ours: Of the kernel; alike the original's in all but numbers.
        theirs: Of the original.
        exact: Of the original in higher precision.
        slack: That of the inputs' dtype: a float32 loss of bfloat16 logits is no better than these, and the
            error of a single number may happen to be none.
        noise: For each, the norms of its rows of what a change of the inputs by a rounding error changes;
            then rows alone are compared.

    Raises:
        Rejected: The error is too large.
    """
    largest = (0.0, 0.0)
    for number, (mine, other, reference) in enumerate(zip(ours, theirs, exact, strict=True)):
        if not isinstance(other, Tensor) or not (other.is_floating_point() or other.is_complex()):
            continue
        given = _wide(what, mine, other, reference)
        if given.mine.numel() == 0:
            continue
        own_slack = max(SLACK.get(other.dtype, 0.0), slack)
        if _is_noise(given):
            continue
        if noise is None:
            largest = max(largest, _check_whole(what, given, own_slack))
        rows = noise[number] if noise is not None else None
        _check_rows(what, given, own_slack, rows, of_sums=what == "gradient")
        if noise is None:
            _check_past_outliers(what, given, own_slack)
    return largest


class _Wide(NamedTuple):
    """One result in higher precision, zero where it is not compared because it is not finite."""

    mine: Tensor
    other: Tensor
    exact: Tensor
    eps: float


def _wide(what: str, mine: Tensor, other: Tensor, exact: Tensor) -> _Wide:
    eps = torch.finfo(other.dtype).eps
    if other.is_complex():
        mine, other, exact = (torch.view_as_real(tensor) for tensor in (mine, other, exact))
    wide = torch.float64 if exact.dtype == torch.float64 else torch.float32
    largest = torch.finfo(other.dtype).max
    mine, other, exact = (tensor.detach().to(wide) for tensor in (mine, other, exact))
    finite = torch.isfinite(mine)
    theirs = torch.isfinite(other)
    known = torch.isfinite(exact) & (exact.abs() <= largest)
    if bool((finite & theirs & known).all()):
        return _Wide(mine, other, exact, eps)
    # Where one is not finite, the kernel may be the better one; it may not be worse, nor hide what is none.
    same = (mine == other) | ((mine != mine) & (other != other))
    hidden = finite & ~theirs & ~known
    if bool((~finite & ~same & (theirs | known)).any()):
        raise Rejected(f"{what} off by nan or infinity, where the original is finite")
    if bool(hidden.any()):
        raise Rejected(f"{what} is finite where the original's is not")
    compared = finite & known
    mine, exact = (torch.where(compared, tensor, 0.0) for tensor in (mine, exact))
    return _Wide(mine, torch.where(compared & theirs, other, exact), exact, eps)


def _check_whole(what: str, given: _Wide, slack: float) -> tuple[float, float]:
    norm = torch.linalg.vector_norm(given.exact)
    offs = [torch.linalg.vector_norm(value - given.exact) for value in (given.mine, given.other)]
    few = _few(torch.linalg.vector_norm(given.exact.square()), norm)
    numbers = torch.stack([norm, *offs, few.to(norm.dtype)]).tolist()  # one wait for the device
    error, own = (off / numbers[0] if numbers[0] > 0 else off for off in numbers[1:3])
    few_of = numbers[3]
    if not error <= (2 + 2 * few_of) * own + slack + _scatter(given.eps) * few_of:
        raise Rejected(f"{what} off by {error:.1e}, where the original is off by {own:.1e}")
    return error, own


def _is_noise(given: _Wide) -> bool:
    """Whether all there is are rounding errors of sums that cancel out, as in the gradient of a softmax's sum."""
    norm = torch.linalg.vector_norm(given.exact)
    mine = torch.linalg.vector_norm(given.mine - given.exact)
    root = given.exact.numel() ** 0.5
    floor = _NOISE * root * torch.finfo(given.exact.dtype).eps
    return bool((norm > 0) & (norm <= floor) & (mine <= _NOISE * root * given.eps))


def _scatter(eps: float) -> float:
    """How far two roundings of one number may be apart, where the original's own is hit by chance."""
    return 1.5 * eps


def _few(squares: Tensor, norm: Tensor) -> Tensor:
    """One over the root of how many numbers carry a norm: 1 for a single one, near 0 for many.

    Args:
        squares: The norm of the squares of the numbers.
        norm: Their norm.
    """
    return torch.where(norm > 0, squares / norm.square().clamp_min(torch.finfo(norm.dtype).tiny), 1.0)


def row_norms(tensor: Tensor) -> Tensor:
    """The norm of each row, which is what lies along the last axis."""
    return torch.linalg.vector_norm(torch.nan_to_num(tensor, 0.0, 0.0, 0.0), dim=-1)


def _check_rows(what: str, given: _Wide, slack: float, noise: Tensor | None, *, of_sums: bool) -> None:
    """Compare row by row.

    Args:
        what: For messages.
        given: The result.
        slack: That of its dtype.
        noise: See :func:`worst`.
        of_sums: A row of a weight's gradient is a few inputs times a number for each, which is small where
            others cancel out in it: one number's error is that of the row, and its size that of other rows.
    """
    mine, other, exact, eps = given
    if mine.ndim < 2:
        return
    norms = row_norms(exact)
    off, own = row_norms(mine - exact), row_norms(other - exact)
    few = _few(torch.linalg.vector_norm(exact.square(), dim=-1), norms)
    sizes = norms
    if of_sums:
        few = torch.ones_like(few)
        sizes, own = (torch.maximum(values, values.median()) for values in (norms, own))
    share = slack + _scatter(eps) * few
    allowed = _ROW_FACTOR * ((2 + 2 * few) * own + share * sizes)
    # A row of zeros is as good as sums of others that cancel out.
    empty = norms == 0
    if bool(empty.any()):
        allowed = torch.where(empty, allowed + slack * (norms.sum() / (~empty).sum().clamp_min(1)), allowed)
    if noise is not None:
        allowed = allowed + 4 * noise
    bad = ~(off <= allowed)
    if bool(bad.any()):
        at = int(bad.flatten().nonzero()[0])
        figures = (off, own, norms)
        error, their, norm = (float(values.flatten()[at]) for values in figures)
        norm = norm or 1.0
        raise Rejected(
            f"{what} off by {error / norm:.1e} in row {at}, where the original is off by {their / norm:.1e}"
        )


def _check_past_outliers(what: str, given: _Wide, slack: float) -> None:
    mine, other, exact, eps = given
    sizes = exact.flatten().abs()
    step = max(1, sizes.numel() // _SAMPLE)
    sample = sizes[::step]
    median = sample[sample > 0].median() if bool((sample > 0).any()) else sizes.max()
    common = sizes <= _OUTLIER * median
    if bool(common.all()):
        return
    exact = torch.where(common, exact.flatten(), 0.0)
    norm = torch.linalg.vector_norm(exact)
    offs = (torch.where(common, value.flatten() - exact, 0.0) for value in (mine, other))
    off, own = (torch.linalg.vector_norm(value) for value in offs)
    few = _few(torch.linalg.vector_norm(exact.square()), norm)
    if not bool(off <= _ROW_FACTOR * ((2 + 2 * few) * own + (slack + _scatter(eps) * few) * norm)):
        error, their = float(off / norm), float(own / norm)
        raise Rejected(
            f"{what} off by {error:.1e} past its outliers, where the original is off by {their:.1e}"
        )
