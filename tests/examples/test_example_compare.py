"""The arithmetic and the words of ``compare.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType


def run(
    speed: float, losses: list[float], memory: float | None = 100.0, dtype: str = "float32"
) -> dict[str, Any]:
    return {
        "tokens_per_second": speed,
        "processor_seconds": 3 / speed,
        "losses": losses,
        "peak_memory_mb": memory,
        "options": {"dtype": dtype},
    }


def binding(state: str = "active") -> dict[str, Any]:
    return {
        "state": state,
        "target": "m:C",
        "kernel": "K",
        "instances": 2,
        "reason": "" if state == "active" else "why",
    }


def test_the_ratio_is_the_median_of_the_pairs_not_of_the_speeds(compare: ModuleType) -> None:
    pairs = [
        (run(100, [1.0]), run(150, [1.0])),
        (run(10, [1.0]), run(20, [1.0])),
        (run(50, [1.0]), run(55, [1.0])),
    ]
    summary = compare.summarise(pairs)
    assert summary["ratio"] == 1.5
    assert summary["ratio_range"] == (1.1, 2.0)
    assert (summary["plain"], summary["patched"]) == (50, 55)


def test_the_difference_is_the_largest_of_all_steps_and_pairs(compare: ModuleType) -> None:
    pairs = [(run(1, [3.0, 2.0]), run(1, [3.0, 2.5])), (run(1, [3.0, 2.0]), run(1, [2.0, 2.0]))]
    assert compare.summarise(pairs)["difference"] == 1.0


def test_runs_of_different_length_are_not_compared(compare: ModuleType) -> None:
    with pytest.raises(ValueError, match="2 and 1 steps"):
        compare.largest_difference([1.0, 2.0], [1.0])


def test_the_processor_ratio_is_plain_over_patched(compare: ModuleType) -> None:
    assert compare.summarise([(run(2, [1.0]), run(3, [1.0]))])["processor_ratio"] == pytest.approx(1.5)


def test_memory_is_left_out_where_nobody_counted_it(compare: ModuleType) -> None:
    assert compare.summarise([(run(1, [1.0], None), run(1, [1.0], None))])["memory_ratio"] is None


def test_memory_ratio(compare: ModuleType) -> None:
    assert compare.summarise([(run(1, [1.0], 200.0), run(1, [1.0], 150.0))])["memory_ratio"] == 0.75


@pytest.mark.parametrize(
    ("apart", "dtype", "state", "good"),
    [
        (0.0, "float32", "active", True),
        (0.01, "float32", "active", False),
        (0.01, "bfloat16", "active", True),
        (0.0, "float32", "failed", False),
        (float("nan"), "float32", "active", False),
    ],
)
def test_the_verdict_needs_equal_losses_and_active_bindings(
    compare: ModuleType, apart: float, dtype: str, state: str, good: bool
) -> None:
    pairs = [(run(1, [1.0], dtype=dtype), run(1, [1.0 + apart], dtype=dtype))]
    assert compare.show(compare.summarise(pairs), pairs, {"bindings": [binding(state)]}) is good


def test_no_binding_is_no_success(compare: ModuleType) -> None:
    pairs = [(run(1, [1.0]), run(1, [1.0]))]
    assert compare.show(compare.summarise(pairs), pairs, {"bindings": []}) is False


def test_the_reason_of_a_binding_is_shown(compare: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [(run(1, [1.0]), run(1, [1.0]))]
    compare.show(compare.summarise(pairs), pairs, {"bindings": [binding("skipped")]})
    assert "skipped" in capsys.readouterr().out.splitlines()[-1]


def test_plain_runs_get_no_variable_of_ours(compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_CONFIG", "somewhere.toml")
    monkeypatch.setenv("TWINKLE_STRICT", "1")
    assert not [name for name in compare.plain_environment() if name.startswith("TWINKLE_")]
