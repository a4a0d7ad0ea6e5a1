"""Throw-away packages and interpreters for the tests of the hooks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean_hooks() -> Iterator[None]:
    """No watch, no finder of ours and no module of a test is left behind."""
    modules = set(sys.modules)
    meta_path = list(sys.meta_path)
    yield
    runtime.reset()
    sys.meta_path[:] = meta_path
    for name in set(sys.modules) - modules:
        if name.startswith("tw_"):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write files ``{"path": "source"}`` to a folder that can be imported from."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(files: dict[str, str]) -> Path:
        for path, source in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(source))
        return tmp_path

    return write


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
