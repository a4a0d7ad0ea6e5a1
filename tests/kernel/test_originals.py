"""A function kernel that calls the function it replaces: by a parameter, its name or a name of its own."""

from __future__ import annotations

import asyncio
import pickle
import sys
import threading
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest
import torch
from torch import nn

from twinkle.kernel import apply_function_kernel, register_function_kernel, unapply_function_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("clean_registry")

NET = "net_of_originals"
FILES = {
    f"{NET}.py": """
        import torch

        def act(x):
            return x * 2

        def other(x):
            return x * 3

        def block(x):
            return act(x) + 0

        async def wait(x):
            return x * 2

        def count(x):
            yield x * 2

        async def acount(x):
            yield x * 2

        @torch.no_grad()
        def infer(x):
            return x * 2
    """,
    # Large inputs are for the kernel, which gives ten times the input; small ones for the original.
    "by_name.py": f"""
        import asyncio
        import {NET} as net

        def act(x):
            return net.act(x) if x.numel() < 4 else x * 10

        def through_the_program(x):
            return net.block(x) if x.numel() < 4 else x * 10

        def helper(x):
            return getattr_free(x)

        def getattr_free(x):
            from {NET} import act
            return act(x)

        def through_a_helper(x):
            return helper(x) if x.numel() < 4 else x * 10

        def through_getattr(x):
            return getattr(net, "act")(x) if x.numel() < 4 else x * 10

        def through_an_import(x):
            import importlib
            module = importlib.import_module("{NET}")
            return module.act(x) if x.numel() < 4 else x * 10

        class Holder:
            def run(self, x):
                return net.act(x)

        def through_a_class(x):
            return Holder().run(x) if x.numel() < 4 else x * 10

        def nested(x):
            return net.other(x) if x.numel() < 4 else x * 10

        def nested_back(x):
            return net.act(x) if x.numel() < 4 else x * 10

        async def wait(x):
            if x.numel() >= 4:
                return x * 10
            await asyncio.sleep(0)
            first, second = await asyncio.gather(net.wait(x), net.wait(x))
            return first

        def count(x):
            if x.numel() < 4:
                yield from net.count(x)
            else:
                yield x * 10

        async def acount(x):
            if x.numel() >= 4:
                yield x * 10
            else:
                async for item in net.acount(x):
                    yield item

        def infer(x):
            return net.infer(x) if x.numel() < 4 else x * 10
    """,
    "by_own_name.py": f"""
        from {NET} import act as original

        def act(x):
            return original(x) if x.numel() < 4 else x * 10
    """,
}
SMALL, LARGE = torch.ones(2), torch.ones(8)


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import textwrap

    for name, text in FILES.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__(NET)
    unapply_function_kernel()
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def patch(kernel: Any, name: str = "act", *, mode: str | None = None, **more: Any) -> None:
    register_function_kernel(name, NET, func_impl=kernel, **more)
    assert apply_function_kernel(NET, mode=mode) == [f"{NET}.{name}"]


def both(function: Any) -> None:
    for x in (LARGE, SMALL, LARGE, SMALL):
        assert torch.equal(function(x), x * (2 if x is SMALL else 10))


# Given by a parameter.


def with_parameter(x: Any, *, original: Any) -> Any:
    return original(x) if x.numel() < 4 else x * 10


class WithParameter(nn.Module):
    def forward(self, x: Any, *, original: Any) -> Any:
        return original(x) if x.numel() < 4 else x * 10


@pytest.mark.parametrize("kernel", [with_parameter, WithParameter])
@pytest.mark.parametrize("options", [{}, {"device": "cpu"}, {"mode": "train"}])
def test_a_parameter_named_original_gets_the_original(net: Any, kernel: Any, options: Any) -> None:
    plain = net.act
    patch(kernel, **options)
    both(net.act)
    assert net.act is not plain


def test_a_target_that_has_a_parameter_of_that_name_keeps_it(net: Any) -> None:
    def named(x: Any, *, original: Any = "the program's") -> Any:
        return original

    net.named = named
    patch(lambda x, *, original="the program's": ("kernel", original), "named")
    assert net.named(1) == ("kernel", "the program's")


def test_a_kernel_that_asks_for_the_original_does_not_change_itself(net: Any) -> None:
    patch(with_parameter)
    assert with_parameter.__kwdefaults__ is None


def test_the_original_goes_into_the_graph_of_a_compiler(net: Any) -> None:
    patch(with_parameter)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: net.act(x), backend="eager", fullgraph=True)
    both(compiled)
    torch._dynamo.reset()


# Called by its name.


@pytest.mark.parametrize(
    "kernel",
    [
        "act",
        "through_the_program",
        "through_a_helper",
        "through_a_class",
        "through_getattr",
        "through_an_import",
    ],
)
@pytest.mark.parametrize("options", [{}, {"device": "cpu"}, {"mode": "train"}])
@pytest.mark.parametrize("small_first", [True, False])
def test_the_name_is_the_originals_inside_a_kernel(
    net: Any, kernel: str, options: Any, small_first: bool
) -> None:
    patch(f"by_name:{kernel}", **options)
    if small_first:
        assert torch.equal(net.act(SMALL), SMALL * 2)
    both(net.act)


def test_the_name_is_the_originals_where_the_kernel_itself_stands_in_place(net: Any) -> None:
    patch("by_name:act", mode="train")
    both(net.act)


def test_two_kernels_that_call_each_other_meet_the_originals(net: Any) -> None:
    register_function_kernel("act", NET, func_impl="by_name:nested")
    register_function_kernel("other", NET, func_impl="by_name:nested_back")
    apply_function_kernel(NET)
    assert torch.equal(net.act(LARGE), LARGE * 10)
    assert torch.equal(net.act(SMALL), SMALL * 2)  # act's kernel, other's kernel, act itself
    assert torch.equal(net.other(SMALL), SMALL * 3)


def test_threads_do_not_see_each_others_marks(net: Any) -> None:
    patch("by_name:act")
    net.act(LARGE)
    wrong = []

    def run(x: Any) -> None:
        wanted = x * (2 if x is SMALL else 10)
        wrong.extend(1 for _ in range(300) if not torch.equal(net.act(x), wanted))

    threads = [threading.Thread(target=run, args=(x,)) for x in (SMALL, LARGE, SMALL, LARGE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_mark_is_gone_after_an_error(net: Any) -> None:
    import by_name

    patch("by_name:act")
    net.act(LARGE)
    with pytest.raises(AttributeError):
        net.act("no tensor")
    assert by_name.net is net
    both(net.act)


def test_coroutines_and_generators_meet_the_original(net: Any) -> None:
    for name in ("wait", "count", "acount"):
        register_function_kernel(name, NET, func_impl=f"by_name:{name}")
    apply_function_kernel(NET)

    async def last(items: Any) -> Any:
        return [item async for item in items][-1]

    async def side_by_side() -> Any:
        return await asyncio.gather(net.wait(LARGE), net.wait(SMALL), net.wait(LARGE))

    both(lambda x: asyncio.run(net.wait(x)))
    both(lambda x: list(net.count(x))[-1])
    both(lambda x: asyncio.run(last(net.acount(x))))
    for got, x in zip(asyncio.run(side_by_side()), (LARGE, SMALL, LARGE), strict=True):
        assert torch.equal(got, x * (2 if x is SMALL else 10))


def test_between_its_items_a_generator_leaves_no_mark(net: Any) -> None:
    patch("by_name:count", "count")
    list(net.count(LARGE))
    items = net.count(SMALL)
    next(items)
    assert torch.equal(next(net.count(LARGE)), LARGE * 10)


def test_a_decorated_original_is_called_with_its_decorators(net: Any) -> None:
    patch("by_name:infer", "infer")
    both(net.infer)


def test_cloudpickle_takes_a_marked_kernel_by_value(net: Any) -> None:
    import by_name

    for name in ("act", "wait"):
        register_function_kernel(name, NET, func_impl=f"by_name:{name}")
    apply_function_kernel(NET)
    both(net.act)
    for module in (net, by_name):
        cloudpickle.register_pickle_by_value(module)
    try:
        act, wait = pickle.loads(cloudpickle.dumps((net.act, net.wait)))
    finally:
        for module in (net, by_name):
            cloudpickle.unregister_pickle_by_value(module)
    assert torch.equal(act(SMALL), SMALL * 2)
    assert torch.equal(asyncio.run(wait(SMALL)), SMALL * 2)


@pytest.mark.parametrize("ran", [True, False])
def test_a_compiler_meets_the_original_inside_a_kernel(net: Any, ran: bool) -> None:
    patch("by_name:act")
    if ran:
        net.act(LARGE)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: net.act(x), backend="eager", fullgraph=True)
    both(compiled)
    torch._dynamo.reset()


# A name of the kernel's own.


@pytest.mark.parametrize("options", [{}, {"device": "cpu"}])
@pytest.mark.parametrize("before", [True, False])
def test_a_name_of_the_kernels_own_holds_the_original_for_good(net: Any, options: Any, before: bool) -> None:
    plain = net.act
    if before:
        __import__("by_own_name")
    patch("by_own_name:act", **options)
    both(net.act)
    assert sys.modules["by_own_name"].original is plain
    unapply_function_kernel()
    assert sys.modules["by_own_name"].original is plain


def test_a_kernel_that_names_nothing_stands_in_place_itself(net: Any) -> None:
    import by_own_name

    patch(by_own_name.act, mode="train")
    assert net.act is by_own_name.act
