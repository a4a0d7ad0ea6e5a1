"""A module of functions of every kind, and kernels for them."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from twinkle.kernel import apply_function_kernel, register_function_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twinkle.registry import Registry


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
