"""A kernel that launches on the default stream, whichever is the current one, is caught."""

from __future__ import annotations

import pytest
import torch

from twinkle.proof.compare import compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def original(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def on_the_default_stream(x: torch.Tensor) -> torch.Tensor:
    with torch.cuda.stream(torch.cuda.default_stream()):
        return x * 2 + 1


def by_hand(x: torch.Tensor) -> torch.Tensor:
    return torch.add(x.mul(2), 1)


def test_the_current_stream_is_heeded() -> None:
    x = torch.randn(64, 256, device="cuda")
    assert compare(original, by_hand, (x,), {}, backward=True).ok
    verdict = compare(original, on_the_default_stream, (x,), {}, backward=True)
    assert not verdict.ok
    assert "on another stream" in verdict.text
