"""Frames of Python that a compiler is to leave alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from typing import Any

__all__ = ["leave_to_python"]


def leave_to_python(outer: Any = None, within: tuple[Any, ...] = ()) -> None:
    """Mark ``outer`` so that dynamo starts no graph at it, and ``within`` so that it never traces them.

    Other frames that ``outer`` calls are still compiled, and a graph that started before ``outer`` traces
    it: ``torch.compiler.disable`` cannot say that.

    Args:
        outer: A function, or None.
        within: Functions that it calls.
    """
    frames = torch._C._dynamo.eval_frame
    try:
        skip, default = frames._FrameAction.SKIP, frames._FrameAction.DEFAULT
        if outer is not None:
            frames.set_code_exec_strategy(outer.__code__, frames._FrameExecStrategy(skip, default))
        for function in within:
            frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    except AttributeError:
        pass  # torch 2.6: the graph starts at the outer frame, and logits are computed in it
