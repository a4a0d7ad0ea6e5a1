"""Fixtures every room's tests share."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import traceback
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from interpreter import quicken
from kernel_fixtures import every_size, half, kernels, unplanned  # noqa: F401
from package_fixtures import clean_hooks, write  # noqa: F401

from twinkle.session import JOB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twinkle.registry import Registry


def _share_the_cores() -> None:
    """Workers beside each other have one thread of torch each, and so have the programs they start.

    Two threads of two workers on two cores wait for each other at the end of every operator.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def _import_triton_for_its_interpreter() -> None:
    """Triton decides when it is imported whether its own functions can run on the CPU.

    The variable does not stay: children of the tests are not to run kernels in the interpreter.
    """
    if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
        return
    given = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    quicken()
    if given is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = given


def _seed_without_a_stack() -> None:
    """``torch.manual_seed`` writes down where it was called, for each kind of device that is not in use.

    Nobody reads it unless the device then fails to start. With the frames of pytest below it is a millisecond
    and a half of each call, and a test is seeded three times and more.
    """
    quick = SimpleNamespace(**{**vars(traceback), "format_stack": lambda *_: []})
    for kind in ("cuda", "xpu", "mtia"):
        if hasattr(getattr(torch, kind, None), "traceback"):
            getattr(torch, kind).traceback = quick


def _keep_the_bytecode() -> None:
    """Hundreds of programs import Twinkle: one compiles it, wherever the others may read what it wrote.

    An editable install has no bytecode of its own, and 0.3 seconds of each program went into it.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _measure_no_speeds() -> None:
    """Kernels run from the sizes in their code on, unless a test asks for measurements: these vary."""
    from twinkle.options import Options

    def made(self: Options) -> None:
        init(self)
        self.sizes = "fixed"

    init = Options.__init__
    Options.__init__ = made  # type: ignore[method-assign]
    os.environ["TWINKLE_SIZES"] = "fixed"


_share_the_cores()
_measure_no_speeds()
_keep_the_bytecode()
_seed_without_a_stack()
_import_triton_for_its_interpreter()
# Proofs of the tests are no business of the user's cache, nor the other way round.
os.environ["TWINKLE_CACHE"] = "off"


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


def pytest_collectstart() -> None:
    """What a test file draws while it is imported does not follow from the files before it."""
    _seed()


def _settings() -> dict[str, Any]:
    """What a process has one of, and the next test would find changed."""
    found = {
        "threads of torch": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic or a warning": torch.is_deterministic_algorithms_warn_only_enabled(),
        "precision of products": torch.get_float32_matmul_precision(),
    }
    twinkle = sys.modules.get("twinkle.runtime")
    if twinkle is not None:
        found |= {f"option {name}": value for name, value in vars(twinkle.runtime.options).items()}
    return found


@pytest.fixture(autouse=True)
def nothing_of_another_test() -> Iterator[None]:
    """Each test starts from the same random numbers and the same settings, alone or after any other.

    Random numbers that went on from test to test gave a half precision head in one order of the tests, and in
    no other, for which the proof of the loss says no.
    """
    _seed()
    before = _settings()
    yield
    # A program of the next test is the first of a job of its own.
    os.environ.pop(JOB, None)
    after = _settings()
    # An option that is not there before was read for the first time: it has its default, unless left behind.
    left = {name: (before[name], value) for name, value in after.items() if before.get(name, value) != value}
    torch.set_num_threads(before["threads of torch"])
    torch.set_default_dtype(before["default dtype"])
    assert not left, f"the test leaves settings behind (before, after): {left}"


@pytest.fixture
def clean_registry() -> Iterator[Registry]:
    """An empty registry; afterwards every function is restored and everything is forgotten."""
    from twinkle.runtime import runtime

    runtime.reset()
    yield runtime.registry
    runtime.reset()
