"""Kernels run at every size in what is replayed, and wherever its numbers are computed in another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from twinkle.capture import block as the_module
from twinkle.capture import recording
from twinkle.capture.surroundings import every_size_on
from twinkle.ops.plain import at_every_size, pays

from .emulated import put_in
from .nets import Block

SEEN: list[bool] = []


class Asking(Block):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(pays(x, 1 << 40))
        return super().forward(x)


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A block that is captured as on a GPU."""
    SEEN.clear()
    for module in (the_module, recording):
        monkeypatch.setattr(module, "every_size_on", lambda device: at_every_size())
    made = Asking()
    put_in([made])
    return made


def test_on_a_gpu_alone() -> None:
    for device, expected in (("cuda", True), ("cpu", False)):
        with every_size_on(torch.device(device)):
            assert pays(torch.ones(1), 1 << 40) is expected
    assert not pays(torch.ones(1), 1 << 40)


def test_before_while_and_beside_what_is_recorded(block: Any) -> None:
    x = torch.randn(2, 5, 8)
    for _ in range(4):
        block(x).sum().backward()
    waiting = block(x)
    block(x * 2).sum().backward()  # runs as it is: the forward before waits for its backward
    waiting.sum().backward(retain_graph=True)
    waiting.sum().backward()  # calls the block once more
    assert len(SEEN) >= 2 + 1 + 1 + 1
    assert all(SEEN)


def test_not_in_calls_that_are_left_alone(block: Any) -> None:
    x = torch.randn(2, 5, 8)
    block._compiled_call_impl._stack.kinds.clear()
    handle = block.up.register_forward_hook(lambda *given: None)
    for _ in range(4):
        block(x).sum().backward()
    handle.remove()
    assert SEEN[-1] is False
    assert SEEN[:2] == [True, True], "when that was not known yet"
