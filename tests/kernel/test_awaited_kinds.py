"""Functions that are awaited or iterated stay what they are, also where a kernel fails on its way."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from functions_of_kinds import (
    NET,
    collected,
    fast_acount,
    fast_count,
    fast_wait,
    patch,
    reason,
)

from twinkle.errors import TwinkleWarning
from twinkle.kernel import apply_function_kernel, register_function_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twinkle.registry import Registry

pytestmark = pytest.mark.usefixtures("clean_registry")


@pytest.mark.parametrize("calls", [1, 3])
def test_a_coroutine_function_stays_one(net: Any, calls: int) -> None:
    made = patch("wait", fast_wait)
    for _ in range(calls):
        assert asyncio.run(made(1)) == ("kernel", 1)
    assert inspect.iscoroutinefunction(made)
    assert asyncio.iscoroutinefunction(made)
    assert isinstance(mock.create_autospec(made), type(mock.create_autospec(fast_wait)))


@pytest.mark.parametrize("calls", [1, 3])
def test_a_generator_function_stays_one(net: Any, calls: int) -> None:
    made = patch("count", fast_count)
    for _ in range(calls):
        items = made(3)
        assert [next(items), items.send("sent"), next(items)] == [
            ("kernel", 0, None),
            ("kernel", 1, "sent"),
            ("kernel", 2, None),
        ]
        with pytest.raises(StopIteration, match="end"):
            next(items)
    assert inspect.isgeneratorfunction(made)


@pytest.mark.parametrize("calls", [1, 3])
def test_an_asynchronous_generator_function_stays_one(net: Any, calls: int) -> None:
    made = patch("acount", fast_acount)
    for _ in range(calls):
        assert asyncio.run(collected(made(2))) == [("kernel", 0), ("kernel", 1)]
    assert inspect.isasyncgenfunction(made)


def test_an_asynchronous_generator_hands_on_what_is_sent_and_thrown(net: Any) -> None:
    log: list[Any] = []

    async def kernel(n: int) -> Any:
        try:
            log.append((yield 1))
            yield 2
        except KeyError as error:
            log.append(error)
            yield 3
        finally:
            log.append("closed")

    made = patch("acount", kernel)

    async def run() -> list[Any]:
        items = made(1)
        got = [await items.__anext__(), await items.asend("sent"), await items.athrow(error := KeyError("k"))]
        await items.aclose()
        assert log == ["sent", error, "closed"]
        log.clear()
        return got

    for _ in range(2):
        assert asyncio.run(run()) == [1, 2, 3]


async def wait_and_fail(x: Any) -> Any:
    await asyncio.sleep(0)
    raise RuntimeError("kernel bug")


def test_a_kernel_that_fails_while_it_is_awaited_gives_way(net: Any, clean_registry: Registry) -> None:
    made = patch("wait", wait_and_fail)
    with pytest.warns(TwinkleWarning, match="kernel bug"):
        assert asyncio.run(made(1)) == ("original", 1)
    assert asyncio.run(made(2)) == ("original", 2)
    assert clean_registry.bindings[0].state == "quarantined"


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_generator_that_fails_is_taken_over_where_it_stopped(net: Any, at: int) -> None:
    def kernel(n: int) -> Iterator[Any]:
        for i in range(n):
            if i == at:
                raise RuntimeError("kernel bug")
            yield "original", i, None

    made = patch("count", kernel)
    wanted = [("original", i, None) for i in range(3)]
    with pytest.warns(TwinkleWarning, match="kernel bug"):
        assert list(made(3)) == wanted
    assert list(made(3)) == wanted


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_asynchronous_generator_that_fails_is_taken_over(net: Any, at: int) -> None:
    async def kernel(n: int) -> Any:
        for i in range(n):
            if i == at:
                raise RuntimeError("kernel bug")
            yield "original", i

    made = patch("acount", kernel)
    for warned in (pytest.warns(TwinkleWarning, match="kernel bug"), contextlib.nullcontext()):
        with warned:
            assert asyncio.run(collected(made(3))) == [("original", i) for i in range(3)]


def test_items_of_two_runs_that_differ_are_never_mixed(net: Any, clean_registry: Registry) -> None:
    def kernel(n: int) -> Iterator[Any]:
        yield "another", 0, None
        raise RuntimeError("kernel bug")

    made = patch("count", kernel)
    items = made(3)
    next(items)
    with pytest.raises(RuntimeError, match="kernel bug"), pytest.warns(TwinkleWarning):
        next(items)
    assert clean_registry.bindings[0].state == "quarantined"
    assert next(made(1)) == ("original", 0, None)


def test_an_iterator_that_was_read_is_not_read_on_by_the_original(net: Any) -> None:
    def kernel(n: Iterator[int]) -> Iterator[Any]:
        for _ in n:
            yield "original", 0, None
            raise RuntimeError("kernel bug")

    made = patch("count", kernel)
    items = made(iter([1, 2]))
    next(items)
    with pytest.raises(RuntimeError, match="kernel bug"), pytest.warns(TwinkleWarning):
        next(items)


def test_an_error_that_the_program_throws_in_is_its_own(net: Any, clean_registry: Registry) -> None:
    made = patch("count", fast_count)
    items = made(3)
    next(items)
    with pytest.raises(KeyError):
        items.throw(KeyError("mine"))
    assert clean_registry.bindings[0].state == "active"


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("wait", lambda x: x), ("count", lambda n: [n]), ("acount", fast_count), ("function", fast_wait)],
)
def test_a_kernel_of_another_kind_is_refused(
    net: Any, clean_registry: Registry, name: str, kernel: Any
) -> None:
    before = getattr(net, name)
    register_function_kernel(name, NET, func_impl=kernel)
    with pytest.warns(TwinkleWarning, match="another kind") as caught:
        assert apply_function_kernel(NET) == []
    assert __file__ in str(caught[0].message)
    assert "another kind" in reason(clean_registry)
    assert getattr(net, name) is before
