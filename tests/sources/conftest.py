"""Local repositories written from source strings."""

from __future__ import annotations

import os
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from twinkle.sources.local import LocalSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LAYERS = """
import torch.nn as nn

class Doubled(nn.Module):
    def forward(self, x):
        return x * 2
"""


@pytest.fixture
def write_repo(tmp_path: Path) -> Callable[..., Path]:
    """``write_repo({"my_kernels/__init__.py": "…"}, name="repo")`` writes the files and gives the path."""

    def write(files: dict[str, str], name: str = "repo") -> Path:
        for relative, text in files.items():
            path = tmp_path / name / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        root = tmp_path / name
        root.mkdir(exist_ok=True)
        return root

    return write


@pytest.fixture
def seed_repo(write_repo: Callable[..., Path]) -> Path:
    """A repository with the smallest package there is."""
    return write_repo(
        {
            "my_kernels/__init__.py": 'from . import layers\n__all__ = ["layers"]\n',
            "my_kernels/layers.py": LAYERS,
        }
    )


@pytest.fixture
def site_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on ``sys.path``, and none of its packages in ``sys.modules`` afterwards."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)
    yield site
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(site) + os.sep):
            del sys.modules[name]


@pytest.fixture
def layer() -> Callable[..., LocalSource]:
    """``layer(repo, "Doubled")`` is the source of a layer in a local repository."""

    def source(repo: Path, name: str = "Doubled", package: str = "my_kernels", **more: object) -> LocalSource:
        return LocalSource(str(repo), package, name, kind="layer", **more)

    return source


@pytest.fixture
def function() -> Callable[..., LocalSource]:
    """``function(repo, "silu")`` is the source of a function in a local repository."""

    def source(repo: Path, name: str, package: str = "my_kernels") -> LocalSource:
        return LocalSource(str(repo), package, name, kind="function")

    return source
