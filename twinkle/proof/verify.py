"""Every embedded kernel against its definition, on this machine: what ``twinkle verify`` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from twinkle.ops import launch
from twinkle.ops.backends import Backend, backend_for
from twinkle.ops.cases import cases, sampled_ops, variants
from twinkle.proof.cache import proofs
from twinkle.proof.cache_key import cache_key
from twinkle.proof.compare import Verdict, compare

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["DTYPES", "Part", "Row", "devices", "parts", "rerun"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        device: ``cpu`` or ``cuda:0``.
        op, variant: What was compared.
        how: What computes it: triton or plain torch.
        dtype: Of the inputs.
        shape: What is special about the inputs.
        verdict: What came out.
    """

    device: str
    op: str
    variant: str
    how: str
    dtype: str
    shape: str
    verdict: Verdict


@dataclass(frozen=True)
class Part:
    """What is compared, and kept, together: one variant in one dtype on one device, in several shapes.

    Attributes:
        device: Where.
        op: The name of the op.
        variant: One of its variants.
        backend: What computes it.
        dtype: A name out of `DTYPES`.
    """

    device: torch.device
    op: str
    variant: Any
    backend: Backend
    dtype: str


@dataclass(frozen=True)
class _Source:
    op: str
    variant: Any
    facts: Mapping[str, Any]
    backend: str


def devices() -> list[torch.device]:
    """The CPU, and every GPU that triton serves."""
    found = [torch.device("cpu")]
    if "cuda" in launch.DEVICE_TYPES and torch.cuda.is_available():
        found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return found


def parts(
    on: Iterable[torch.device], *, ops: Iterable[str] | None = None, dtypes: Iterable[str] = tuple(DTYPES)
) -> list[Part]:
    """All that there is to compare, in order; nothing is compared yet.

    Args:
        on: Devices.
        ops: Names of ops; all by default.
        dtypes: Names out of `DTYPES`.
    """
    chosen, names = sampled_ops() if ops is None else tuple(ops), tuple(dtypes)
    return [
        Part(device, op, variant, backend, dtype)
        for device in on
        for op in chosen
        for variant in variants(op)
        if (backend := backend_for(op, variant, device.type)) is not None
        for dtype in names
        if not skipped(device, dtype)
    ]


def rerun(part: Part, *, seed: int = 0) -> Iterator[Row]:
    """Compare a kernel in each shape, forward and backward.

    The verdicts are kept where those of first calls are, also those there are when it ends before its time.

    Args:
        part: Variant, dtype and device.
        seed: Of the inputs.
    """
    made: list[tuple[Mapping[str, Any], Verdict]] = []
    try:
        for row, asked in _compared(part, seed):
            if asked is not None:
                made.append((asked, row.verdict))
            yield row
    finally:
        proofs().keep_all(made)


def skipped(device: torch.device, dtype: str) -> str | None:
    """Why a dtype says nothing on a device, or None."""
    if device.type == "cpu" and "cpu" in launch.DEVICE_TYPES and dtype == "bfloat16":
        return "triton's interpreter truncates to bfloat16 where devices round"
    return None


def _compared(part: Part, seed: int) -> Iterator[tuple[Row, dict[str, Any] | None]]:
    device, op, variant, backend = part.device, part.op, part.variant, part.backend
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for case in cases(op, variant, DTYPES[part.dtype], device, backend.name):
            verdict = compare(case.original, case.kernel, case.args, {}, module=case.module, backward=True)
            source: Any = _Source(op, variant, case.facts, backend.name)
            asked = cache_key(source, case.args, {}, module=case.module, backward=True)
            yield Row(str(device), op, variant.name, backend.label, part.dtype, case.shape, verdict), asked
