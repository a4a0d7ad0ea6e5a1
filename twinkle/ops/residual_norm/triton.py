"""Residual add and RMSNorm in one pass each way: the kernels of `twinkle.ops.rms_norm.triton` with an addend.

Bytes a row of ``n`` elements: forward reads two and writes two, backward reads three and writes one.
The gradient of both addends is one tensor (two, with a scale).
"""

from __future__ import annotations

from twinkle.ops.rms_norm.triton import backward, forward

__all__ = ["backward", "forward"]
