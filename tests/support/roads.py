"""Runs of a small model with deferred logits and without them, which are to give the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from causal_models import causal_model, deferring, tokens_and_labels
from rounding import rounding_bound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["BATCH", "FAMILIES", "IDS", "NEXT", "VOCAB", "both", "deferred_and_plain", "gradients", "rows"]

VOCAB = 48
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # its head has a bias
}
BATCH = tokens_and_labels(VOCAB, tokens=7, ignored=2)
IDS = BATCH["input_ids"]
NEXT = IDS[:, 1:].reshape(-1)
# Products over 8 to 48 terms, there and back, and once more for a second derivative.
_SAME = 2 * rounding_bound(torch.float32, 2000)


def deferred_and_plain(family: str = "llama") -> tuple[Any, Any]:
    """Two models with the same weights, of which the first defers."""
    plain, other = (
        causal_model(family, vocab_size=VOCAB, num_key_value_heads=2, **FAMILIES[family]) for _ in range(2)
    )
    return deferring(other), plain


def rows(output: Any) -> Tensor:
    """The logits that :data:`NEXT` are the labels of, ``[rows, vocab]``."""
    found: Tensor = output.logits[:, :-1].reshape(-1, VOCAB)
    return found


def gradients(model: Any) -> list[Tensor]:
    """Those of all parameters that have one."""
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def both(run: Callable[[Any], Sequence[Tensor]], family: str = "llama") -> None:
    """Assert that what a run gives with deferred logits is what it gives without them."""
    found, expected = map(run, deferred_and_plain(family))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        off = (one.detach().double() - other.detach().double()).norm() / other.detach().double().norm()
        assert off < _SAME, f"off by {off}"
