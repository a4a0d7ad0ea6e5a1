"""Throw-away packages that a test writes and imports, and what such a test would leave behind."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def clean_hooks() -> Iterator[None]:
    """No watch, no finder of ours and no module of a test is left behind."""
    from twinkle.runtime import runtime

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
