"""Answers that are kept for a kind of call, and the times at which they are asked for again."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from twinkle.ops import launch
from twinkle.ops.plans import Settled


class Question:
    """Counts how often it is asked; the answer is that number."""

    def __init__(self) -> None:
        self.asked = 0
        self.settled = Settled(self.answer, "(Tensor x, Tensor? w, object kind, int[]? shape) -> ")

    def answer(self, x, w, kind, shape) -> int:
        self.asked += 1
        return self.asked

    def __call__(self, x, w=None, kind=None, shape=None) -> int:
        return self.settled.call(x, w, kind, shape)


class Own(torch.Tensor):
    pass


def test_an_answer_is_kept_for_a_kind():
    ask, w = Question(), torch.ones(8)
    for _ in range(3):
        assert ask(torch.randn(4, 8)) == 1
        assert ask(torch.randn(4, 8), w) == 2
        assert ask(torch.randn(4, 8), w, "a") == 3
        assert ask(torch.randn(4, 8), w, "a", [8]) == 4
        assert ask(torch.randn(4, 8), w, "a", (8,)) == 4
        assert ask(torch.randn(8, 4).t(), w, "a", (8,)) == 5
        assert ask(torch.randn(4, 8).half(), w, "a", (8,)) == 6


def test_objects_are_told_apart_by_themselves_and_not_by_their_place_in_memory():
    ask, x = Question(), torch.randn(4, 8)
    answers = [ask(x, kind=[i]) for i in range(50)]  # each may lie where the last one did
    assert answers == [*range(1, 51)]


@pytest.mark.parametrize("way", ["mode", "transform", "trace", "subclass", "nested"])
def test_it_is_asked_again(way):
    ask, x = Question(), torch.randn(4, 8)
    if way == "mode":

        class Idle(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        with Idle():
            assert [ask(x), ask(x)] == [1, 2]
    elif way == "transform":
        found = []
        torch.func.vmap(lambda row: found.extend([ask(row), ask(row)]) or row)(x)
        assert found == [1, 2]
    elif way == "trace":
        found = []
        torch.jit.trace(lambda y: found.extend([ask(y), ask(y)]) or y + 1, x, check_trace=False)
        assert found == [1, 2]
    elif way == "subclass":
        own = x.as_subclass(Own)
        assert [ask(own), ask(own)] == [1, 2]
    else:
        nested = torch.nested.nested_tensor([x, x[:2]])
        assert [ask(nested), ask(nested)] == [1, 2]
    assert ask(x) == ask(x) == 3


def test_autocast_and_the_devices_of_triton_are_part_of_the_kind(monkeypatch):
    ask, x = Question(), torch.randn(4, 8)
    assert ask(x) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert ask(x) == ask(x) == 2
    assert ask(x) == 1
    monkeypatch.setattr(launch, "DEVICE_TYPES", frozenset({"elsewhere"}))
    assert ask(x) == ask(x) == 3


def test_under_a_compiler_it_is_asked_each_time():
    ask = Question()

    def program(x):
        ask(x)
        return x + 1

    x = torch.randn(4, 8)
    ask(x)
    compiled = torch.compile(program, backend="eager", fullgraph=True)
    compiled(x)
    assert ask.asked > 1


def test_the_latest_kinds_are_kept():
    ask, x, kinds = Question(), torch.randn(1, 1), [object() for _ in range(600)]
    for kind in kinds:
        ask(x, kind=kind)
    assert ask(x, kind=kinds[-1]) == 600
    assert ask(x, kind=kinds[0]) == 601
