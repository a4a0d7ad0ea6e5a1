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

    from twinkle.ops.experts.reference import ExpertsVariant

__all__ = ["layer_class", "supports"]


def supports(
    variant: ExpertsVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why a variant or an instance is left alone, or None: as on a GPU, but for ``grouped_mm``."""
    if facts is not None and facts.get("implementation") == "grouped_mm":
        return "its own grouped_mm spends its time in the same products on the CPU"
    return layer.supports(variant, device, facts)
