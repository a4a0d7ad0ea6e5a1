"""Functions that are more than a plain ``def``: their kind stays what it is, or the target is refused."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from functions_of_kinds import (
    NET,
    fast_wait,
    patch,
    reason,
)

from twinkle.errors import ApplyError, TwinkleWarning
from twinkle.kernel import apply_function_kernel, register_function_kernel, unapply_function_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from twinkle.registry import Registry

pytestmark = pytest.mark.usefixtures("clean_registry")


@pytest.mark.parametrize(("name", "kernel"), [("function", lambda x: x), ("infer", lambda x: x)])
def test_what_twinkle_holds_is_no_stale_name(
    net: Any, clean_registry: Registry, name: str, kernel: Any
) -> None:
    patch(name, kernel)
    assert "(closure) still holds" not in str(clean_registry.bindings[0].notes)


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
