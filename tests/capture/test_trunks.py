"""The module that calls the blocks is recorded with all of them, or they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from twinkle.capture.stacks import stacks_of

from .emulated import put_in
from .test_models import FAMILIES, built, trained

transformers = pytest.importorskip("transformers")


def with_trunks(family: str) -> tuple[Any, Any, list[Any], list[Any]]:
    """A plain model, the same with captured trunks, the stacks of these and those of the blocks in them."""
    plain, ours, blocks = built(family)
    trunks = {id(stack.trunk[1]): stack.trunk[1] for stack in stacks_of(ours) if stack.trunk is not None}
    return plain, ours, [put_in([one], is_trunk=True) for one in trunks.values()], blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_training(family: str) -> None:
    plain, ours, trunks, blocks = with_trunks(family)
    for mine, theirs in zip(trained(ours), trained(plain), strict=True):
        torch.testing.assert_close(mine, theirs)
    for stack in trunks:
        print(stack.record.model, stack.record.calls, stack.record.replays)
    assert [stack.record.replays for stack in trunks] == [2] * len(trunks)
    assert sum(stack.record.replays for stack in blocks) == 0
