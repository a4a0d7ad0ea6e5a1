"""Sizes: the ways that pay for large inputs, and what lets small ones take them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch

from twinkle.ops import machine
from twinkle.ops.plain import CHUNK, at_every_size, chunk_rows, pays
from twinkle.ops.rms_norm import cpu_backend
from twinkle.ops.rms_norm.reference import VARIANTS
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable

LLAMA = next(variant for variant in VARIANTS if variant.name == "llama")


@pytest.fixture
def all_sizes(clean_registry: object) -> None:
    """The setting ``sizes = "all"``."""
    runtime.options.sizes = "all"


def of_a_thread(answer: Callable[[], bool]) -> bool:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(answer()))
    thread.start()
    thread.join()
    return found[0]


def test_a_small_tensor_pays_at_every_size() -> None:
    small, empty = torch.ones(4), torch.ones(0)
    assert not pays(small, 5)
    assert pays(small, 4)
    with at_every_size():
        assert pays(small, 5)
        assert not pays(empty, 1)
        assert not of_a_thread(lambda: pays(small, 5))
    assert not pays(small, 5)


def test_the_setting_holds_for_every_thread(all_sizes: None) -> None:
    assert pays(torch.ones(4), 5)
    assert not pays(torch.ones(0), 1)
    assert of_a_thread(lambda: pays(torch.ones(4), 5))
    with at_every_size():
        pass
    assert pays(torch.ones(4), 5)
    runtime.options.sizes = "auto"
    assert not pays(torch.ones(4), 5)


def test_a_compiler_sees_the_setting(all_sizes: None) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if pays(x, 100) else x - 1

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
    runtime.options.sizes = "auto"
    assert compiled(torch.ones(2)).tolist() == [0.0, 0.0]


def test_small_inputs_have_several_chunks_and_large_ones_keep_theirs(
    all_sizes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "one_thread", lambda: True)
    assert [chunk_rows(rows, 8) for rows in (1, 2, 5, 10)] == [1, 1, 2, 4]
    assert chunk_rows(1000, CHUNK // 4) == 4
    runtime.options.sizes = "auto"
    assert chunk_rows(10, 8) == 10


@pytest.mark.parametrize(("sizes", "runs"), [("all", True), ("auto", False)])
def test_a_kernel_runs_on_a_few_elements(clean_registry: object, sizes: str, runs: bool) -> None:
    runtime.options.sizes = sizes
    x, weight = torch.ones(2, 8, requires_grad=True), torch.ones(8)
    made = cpu_backend.rms_norm(x, weight, 1e-6, variant=LLAMA)
    assert made.grad_fn is not None
    assert ("RMSNorm" in made.grad_fn.name()) is runs
