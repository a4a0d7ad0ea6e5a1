"""What lies channels first in memory, and how many rows a batch of it has."""

from __future__ import annotations

import pytest
import torch

from twinkle.ops.layout import channels_first

CASES = {
    "tokens of a convolution": (lambda: torch.empty(2, 5, 7).transpose(1, 2), 7),
    "pixels": (lambda: torch.empty(2, 5, 3, 4).permute(0, 2, 3, 1), 12),
    "a matrix": (lambda: torch.empty(5, 7).t(), 7),
    "one batch": (lambda: torch.empty(1, 5, 7).transpose(1, 2), 7),
    "dimensions of one": (lambda: torch.empty(1, 1, 5, 7).permute(0, 1, 3, 2), 7),
    "batches of batches": (lambda: torch.empty(2, 3, 5, 7).permute(0, 1, 3, 2), 7),
    "contiguous": (lambda: torch.empty(2, 5, 7), None),
    "rows in another order": (lambda: torch.empty(5, 2, 7).transpose(0, 1), None),
    "batches in another order": (lambda: torch.empty(3, 2, 5, 7).permute(1, 0, 3, 2), None),
    "pixels in another order": (lambda: torch.empty(2, 5, 3, 4).permute(0, 3, 2, 1), None),
    "one row": (lambda: torch.empty(2, 5, 1).transpose(1, 2), None),
    "one channel": (lambda: torch.empty(2, 1, 7).transpose(1, 2), None),
    "rows with gaps": (lambda: torch.empty(2, 5, 7)[:, :, :6].transpose(1, 2), None),
    "batches with gaps": (lambda: torch.empty(2, 6, 7)[:, :5].transpose(1, 2), None),
    "one row for all": (lambda: torch.empty(7).expand(3, 7), None),
    "one number a row": (lambda: torch.empty(3, 1).expand(3, 7), None),
    "one number for all": (lambda: torch.empty(1, 1).expand(3, 7), None),
    "empty": (lambda: torch.empty(0, 5, 7).transpose(1, 2), None),
    "a vector": (lambda: torch.empty(14)[::2], None),
    "a scalar": (lambda: torch.empty(()), None),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_batch(name):
    make, rows = CASES[name]
    tensor = make()
    assert channels_first(tensor) == rows
    if rows is not None:
        flat = tensor.as_strided((tensor.numel(),), (1,))
        flat.copy_(torch.arange(tensor.numel()))
        width = tensor.shape[-1]
        as_batches = flat.view(-1, width, rows).transpose(1, 2)
        assert torch.equal(tensor.reshape(-1, width), as_batches.reshape(-1, width))
