"""The first read of a class's ``forward`` tells who waits; until then nobody sees what stands there."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
import torch._dynamo.callback

from twinkle.hooks.first_use import first_uses, standing, watch_first_use

pytestmark = pytest.mark.usefixtures("clean_hooks")


class Thing:
    def forward(self, x: int, *, by: int = 2) -> int:
        """Doubled."""
        return x * by


def made() -> tuple[Any, Any]:
    """A class and the function that it has."""

    class Made:
        def forward(self, x: int, *, by: int = 2) -> int:
            """Doubled."""
            return x * by

    return Made, vars(Made)["forward"]


def _below(cls: Any) -> Any:
    class Below(cls):  # type: ignore[misc]
        def forward(self, x: int) -> Any:
            return super().forward(x)

    return Below


READS = {
    "a call": lambda cls: cls().forward(3),
    "the class": lambda cls: cls.forward,
    "its signature": lambda cls: inspect.signature(cls.forward),
    "its members": lambda cls: inspect.getmembers(cls),
    "hasattr": lambda cls: hasattr(cls(), "forward"),
    "super": lambda cls: _below(cls)().forward(3),
    "a bound method": lambda cls: copy.copy(cls()).forward,
}


@pytest.mark.parametrize("read", READS)
def test_a_read_tells_once_and_puts_the_function_back(read: str) -> None:
    cls, function = made()
    told: list[type] = []
    assert watch_first_use(cls, told.append)
    assert told == []
    READS[read](cls)
    READS[read](cls)
    assert told == [cls]
    assert vars(cls)["forward"] is function


def test_the_reader_gets_what_the_callback_put_there() -> None:
    cls, _ = made()
    watch_first_use(cls, lambda it: setattr(it, "forward", lambda self, x: x + 100))
    assert cls().forward(3) == 103


def test_what_stands_there_can_be_asked_for_without_a_read() -> None:
    cls, function = made()
    told: list[type] = []
    watch_first_use(cls, told.append)
    assert standing(cls) is function
    assert standing(type("Below", (cls,), {})) is function
    assert told == []


def test_a_class_that_inherits_its_forward_is_told_of_beside_the_one_that_has_it() -> None:
    cls, function = made()
    below = type("Below", (cls,), {})
    told: list[type] = []
    watch_first_use(below, told.append)
    watch_first_use(cls, told.append)
    assert below().forward(2) == 4
    assert told == [below, cls]
    assert vars(cls)["forward"] is function
    assert "forward" not in vars(below)


def test_what_the_program_sets_stays_and_nobody_is_told() -> None:
    cls, _ = made()
    told: list[type] = []
    watch_first_use(cls, told.append)
    cls.forward = lambda self, x: x - 1
    assert cls().forward(3) == 2
    assert told == []
    first_uses().close()
    assert cls().forward(3) == 2


def test_a_callback_that_raises_is_a_warning_and_the_call_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    cls, _ = made()

    def broken(it: type) -> None:
        raise RuntimeError("broken on purpose")

    watch_first_use(cls, broken, owner="test")
    assert cls().forward(3) == 6
    assert "broken on purpose" in capsys.readouterr().err


def test_what_is_no_plain_function_is_left_alone() -> None:
    class Odd:
        forward = staticmethod(len)

    before = vars(Odd)["forward"]
    assert not watch_first_use(Odd, print)
    assert vars(Odd)["forward"] is before
    assert not watch_first_use(int, print)


def test_before_a_graph_is_traced_all_are_told_of() -> None:
    cls, function = made()
    told: list[type] = []
    watch_first_use(cls, told.append)
    first_uses().before_compiling(torch._dynamo.callback)
    assert told == []
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    assert told == [cls]
    assert vars(cls)["forward"] is function
    first_uses().close()
    assert first_uses().tell_all not in torch._dynamo.callback.callback_handler.start_callbacks


def test_closing_tells_nobody() -> None:
    cls, function = made()
    told: list[type] = []
    watch_first_use(cls, told.append)
    first_uses().close()
    assert vars(cls)["forward"] is function
    assert cls().forward(1) == 2
    assert told == []


def test_a_class_that_waits_can_go() -> None:
    cls, _ = made()
    watch_first_use(cls, print)
    gone = weakref.ref(cls)
    del cls, _
    gc.collect()
    assert gone() is None


def test_pickled_by_value_it_is_the_function() -> None:
    watch_first_use(Thing, print)
    kept = vars(Thing)["forward"]
    assert type(kept).__name__ == "_FirstUse"
    assert pickle.loads(pickle.dumps(kept)) is standing(Thing)


def test_threads_that_read_at_once_tell_once() -> None:
    cls, _ = made()
    told: list[type] = []
    watch_first_use(cls, told.append)
    start = threading.Barrier(8)
    results: list[int] = []

    def read() -> None:
        start.wait()
        results.append(cls().forward(2))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [4] * 8
    assert told == [cls]
