"""Mixture of experts on the CPU in plain torch: the same op, its products slice by slice.

A loop over experts in autograd makes a gradient as large as all experts for each of them: at 32 experts of
512 x 256, top 4 of 512 tokens, on one busy core, its backward took 2924 ms and this one 197 ms in one run of
``benchmarks/experts.py --device cpu``; transformers' ``grouped_mm`` took 200 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twinkle.ops.experts import layer
from twinkle.ops.experts.layer import layer_class

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from twinkle.ops.experts.reference import ExpertsForm

__all__ = ["covers", "declines", "layer_class"]


def covers(form: ExpertsForm) -> bool:
    """As on a GPU."""
    return layer.covers(form)


def declines(facts: Mapping[str, Any]) -> str | None:
    """Why an instance is left alone, or None: see ``layer.declines``."""
    if facts.get("implementation") == "grouped_mm":
        return "its own grouped_mm spends its time in the same products on the CPU"
    return layer.declines(facts)
