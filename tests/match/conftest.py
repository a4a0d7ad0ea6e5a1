"""The trial of a recognition, which ``benchmarks/coverage.py`` makes of every class of transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="session")
def trial() -> Callable[..., Any]:
    """Runs a class or function and the reference of its variant on the same inputs."""
    path = Path(__file__).parents[2] / "benchmarks" / "trial.py"
    spec = importlib.util.spec_from_file_location("trial", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[..., Any] = module.trial
    return found
