"""Caches that are empty, while something is recorded: what they are given they keep, and copy nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from twinkle.capture.caches import without_copies
from twinkle.capture.surroundings import as_if_run

from .emulated import EmulatedGraphs, put_in
from .nets import Block

cache_utils = pytest.importorskip("transformers.cache_utils")


def states(contiguous: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.arange(24.0).view(1, 2, 3, 4)
    keys = made if contiguous else made.transpose(1, 2)
    return keys, keys + 24


def test_the_first_states_are_kept_where_they_lie() -> None:
    keys, values = states()
    with as_if_run():
        layer = cache_utils.DynamicLayer()
        assert layer.update(keys, values)[0] is keys
        assert layer.keys is keys
        assert layer.values is values
        assert (layer.dtype, layer.device, layer.is_initialized) == (keys.dtype, keys.device, True)
        more = layer.update(keys[..., :1, :], values[..., :1, :])
    assert torch.equal(more[0], torch.cat([keys, keys[..., :1, :]], -2))
    assert torch.equal(layer.values, torch.cat([values, values[..., :1, :]], -2))
    other = cache_utils.DynamicLayer()
    assert other.update(keys, values)[0] is not keys, "elsewhere they are copied, as ever"


def test_what_is_not_contiguous_is_copied() -> None:
    keys, values = states(contiguous=False)
    with as_if_run():
        found = cache_utils.DynamicLayer().update(keys, values)
    expected = cache_utils.DynamicLayer().update(keys, values)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def test_a_tensor_that_is_both_is_copied() -> None:
    keys, _ = states()
    with as_if_run():
        found = cache_utils.DynamicLayer().update(keys, keys)
    assert found[0] is not keys
    assert found[0] is not found[1]


def test_layers_that_do_more_are_left_alone() -> None:
    class Counting(cache_utils.DynamicLayer):  # type: ignore[name-defined]
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            self.count = 1
            return super().update(key_states, value_states, *args, **kwargs)

    assert without_copies(Counting) is None
    keys, values = states()
    with as_if_run():
        layer = cache_utils.DynamicSlidingWindowLayer(2)
        found = layer.update(keys, values)
    assert torch.equal(found[0], keys)
    assert torch.equal(layer.keys, keys[..., -1:, :])


@pytest.mark.parametrize("share", [64, 65])
def test_results_may_have_a_part_of_the_device(monkeypatch: pytest.MonkeyPatch, share: int) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    monkeypatch.setattr(EmulatedGraphs, "memory", x.nbytes * 64 * 64 // share)
    torch.manual_seed(0)
    plain = Block()
    ours = copy.deepcopy(plain)
    stack = put_in([ours])
    monkeypatch.setattr(EmulatedGraphs, "held", lambda self: 0)
    for _ in range(4):
        assert torch.equal(ours(x), plain(x))
    assert stack.record.replays == (2 if share == 64 else 0), stack.record.calls
    assert ("its results are too large to be copied" in stack.record.calls) is (share == 65)
