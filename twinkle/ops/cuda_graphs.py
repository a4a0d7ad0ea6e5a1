"""Whether a CUDA graph is captured, and what for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.runtime import runtime

if TYPE_CHECKING:
    from typing import Any

__all__ = ["STANDS_FOR", "Recorded", "is_capturing", "is_recorded_once", "stood_for"]

STANDS_FOR = "_twinkle_stands_for"
"""The attribute of a function that is in the place of another while something is captured: that other one."""


class Recorded:
    """What Twinkle captures in this process now.

    Attributes:
        backward: A backward, with its graph kept for those that cannot be replayed.
    """

    def __init__(self) -> None:
        self.backward = False


def is_capturing() -> bool:
    """Whether what is launched in this thread goes into a CUDA graph.

    ``torch.cuda.is_current_stream_capturing`` is not asked: where Twinkle captures layers it says what it
    would say without that.
    """
    return torch.cuda.is_initialized() and bool(torch._C._cuda_isCurrentStreamCapturing())


def is_recorded_once() -> bool:
    """Whether this thread captures a backward that uses up its forward: each is replayed once."""
    return runtime.of(Recorded).backward and is_capturing()


def stood_for(function: Any) -> Any:
    """The function that one stands for while Twinkle captures something; the same one elsewhere.

    Args:
        function: What stands at a name of torch or transformers.
    """
    while (theirs := getattr(function, STANDS_FOR, None)) is not None:
        function = theirs
    return function
