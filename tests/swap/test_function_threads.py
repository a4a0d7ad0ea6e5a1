"""Threads that place and take back the kernels of one function: at rest, the very original stands there."""

from __future__ import annotations

import sys
import threading
import types
from typing import Any

import pytest
import torch

from twinkle.codegen import parse_source
from twinkle.kernel import apply_function_kernel, register_function_kernel, unapply_function_kernel
from twinkle.runtime import runtime

THREADS = 8


@pytest.fixture
def switching() -> Any:
    """Threads that take turns every 0.2 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    yield
    sys.setswitchinterval(before)


def at_once(work: Any) -> list[str]:
    """Run ``work(number)`` in eight threads that begin together; what they raised."""
    errors: list[str] = []
    barrier = threading.Barrier(THREADS)

    def run(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except Exception as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("number", range(4))
def test_the_original_is_never_lost(
    number: int, switching: None, clean_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"tw_threaded_{number}"
    module, user = types.ModuleType(name), types.ModuleType(f"{name}_user")
    exec("def f(x):\n    return x + 1\n", vars(module))
    original = user.f = module.f
    for made in (module, user):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    register_function_kernel("f", name, func_impl=lambda x: x + 10)

    def work(thread: int) -> None:
        for _ in range(2):
            apply_function_kernel(name)
            assert module.f(torch.zeros(1)).item() in (1, 10)
            if thread % 2:
                unapply_function_kernel(name)

    assert at_once(work) == []
    unapply_function_kernel(name)
    assert module.f is original
    assert user.f is original
    assert [binding.instances for binding in runtime.registry.bindings if binding.target == f"{name}:f"] == [
        0
    ]


def test_another_function_that_comes_while_a_kernel_loads_is_what_is_replaced(
    clean_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("tw_meanwhile")
    exec("def f(x):\n    return x + 1\n\ndef g(x):\n    return x + 2\n", vars(module))
    monkeypatch.setitem(sys.modules, "tw_meanwhile", module)
    other, number = module.g, id(module.g)  # the first name is a copy of the function, and gets the kernel

    class Source:
        def load(self) -> Any:
            module.f = other
            return lambda x: x + 10

    register_function_kernel("f", "tw_meanwhile", repo=Source())
    apply_function_kernel("tw_meanwhile", mode="train", device="cpu")
    assert id(module.f) != number
    unapply_function_kernel("tw_meanwhile")
    assert module.f is other
    assert id(other) == number


def test_syntax_trees_are_made_in_threads(switching: None) -> None:
    text = (
        "x = " + "(" * 40 + "1" + ")" * 40 + "\n" + "\n".join(f"y{n} = [{n}, {{'a': x}}]" for n in range(80))
    )

    def work(_: int) -> None:
        for _ in range(10):
            assert len(parse_source(text).body) == 81

    assert at_once(work) == []
