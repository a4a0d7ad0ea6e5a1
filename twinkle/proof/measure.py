"""How far a result is from that of the original in higher precision, and how far it may be.

The whole, each row, and all but the outliers are looked at for themselves: one large number hides any error
elsewhere in the norm of the whole. Where numbers are not finite is compared by position.

A bound is twice the original's own error and a little. Rounding errors scatter: the fewer numbers make up a
norm, the further two of them are apart by chance. A row counts as many numbers as carry its norm.
"""

from __future__ import annotations

import functools
import math
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
_OUTLIER = 100.0
"""Numbers larger than so many times the median are left out in the look past the outliers."""
_SAMPLE = 4096
_PIECE = 1 << 15
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
        if other.numel() == 0:
            continue
        given = _Given(what, *(_real(tensor.detach()) for tensor in (mine, other, reference)))
        allowed = _Allowed(max(SLACK.get(other.dtype, 0.0), slack), torch.finfo(other.dtype).eps)
        norms = _Norms(given)
        if noise is None:
            if norms.is_noise(allowed.eps):
                continue
            largest = max(largest, _check_whole(given, norms, allowed))
            _check_past_outliers(given, norms, allowed)
        if other.ndim > 1:
            rows = None if noise is None else noise[number]
            _check_rows(given, norms, allowed, rows, of_sums=what == "gradient")
    return largest


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class _Given:
    """One result of each.

    Attributes:
        what: ``result`` or ``gradient``.
        mine, other, exact: As they came.
    """

    def __init__(self, what: str, mine: Tensor, other: Tensor, exact: Tensor) -> None:
        self.what = what
        self.mine, self.other = mine, other
        self.exact = exact if exact.dtype == torch.float64 else exact.float()

    @functools.cached_property
    def wide(self) -> _Wide:
        """How far both are off, in higher precision."""
        return _wide(self.what, self.mine, self.other, self.exact)


class _Wide(NamedTuple):
    """How far both are off, and the exact result; zero where it is not compared because it is not finite."""

    off: Tensor
    own: Tensor
    exact: Tensor


class _Allowed(NamedTuple):
    """What a kernel may add to its original's error."""

    slack: float
    eps: float

    def share(self, few: Any) -> Any:
        """The share of a norm, carried by so few numbers as :func:`_few` says."""
        return self.slack + _SCATTER * self.eps * few


_SCATTER = 1.5
"""Spacings of numbers that two roundings of one may be apart, where the original's own is hit by chance."""


def _wide(what: str, mine: Tensor, other: Tensor, exact: Tensor) -> _Wide:
    off, own = mine - exact, other - exact
    if bool((torch.isfinite(off) & torch.isfinite(own)).all()):
        return _Wide(off, own, exact)
    largest = torch.finfo(other.dtype).max
    finite, theirs = torch.isfinite(mine), torch.isfinite(other)
    known = torch.isfinite(exact) & (exact.abs() <= largest)
    # Where one is not finite, the kernel may be the better one; it may not be worse, nor hide what is none.
    same = (mine == other) | ((mine != mine) & (other != other))
    if bool((~finite & ~same & (theirs | known)).any()):
        raise Rejected(f"{what} off by nan or infinity, where the original is finite")
    if bool((finite & ~theirs & ~known).any()):
        raise Rejected(f"{what} is finite where the original's is not")
    compared = finite & known
    off, exact = (torch.where(compared, tensor, 0.0) for tensor in (off, exact))
    return _Wide(off, torch.where(compared & theirs, own, 0.0), exact)


class _Norms:
    """The norms of the rows of a result, and of the whole.

    Attributes:
        rows: Of the exact result, of how far the kernel is off, and of how far the original is.
        whole: The same three for all rows together.
        largest: The largest number of the exact result.
    """

    def __init__(self, given: _Given) -> None:
        made = self._in_pieces(given)
        # Not finite in one number shows here; most results have nothing of the kind.
        if not all(map(math.isfinite, self._sums(made))):
            wide = given.wide
            made = [*(row_norms(tensor) for tensor in (wide.exact, wide.off, wide.own)), wide.exact.abs()]
        self.rows = made[:3]
        *self.whole, self.largest = self._sums(made)
        self._root = math.sqrt(given.exact.numel())
        self._eps = torch.finfo(given.exact.dtype).eps

    @staticmethod
    def _in_pieces(given: _Given) -> list[Tensor]:
        """The norms, piece by piece: on a CPU new memory for whole weights costs more than the arithmetic."""
        shape = given.exact.shape
        width = shape[-1] if shape else 1
        step = max(1, _PIECE // max(width, 1)) if given.exact.device.type == "cpu" else given.exact.numel()
        pieces = [tensor.reshape(-1, width).split(step) for tensor in (given.mine, given.other, given.exact)]
        found: list[list[Tensor]] = [[], [], [], []]
        for mine, other, exact in zip(*pieces, strict=True):
            for norms, tensor in zip(found, (exact, mine - exact, other - exact), strict=False):
                norms.append(torch.linalg.vector_norm(tensor, dim=-1))
            found[3].append(torch.linalg.vector_norm(exact, math.inf, dim=-1))
        return [torch.cat(norms).reshape(shape[:-1]) for norms in found]

    @staticmethod
    def _sums(made: list[Tensor]) -> list[float]:
        sums = [torch.linalg.vector_norm(norms) for norms in made[:3]]
        figures: list[float] = torch.stack([*sums, made[3].max()]).tolist()  # one wait for the device
        return figures

    def is_noise(self, eps: float) -> bool:
        """Whether all are rounding errors of sums that cancel out, as in the gradient of a softmax's sum."""
        norm, off, _ = self.whole
        return bool(0 < norm <= _NOISE * self._root * self._eps and off <= _NOISE * self._root * eps)


def row_norms(tensor: Tensor) -> Tensor:
    """The norm of each row, which is what lies along the last axis."""
    return torch.linalg.vector_norm(tensor, dim=-1) if tensor.ndim else tensor.abs()


def _few(values: Tensor, norms: Tensor, *, rows: bool) -> Tensor:
    """One over the root of how many numbers carry each norm: 1 for a single one, near 0 for many."""
    squares = torch.linalg.vector_norm(values.square(), dim=-1 if rows and values.ndim else None)
    return torch.where(norms > 0, squares / norms.square().clamp_min(torch.finfo(norms.dtype).tiny), 1.0)


def _check_whole(given: _Given, norms: _Norms, allowed: _Allowed) -> tuple[float, float]:
    norm = norms.whole[0]
    error, own = (off / norm if norm > 0 else off for off in norms.whole[1:])
    if not error <= 2 * own + allowed.slack:
        exact = given.wide.exact
        few = float(_few(exact, torch.linalg.vector_norm(exact), rows=False))
        if not error <= (2 + 2 * few) * own + allowed.share(few):
            raise Rejected(f"{given.what} off by {error:.1e}, where the original is off by {own:.1e}")
    return error, own


def _check_rows(given: _Given, norms: _Norms, allowed: _Allowed, noise: Any, *, of_sums: bool) -> None:
    """Compare row by row.

    Args:
        given: The result.
        norms: Its norms.
        allowed: How far it may be off.
        noise: See :func:`worst`.
        of_sums: A row of a weight's gradient is a few inputs times a number for each, which is small where
            others cancel out in it: one number's error is that of the row, and its size that of other rows.
    """
    sizes, off, own = norms.rows
    if bool((off <= _ROW_FACTOR * (2 * own + allowed.slack * sizes)).all()):
        return
    few: Any = 1.0
    if of_sums:
        sizes, own = (torch.maximum(values, values.median()) for values in (sizes, own))
    else:
        few = _few(given.wide.exact, sizes, rows=True)
    bound = _ROW_FACTOR * ((2 + 2 * few) * own + allowed.share(few) * sizes)
    # A row of zeros is as good as sums of others that cancel out.
    empty = sizes == 0
    bound = torch.where(empty, bound + allowed.slack * sizes.sum() / (~empty).sum().clamp_min(1), bound)
    if noise is not None:
        bound = bound + 4 * noise
    bad = ~(off <= bound)
    if bool(bad.any()):
        at = int(bad.flatten().nonzero()[0])
        norm, error, their = (float(values.flatten()[at]) for values in norms.rows)
        norm = norm or 1.0
        raise Rejected(
            f"{given.what} off by {error / norm:.1e} in row {at}, "
            f"where the original is off by {their / norm:.1e}"
        )


def _check_past_outliers(given: _Given, norms: _Norms, allowed: _Allowed) -> None:
    sample = given.exact.flatten()[:: max(1, given.exact.numel() // _SAMPLE)].abs()
    sample = sample[(sample > 0) & torch.isfinite(sample)]
    if sample.numel() == 0 or norms.largest <= (limit := _OUTLIER * float(sample.median())):
        return
    common = given.wide.exact.abs() <= limit
    off, own, exact = (torch.where(common, values, 0.0) for values in given.wide)
    norm, error, their = (torch.linalg.vector_norm(values) for values in (exact, off, own))
    few = _few(exact, norm, rows=False)
    if not bool(error <= _ROW_FACTOR * ((2 + 2 * few) * their + allowed.share(few) * norm)):
        ours, theirs = (f"{float(value / norm):.1e}" for value in (error, their))
        raise Rejected(f"{given.what} off by {ours} past its outliers, where the original is off by {theirs}")
