"""Fixtures every room's tests share."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twinkle.registry import Registry


def _import_triton_for_its_interpreter() -> None:
    """Triton decides when it is imported whether its own functions can run on the CPU.

    The variable does not stay: children of the tests are not to run kernels in the interpreter.
    """
    if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
        return
    given = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    if given is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = given


_import_triton_for_its_interpreter()
# Proofs of the tests are no business of the user's cache, nor the other way round.
os.environ["TWINKLE_CACHE"] = "off"


@pytest.fixture
def clean_registry() -> Iterator[Registry]:
    """An empty registry; afterwards every function is restored and everything is forgotten."""
    from twinkle.runtime import runtime

    runtime.reset()
    yield runtime.registry
    runtime.reset()
