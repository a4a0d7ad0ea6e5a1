"""Labels are counted on the GPU, and waited for, only where those before were worth it."""

from __future__ import annotations

import pytest
import torch

from twinkle.deferred import forward, head
from twinkle.deferred.head import LabelCount, LabelCounts

VOCAB = 10


class Counted(LabelCount):
    """A count without a device."""

    made: int = 0
    waited: int = 0

    def __init__(self, labels: torch.Tensor, ignore_index: int = -100, *, copies: bool = True) -> None:
        type(self).made += 1
        self.size, self.ignore_index, self.known = labels.numel(), ignore_index, None
        self.count = int((labels != ignore_index).sum())

    def number(self) -> int:
        if self.known is None:
            type(self).waited += 1
            self.known = self.count
        return self.known


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> LabelCounts:
    """Counts that are worth it where ten labels of a hundred do not count."""
    monkeypatch.setattr(head, "LabelCount", Counted)
    Counted.made = Counted.waited = 0
    return LabelCounts(10 * VOCAB)


def labels(ignored: int) -> torch.Tensor:
    return torch.arange(100).masked_fill(torch.arange(100) < ignored, -100)


def waits(counts: LabelCounts, ignored: int) -> bool:
    """Whether a call is given a count to wait for."""
    count = counts.of(labels(ignored), VOCAB, -100, copies=True)
    if count is not None:
        count.number()
    return count is not None


def test_labels_that_nearly_all_count_are_waited_for_twice(counts: LabelCounts) -> None:
    assert [waits(counts, 9) for _ in range(7)] == [True, True, *[False] * 5]
    assert (Counted.made, Counted.waited) == (2, 2)


def test_what_is_worth_it_is_waited_for_each_time(counts: LabelCounts) -> None:
    assert all(waits(counts, 10) for _ in range(20))
    assert (Counted.made, Counted.waited) == (20, 20)


def test_one_in_vain_among_others_changes_nothing(counts: LabelCounts) -> None:
    assert all(waits(counts, 50 * (n % 2)) for n in range(20))


def test_they_are_looked_at_now_and_then_in_case_they_have_changed(counts: LabelCounts) -> None:
    assert [waits(counts, 0) for _ in range(7)][-1] is False
    found = [waits(counts, 50) for _ in range(12)]
    assert found == [False, *[True] * 11], "the eighth call was counted, the ninth knows"


def test_nothing_is_waited_for_while_the_device_records(
    counts: LabelCounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts.of(labels(0), VOCAB, -100, copies=True)  # whose number nobody asked for
    monkeypatch.setattr(head, "is_capturing", lambda: True)
    assert counts.will_wait()
    assert Counted.waited == 0
    monkeypatch.setattr(head, "is_capturing", lambda: False)
    assert waits(counts, 0)
    assert not counts.will_wait()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_counts_reach_the_host() -> None:
    counts = LabelCounts(forward.LEAST_COUNTED)
    count = counts.of(labels(30).cuda(), VOCAB, -100, copies=True)
    assert count is not None
    assert count.bound(labels(30).cuda(), -100) == 70
