"""What kind of function a function is: called, awaited or iterated. A kernel has the kind of its target.

A dispatch function is a plain one that gives what the kernel gives. Where the target is a coroutine
function, a generator function or an asynchronous one, a function of that kind stands in front of it and
awaits or iterates what it gives (:data:`FRONTS`). Every run of such a kernel is guarded to its end: when it
raises, the original runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree

from twinkle.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from twinkle.swap.dispatch import Dispatch
    from twinkle.swap.entry import Entry

__all__ = ["FRONTS", "GUARDED_RUNS", "PLAIN", "body_of", "check_kind", "kind_of"]

PLAIN = "a plain function"
COROUTINE = "a coroutine function (async def)"
GENERATOR = "a generator function"
ASYNC_GENERATOR = "an asynchronous generator function"

_LOOP = """
    _tw_items = {call}
    try:
        _tw_item = await _tw_items.__anext__()
        while True:
            try:
                _tw_sent = yield _tw_item
            except _tw_GeneratorExit:
                await _tw_items.aclose()
                raise
            except _tw_BaseException as _tw_error:
                _tw_item = await _tw_items.athrow(_tw_error)
            else:
                _tw_item = await _tw_items.asend(_tw_sent)
    except _tw_StopAsyncIteration:
        return
"""

FRONTS = {
    PLAIN: "{head}\n    return {call}\n",
    COROUTINE: "async {head}\n    return await {call}\n",
    GENERATOR: "{head}\n    return (yield from {call})\n",
    ASYNC_GENERATOR: "async {head}" + _LOOP,
}
"""For each kind the text of a function that hands all on to ``call``: what is sent and thrown as well."""

_MOST_ITEMS = 64


def body_of(function: Any) -> Any:
    """The function that a call of a layer, a class of layers, a partial or another callable runs."""
    is_class = isinstance(function, type)
    if isinstance(function, nn.Module) or (is_class and issubclass(function, nn.Module)):
        return function.forward
    if is_class or inspect.isroutine(function):
        return function
    return function.func if isinstance(function, functools.partial) else type(function).__call__


def kind_of(function: Any) -> str:
    """The kind of a function, or of what a call of another callable runs."""
    function = body_of(function)
    if inspect.iscoroutinefunction(function):
        return COROUTINE
    if inspect.isasyncgenfunction(function):
        return ASYNC_GENERATOR
    return GENERATOR if inspect.isgeneratorfunction(function) else PLAIN


def check_kind(implementation: Any, original: Callable[..., Any]) -> None:
    """Check that a kernel is called, awaited or iterated as its target is.

    Raises:
        KernelError: It is of another kind, also without its decorators.
    """
    theirs = kind_of(original)
    if theirs not in (kind_of(implementation), kind_of(inspect.unwrap(implementation))):
        name = getattr(implementation, "__qualname__", None) or type(implementation).__qualname__
        raise KernelError(
            f"kernel {name} is of another kind than its target",
            found=kind_of(implementation),
            expected=theirs,
        )


async def _guarded_await(dispatch: Dispatch, entry: Entry, args: Any, kwargs: Any) -> Any:
    """Await a kernel, and the original where that raises."""
    assert entry.function is not None
    try:
        result = await entry.function(*args, **kwargs)
    except Exception as error:
        failure = dispatch.excused(entry, error)
    else:
        dispatch.ran(entry)
        return result
    result = await dispatch.original(*args, **kwargs)
    dispatch.turn_off(entry, failure)
    return result


class _Relay:
    """A generator, asynchronous or not, of which is remembered what it gave and was told.

    Attributes:
        items: What it gave; None once that is too much to remember.
        told: Something was sent or thrown into it.
    """

    def __init__(self, generator: Any, first: bool) -> None:
        self._generator = generator
        # Later runs remember nothing: it may be batches of data.
        self._most = _MOST_ITEMS if first else 0
        self.items: list[Any] | None = []
        self.told = False
        self._thrown: object = None

    def __iter__(self) -> _Relay:
        return self

    def __next__(self) -> Any:
        return self._gave(next(self._generator))

    def send(self, value: Any) -> Any:
        self.told = True
        return self._generator.send(value)

    def throw(self, *error: Any) -> Any:
        self._is_thrown(*error)
        return self._generator.throw(*error)

    def close(self) -> None:
        self._generator.close()

    async def __anext__(self) -> Any:
        return self._gave(await self._generator.__anext__())

    async def asend(self, value: Any) -> Any:
        if value is None:
            return await self.__anext__()
        self.told = True
        return await self._generator.asend(value)

    async def athrow(self, *error: Any) -> Any:
        self._is_thrown(*error)
        return await self._generator.athrow(*error)

    async def aclose(self) -> None:
        await self._generator.aclose()

    def is_the_programs(self, error: BaseException) -> bool:
        """Whether an error that came out is one that the program had thrown in."""
        return error is self._thrown

    def can_be_taken_over(self, args: Any, kwargs: Any) -> bool:
        """Whether the original can begin anew and go on where this one stopped."""
        if self.items == []:
            return not self.told
        once = (Iterator, AsyncIterator)  # Read from already, and not to be read again.
        return (
            self.items is not None
            and not self.told
            and not any(isinstance(value, once) for value in (*args, *kwargs.values()))
        )

    def _gave(self, item: Any) -> Any:
        if self.items is not None:
            self.items.append(item)
            if len(self.items) > self._most:
                self.items = None
        return item

    def _is_thrown(self, *error: Any) -> None:
        self.told = True
        self._thrown = next((part for part in error if isinstance(part, BaseException)), None)


def _guarded_items(dispatch: Dispatch, entry: Entry, args: Any, kwargs: Any) -> Generator[Any, Any, Any]:
    """Iterate a kernel; the original goes on where that raises.

    The original begins anew, and has to give again what was handed out already: where it does not, or
    cannot, the program gets the kernel's error, and never items of two runs that do not belong together.
    """
    assert entry.function is not None
    relay = None
    try:
        relay = _Relay(entry.function(*args, **kwargs), entry.state != "live")
        result = yield from relay
    except GeneratorExit:
        dispatch.ran(entry)
        raise
    except Exception as error:
        failure = _excused(dispatch, entry, relay, error, args, kwargs)
    else:
        dispatch.ran(entry)
        return result
    again = dispatch.original(*args, **kwargs)
    for item in (relay.items if relay is not None else None) or ():
        if not _same(item, next(again, _END)):
            dispatch.turn_off(entry, failure)
            raise failure
    try:
        result = yield from again
    except GeneratorExit:
        dispatch.turn_off(entry, failure)
        raise
    dispatch.turn_off(entry, failure)
    return result


async def _guarded_async_items(
    dispatch: Dispatch, entry: Entry, args: Any, kwargs: Any
) -> AsyncGenerator[Any, Any]:
    """The same as :func:`_guarded_items` for asynchronous generators."""
    assert entry.function is not None
    relay = None
    try:
        relay = _Relay(entry.function(*args, **kwargs), entry.state != "live")
        item = await relay.__anext__()
        while True:
            try:
                sent = yield item
            except GeneratorExit:
                await relay.aclose()
                raise
            except BaseException as error:
                item = await relay.athrow(error)
            else:
                item = await relay.asend(sent)
    except StopAsyncIteration:
        dispatch.ran(entry)
        return
    except GeneratorExit:
        dispatch.ran(entry)
        raise
    except Exception as error:
        failure = _excused(dispatch, entry, relay, error, args, kwargs)
    again = dispatch.original(*args, **kwargs)
    for item in (relay.items if relay is not None else None) or ():
        if not _same(item, await anext(again, _END)):
            dispatch.turn_off(entry, failure)
            raise failure
    try:
        async for item in again:
            yield item
    except GeneratorExit:
        dispatch.turn_off(entry, failure)
        raise
    dispatch.turn_off(entry, failure)


def _excused(
    dispatch: Dispatch, entry: Entry, relay: _Relay | None, error: Exception, args: Any, kwargs: Any
) -> Exception:
    """An error of a kernel that the original makes good; raises it where that is not so."""
    if relay is not None and relay.is_the_programs(error):
        raise error
    failure = dispatch.excused(entry, error)
    if relay is not None and not relay.can_be_taken_over(args, kwargs):
        dispatch.turn_off(entry, failure)
        raise error
    return failure


GUARDED_RUNS: dict[str, Callable[..., Any]] = {
    COROUTINE: _guarded_await,
    GENERATOR: _guarded_items,
    ASYNC_GENERATOR: _guarded_async_items,
}
"""For each kind but the plain one what awaits or iterates a kernel."""

_END = object()


def _same(one: Any, other: Any) -> bool:
    """Whether two items are equal; tensors up to rounding."""
    ours, spec = _pytree.tree_flatten(one)
    theirs, other_spec = _pytree.tree_flatten(other)
    return spec == other_spec and all(map(_same_leaf, ours, theirs))


def _same_leaf(one: Any, other: Any) -> bool:
    try:
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, equal_nan=True)
            return True
        return one is other or bool(one == other)
    except Exception:  # assert_close says no by AssertionError, an `==` of the program's own by any other
        return False
