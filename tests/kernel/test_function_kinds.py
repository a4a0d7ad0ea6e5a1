"""Functions that are more than a plain ``def``: their kind stays what it is, or the target is refused."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import re
import sys
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch

from twinkle.errors import ApplyError, TwinkleWarning
from twinkle.kernel import apply_function_kernel, register_function_kernel, unapply_function_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from twinkle.registry import Registry

pytestmark = pytest.mark.usefixtures("clean_registry")

SOURCE = """
import asyncio, contextlib, enum, functools
import torch
from torch import Tensor, nn

async def wait(x):
    await asyncio.sleep(0)
    return "original", x

def count(n):
    got = None
    for i in range(n):
        got = yield "original", i, got
    return "end"

async def acount(n):
    for i in range(n):
        await asyncio.sleep(0)
        yield "original", i

@functools.lru_cache(maxsize=8)
def table(n):
    return "original", n

@functools.cache
def cached(n):
    return "original", n

@functools.singledispatch
def single(x):
    return "original"

@single.register
def _(x: int):
    return "int"

@torch.no_grad()
def infer(x):
    return x * 2

@contextlib.contextmanager
def manage(log):
    log.append("in")
    try:
        yield "original"
    finally:
        log.append("out")

@contextlib.asynccontextmanager
async def amanage(log):
    yield "original"

def counted(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        wrapper.calls += 1
        return function(*args, **kwargs)
    wrapper.calls = 0
    return wrapper

@counted
@torch.no_grad()
def twice(x, by=2):
    return x * by

def by_default(function):
    @functools.wraps(function)
    def wrapper(x, __function=function):
        return "decorated", __function(x)
    return wrapper

@by_default
def handed(x):
    return "original"

class Holder:
    def __init__(self, function):
        self.function = function

def in_an_object(function):
    holder = Holder(function)
    @functools.wraps(function)
    def wrapper(*args):
        return holder.function(*args)
    return wrapper

@in_an_object
def hidden(x):
    return "original"

@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x + 1

class Thing:
    def __init__(self, n):
        self.n = n
    def __call__(self, x):
        return "original", x
    def method(self, x):
        return "original", x
    half = functools.partialmethod(method, 1)
    @property
    def prop(self):
        return 1
    @torch.no_grad()
    def graded(self, x):
        return x * 2
    @functools.lru_cache
    def kept(self, x):
        return "original", x
    @classmethod
    @functools.cache
    def kept_by_class(cls, x):
        return "original", x
    @staticmethod
    async def swait(x):
        return "original", x

class Layer(nn.Module):
    def forward(self, x):
        return x

class Plain:
    pass

class Color(enum.Enum):
    RED = 1

def function(x): return "original"
partial = functools.partial(function, 1)
thing = Thing(1)
bound = thing.method
layer = Layer()

class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * x
    @staticmethod
    def backward(ctx, g): return g
square = Square.apply
"""
NET = "net_of_kinds"


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / f"{NET}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__(NET)
    unapply_function_kernel()
    del sys.modules[NET]


def patch(name: str, kernel: Any, **more: Any) -> Any:
    """Put a dispatcher in place, as a hook does."""
    register_function_kernel(name, NET, func_impl=kernel, **more)
    assert apply_function_kernel(NET) == [f"{NET}.{name}"]
    return getattr(sys.modules[NET], name, None)


def reason(registry: Registry) -> str:
    (binding,) = registry.bindings
    assert binding.state == "failed"
    return binding.reason


async def fast_wait(x: Any) -> Any:
    await asyncio.sleep(0)
    return "kernel", x


def fast_count(n: int) -> Iterator[Any]:
    got = None
    for i in range(n):
        got = yield "kernel", i, got
    return "end"


async def fast_acount(n: int) -> Any:
    for i in range(n):
        yield "kernel", i


async def collected(items: Any) -> list[Any]:
    return [item async for item in items]


@pytest.mark.parametrize(("name", "kernel"), [("function", lambda x: x), ("infer", lambda x: x)])
def test_what_twinkle_holds_is_no_stale_name(
    net: Any, clean_registry: Registry, name: str, kernel: Any
) -> None:
    patch(name, kernel)
    assert "(closure) still holds" not in str(clean_registry.bindings[0].notes)


# Awaited and iterated.


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


# Decorated.


@pytest.mark.parametrize("name", ["table", "cached"])
def test_a_cache_stays_one(net: Any, name: str) -> None:
    calls = []

    def kernel(n: int) -> Any:
        calls.append(n)
        return "kernel", n

    before = getattr(net, name)
    made = patch(name, kernel)
    assert [made(1), made(1), made(2)] == [("kernel", 1), ("kernel", 1), ("kernel", 2)]
    assert calls == [1, 2]
    assert made.cache_info()[:2] == (1, 2)
    assert made.cache_parameters() == before.cache_parameters()
    made.cache_clear()
    assert made(1) == ("kernel", 1)
    assert type(made) is type(before)
    unapply_function_kernel()
    assert getattr(net, name) is before
    assert before(1) == ("original", 1)


def test_a_cache_keeps_no_results_from_one_mode_to_the_other(net: Any, clean_registry: Registry) -> None:
    register_function_kernel("table", NET, func_impl=lambda n: n, mode="inference")
    assert apply_function_kernel(NET) == []
    assert "from one mode to the next" in clean_registry.bindings[0].reason


def test_a_cache_forgets_a_kernel_that_failed(net: Any) -> None:
    def kernel(n: int) -> Any:
        raise RuntimeError("kernel bug")

    made = patch("table", kernel)
    with pytest.warns(TwinkleWarning, match="kernel bug"):
        assert made(1) == ("original", 1)
    assert made.cache_info().currsize == 1


@pytest.mark.parametrize("calls", [1, 2])
def test_no_grad_stays_around_the_kernel(net: Any, calls: int) -> None:
    x = torch.ones(1, requires_grad=True)
    made = patch("infer", lambda x: x * 3)
    for _ in range(calls):
        assert made(x) == 3
        assert not made(x).requires_grad
        assert made.__wrapped__(x).requires_grad
    assert inspect.getsource(made).startswith("@torch.no_grad()")


def test_the_mode_is_that_inside_the_decorators(net: Any) -> None:
    made = patch("infer", lambda x: x * 3, mode="inference")
    assert made(torch.ones(1, requires_grad=True)) == 3


@pytest.mark.parametrize("decorate", [lambda f: f, contextlib.contextmanager])
def test_a_context_manager_stays_one(net: Any, decorate: Callable[[Any], Any]) -> None:
    def kernel(log: Any) -> Iterator[str]:
        try:
            yield "kernel"
        finally:
            log.append("kernel out")

    made = patch("manage", decorate(kernel))
    for _ in range(2):
        log: list[str] = []
        with made(log) as given:
            assert given == "kernel"
        assert log == ["kernel out"]
        with pytest.raises(KeyError, match="mine"), made(log):
            raise KeyError("mine")


def test_an_asynchronous_context_manager_stays_one(net: Any) -> None:
    async def kernel(log: Any) -> Any:
        yield "kernel"

    made = patch("amanage", kernel)

    async def run() -> Any:
        async with made([]) as given:
            return given

    for _ in range(2):
        assert asyncio.run(run()) == "kernel"


def test_decorators_in_a_row_stay_and_know_themselves(net: Any) -> None:
    before = net.twice
    made = patch("twice", lambda x, by=2: x * 10)
    x = torch.ones(1, requires_grad=True)
    assert [made(x), made(x)] == [10, 10]
    assert not made(x).requires_grad
    assert made.calls == 3
    assert before.calls == 0
    assert inspect.signature(made) == inspect.signature(before)


def test_a_function_that_is_held_by_a_default_is_replaced_there(net: Any) -> None:
    assert patch("handed", lambda x: "kernel")(1) == ("decorated", "kernel")


def test_a_function_under_torch_compile_stays_under_it(net: Any) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    net.compiled = torch.compile(lambda x: x * 2, backend=backend)
    made = patch("compiled", lambda x: torch.tanh(x))
    x = torch.ones(2)
    assert torch.equal(made(x), torch.tanh(x))
    assert len(graphs) == 1
    assert made._torchdynamo_orig_callable is made.__wrapped__
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["Thing.graded", "Thing.kept", "Thing.kept_by_class", "Thing.swait"])
def test_decorated_methods_stay_what_they_are(net: Any, name: str) -> None:
    attribute = name.partition(".")[2]
    kind = type(vars(net.Thing)[attribute])
    kernels = {
        "graded": lambda self, x: x * 3,
        "kept": lambda self, x: ("kernel", x),
        "kept_by_class": lambda cls, x: (cls.__name__, x),
        "swait": fast_wait,
    }
    patch(name, kernels[attribute])
    assert type(vars(net.Thing)[attribute]) is kind
    x = torch.ones(1, requires_grad=True)
    for _ in range(2):
        given = getattr(net.Thing(1), attribute)(x)
        if attribute == "graded":
            assert given == 3
            assert not given.requires_grad
        else:
            given = asyncio.run(given) if attribute == "swait" else given
            assert given == ({"kept_by_class": "Thing"}.get(attribute, "kernel"), x)


def test_the_method_call_is_a_target(net: Any) -> None:
    patch("Thing.__call__", lambda self, x: ("kernel", x))
    assert net.thing(1) == ("kernel", 1)


def test_the_apply_of_an_autograd_function_is_a_target(net: Any) -> None:
    assert patch("square", lambda *args, **kwargs: args[0] * 5)(torch.ones(1)) == 5


def gelu_by_hand(input: Any, *, approximate: str = "none") -> Any:
    return torch.ops.aten.gelu(input, approximate=approximate)


def pool_by_hand(*args: Any, **kwargs: Any) -> Any:
    return torch.max_pool1d(args[0], args[1])


def test_torchscript_takes_a_builtin_of_torch_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(torch.nn.Module):
        act = torch.nn.functional.gelu

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.max_pool1d(torch.nn.functional.gelu(x), 2)

    monkeypatch.setattr(sys.modules[__name__], "Model", Model, raising=False)
    x = torch.linspace(-1, 1, 4).view(1, 1, 4)
    wanted = Model()(x)
    before = torch.nn.functional.gelu
    register_function_kernel("gelu", "torch.nn.functional", func_impl=gelu_by_hand)
    register_function_kernel("max_pool1d", "torch.nn.functional", func_impl=pool_by_hand)
    assert len(apply_function_kernel("torch.nn.functional")) == 2
    try:
        for _ in range(2):
            assert torch.equal(Model()(x), wanted)
            assert torch.equal(torch.jit.script(Model())(x), wanted)
        assert torch.nn.functional.gelu is not before
        assert torch.equal(Model().act(x), before(x))
    finally:
        unapply_function_kernel()
    assert vars(Model)["act"] is torch.nn.functional.gelu is before


# Refused.


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Layer", r"a class.*\[layers.Layer\] with target = \"net_of_kinds:Layer\""),
        ("Plain", "a class"),
        ("single", "singledispatch"),
        ("scripted", "TorchScript"),
        ("partial", "functools.partial.*net_of_kinds:function"),
        ("bound", "bound to net_of_kinds:Thing.*Thing.method"),
        ("thing", "net_of_kinds.Thing.*Thing.__call__"),
        ("layer", "a layer"),
        ("hidden", "does not keep the function"),
        ("Thing.half", "partialmethod"),
        ("Thing.prop", "property"),
        ("Plain.__call__", "metaclass"),
        ("Color.RED", "is no function"),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_what_is_no_function_is_refused_with_a_reason(
    net: Any, clean_registry: Registry, name: str, why: str, strict: bool
) -> None:
    *path, attribute = name.split(".")
    holder = functools.reduce(getattr, path, net)
    before = inspect.getattr_static(holder, attribute, None)
    register_function_kernel(name, NET, func_impl=lambda *args: "kernel")
    if strict:
        with pytest.raises(ApplyError, match=f"(?s){why}"):
            apply_function_kernel(NET, strict=True)
    else:
        with pytest.warns(TwinkleWarning, match=why) as caught:
            assert apply_function_kernel(NET) == []
        assert f"{__file__}:" in str(caught[0].message)
    assert re.search(why, reason(clean_registry))
    assert inspect.getattr_static(holder, attribute, None) is before
