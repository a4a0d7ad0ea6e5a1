"""Whether a backward is recorded that is replayed once for each replay of its forward."""

from __future__ import annotations

import torch

from twinkle.runtime import runtime

__all__ = ["Recorded", "is_recorded_once"]


class Recorded:
    """Of this process.

    Attributes:
        backward: A backward is recorded now, with its graph kept for those that cannot be replayed.
    """

    def __init__(self) -> None:
        self.backward = False


def is_recorded_once() -> bool:
    """Whether what this thread launches is recorded as such a backward: it may use up what forward kept."""
    if not runtime.of(Recorded).backward:
        return False
    return torch.cuda.is_initialized() and bool(torch._C._cuda_isCurrentStreamCapturing())
