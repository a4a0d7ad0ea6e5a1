"""A child that is forked while other threads hold locks of the package can use all of it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import types
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from twinkle import forks
from twinkle.hooks.construction import watch_class
from twinkle.hooks.imports import watch_module
from twinkle.kernel import (
    apply_function_kernel,
    kernelize_model,
    register_external_layer,
    register_function_kernel,
    register_layer_kernel,
    unapply_function_kernel,
)
from twinkle.report import snapshot
from twinkle.runtime import runtime
from twinkle.sources.code import CodeSource
from twinkle.sources.locks import NamedLocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


class Shift(nn.Module):
    def forward(self, x):
        return x + 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = Shift()

    def forward(self, x):
        return self.shift(x)


class Kernel(nn.Module):
    def forward(self, x):
        return x + 1


def module_of(name: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module with a function ``f``, in ``sys.modules`` for the test."""
    module = types.ModuleType(name)
    exec("def f(x):\n    return x + 1\n", module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def exit_code(question: Callable[[], object]) -> int:
    """How a forked child ends: 5 when the question came back, killed when that takes ten seconds."""
    child = os.fork()
    if child == 0:
        try:
            question()
            os._exit(5)
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(1)
    for _ in range(1000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def held(clean_registry: Any, clean_hooks: Any) -> Iterator[None]:
    """Every lock that the package has by now, in the hands of another thread."""
    holding, let_go = threading.Event(), threading.Event()
    locks: list[Any] = []

    def hold() -> None:
        locks.extend(lock for lock in forks.known() if lock.acquire(timeout=5))
        holding.set()
        let_go.wait()
        for lock in locks:
            lock.release()

    def start() -> None:
        thread.start()
        assert holding.wait(20)
        assert len(locks) >= 3

    thread = threading.Thread(target=hold, daemon=True)
    yield start
    let_go.set()
    thread.join()


def layer_kernel() -> None:
    register_layer_kernel("Shift", layer_impl=Kernel)
    register_external_layer(Shift, "Shift")
    model = kernelize_model(Model(), mode="train")
    assert model(torch.ones(2)).tolist() == [2, 2]


def function_kernel(module: types.ModuleType) -> None:
    register_function_kernel("f", module.__name__, func_impl=lambda x: x + 1)
    apply_function_kernel(module.__name__)
    assert module.f(torch.ones(2)).tolist() == [2, 2]
    unapply_function_kernel(module.__name__)


def local_package(folder: Path) -> None:
    register_layer_kernel("Shift", repo_path=str(folder), package_name="held_kernels", layer_name="Kernel")
    register_external_layer(Shift, "Shift")
    kernelize_model(Model(), mode="train")(torch.ones(2))


def test_a_child_can_do_everything_with_all_locks_held_in_its_parent(
    held: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = module_of("tw_forked", monkeypatch)
    package = tmp_path / "held_kernels"
    package.mkdir(mode=0o755)
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text(
        "from torch import nn\nclass Kernel(nn.Module):\n    def forward(self, x):\n        return x + 1\n"
    )
    questions: list[Callable[[], object]] = [
        layer_kernel,
        lambda: function_kernel(module),
        lambda: local_package(tmp_path),
        lambda: watch_module("tw_not_there", print),
        lambda: watch_class(Model, print),
        lambda: runtime.of(NamedLocks).of("a").__enter__(),
        lambda: CodeSource("math:sin", kind="function").load(),
        snapshot,
        runtime.reset,
    ]
    for question in questions[:3]:
        question()  # so that what has a lock is there
    runtime.of(NamedLocks).of("a")
    held()
    assert [exit_code(question) for question in questions] == [5] * len(questions)


def test_a_child_does_not_wait_for_a_kernel_that_a_thread_of_its_parent_loads(
    clean_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of("tw_slow", monkeypatch)
    loading, go_on = threading.Event(), threading.Event()

    class Slow:
        def load(self) -> Any:
            if threading.current_thread() is not threading.main_thread():
                loading.set()
                assert go_on.wait(30)
            return lambda x: x + 1

    register_function_kernel("f", "tw_slow", repo=Slow(), device="cpu")
    apply_function_kernel("tw_slow")
    thread = threading.Thread(target=lambda: module.f(torch.zeros(1)), daemon=True)
    thread.start()
    assert loading.wait(20)
    assert exit_code(lambda: module.f(torch.zeros(1))) == 5
    go_on.set()
    thread.join()
    unapply_function_kernel("tw_slow")


def test_a_lock_that_is_gone_is_forgotten() -> None:
    before = len(forks.known())
    made = [forks.lock() for _ in range(5)]
    assert len(forks.known()) == before + 5
    del made
    assert len(forks.known()) == before
