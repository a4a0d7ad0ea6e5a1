"""What a replay costs the host: calls of Python and C functions, which count the same on every machine."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

from twinkle.capture.block import BlockCall
from twinkle.capture.kinds import Stack
from twinkle.capture.pool import Pool
from twinkle.capture.state import StackRecord

from .emulated import EmulatedGraphs
from .test_models import built

if TYPE_CHECKING:
    from collections.abc import Callable


class Still(EmulatedGraphs):
    """Replays nothing: what is left is what a replay takes of the host."""

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        _, first = super().record(run)
        return int, first

    def random(self) -> Any:
        return 0


def counted(work: Callable[[], object]) -> Counter[str]:
    calls: Counter[str] = Counter()

    def note(frame: Any, event: str, _: object) -> None:
        if event in ("call", "c_call"):
            calls[event] += 1

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize(("mode", "python", "c"), [("eval", 41, 76), ("train", 85, 114)])
def test_a_replay(mode: str, python: int, c: int) -> None:
    _, model, _ = built("Llama")
    blocks = [copy.deepcopy(model.model.layers[0]) for _ in range(4)]
    stack = Stack(StackRecord("Llama", "layers", "Block", 4), Pool(torch.device("cpu"), 1 << 40, Still))
    for block in blocks:
        block._compiled_call_impl = BlockCall(block, stack)
        block.train(mode == "train")
    x = torch.randn(2, 12, 32, requires_grad=mode == "train")
    angles = torch.randn(1, 12, 8)
    mask = torch.zeros(2, 1, 12, 12)

    def step() -> None:
        with torch.set_grad_enabled(mode == "train"):
            out = x
            for block in blocks:
                out = block(out, attention_mask=mask, position_embeddings=(angles, angles))
            if mode == "train":
                out.sum().backward()

    for _ in range(5):
        step()
        for block in blocks:
            block.zero_grad()
    assert stack.record.replays == 3 * 4
    calls = counted(step)
    assert stack.record.replays == 4 * 4
    assert calls["call"] <= 4 * python
    assert calls["c_call"] <= 4 * c
