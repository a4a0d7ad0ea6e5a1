"""On a CPU logits are deferred from the number on at which that is not slower."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinkle.deferred import forward
from twinkle.deferred.install import install
from twinkle.deferred.logits import DeferredLogits
from twinkle.ops.plain import at_every_size

VOCAB = 1024


@pytest.fixture(autouse=True)
def every_loss_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are what counts here: the proof of the loss, which follows the weights, is not asked."""
    monkeypatch.setattr(forward, "loss_verified", lambda *_, **__: True)


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, width), nn.Linear(width, VOCAB)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> tuple[Any, Tensor]:
        logits = self.head(self.embedding(tokens))
        return None if labels is None else F.cross_entropy(logits[0], labels[0]), logits


def is_deferred(rows: int, dtype: torch.dtype = torch.float32, width: int = 4) -> bool:
    model = Model(width).to(dtype)
    assert not isinstance(install(model), str)
    tokens = torch.zeros(1, rows, dtype=torch.int64)
    return isinstance(model(tokens, tokens)[1], DeferredLogits)


@pytest.mark.parametrize(("rows", "deferred"), [(4095, False), (4096, True)])
def test_float32(rows: int, deferred: bool) -> None:
    assert is_deferred(rows) is deferred


@pytest.mark.parametrize(("rows", "deferred"), [(8191, False), (8192, True)])
def test_fewer_rows_than_the_hidden_states_are_wide_do_not_pay_for_a_copy_of_the_weight(
    rows: int, deferred: bool
) -> None:
    assert is_deferred(rows, width=8192) is deferred


@pytest.mark.parametrize(("rows", "deferred"), [(63, False), (64, True)])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast: bool, rows: int, deferred: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        assert is_deferred(rows, torch.float32 if autocast else torch.bfloat16) is deferred


def test_few_are_deferred_where_every_size_is_to_go_one_way() -> None:
    with at_every_size():
        assert is_deferred(2)
