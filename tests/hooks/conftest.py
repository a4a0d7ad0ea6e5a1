"""Throw-away packages and interpreters for the tests of the hooks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _clean_hooks(clean_hooks: None) -> None:
    """Every test of this folder leaves the hooks as they were."""


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., str]:
    """Run a program in an interpreter of its own; returns what it prints, fails if it fails or hangs."""

    def run(source: str, *arguments: str, timeout: float = 240, path: str = "") -> str:
        program = tmp_path / "program.py"
        program.write_text(textwrap.dedent(source))
        folders = os.pathsep.join(
            folder for folder in (path, str(ROOT), os.environ.get("PYTHONPATH")) if folder
        )
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("TWINKLE_", "PYTEST_"))}
        done = subprocess.run(
            [sys.executable, *arguments, str(program)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**environ, "PYTHONPATH": folders},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


class Calls(list[str]):
    """A callback that keeps the names it was called with."""

    def __call__(self, module: object, name: str) -> None:
        self.append(name)


@pytest.fixture
def calls() -> Calls:
    return Calls()
