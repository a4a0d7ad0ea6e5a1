"""The packages that the examples of the document talk about, written to a temporary directory."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest
from functions_of_kinds import NET, SOURCE

from twinkle.kernel import unapply_function_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KERNELS = {
    "my_kernels/__init__.py": """
        from . import layers

        __all__ = ["layers"]
    """,
    "my_kernels/layers.py": """
        import torch
        import torch.nn as nn


        class Qwen2MLPTrainingKernel(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                gate = self.gate_proj(x)
                up = self.up_proj(x)
                return self.down_proj(self.act_fn(gate) * up)


        class Conv2d(nn.Module):
            def forward(self, input):
                return self._conv_forward(input, self.weight, self.bias)
    """,
}

TARGETS = {
    "my_pkg/__init__.py": "",
    "my_pkg/math_ops.py": """
        def add(x, y):
            return x + y


        def mul(x, y):
            return x * y * 1000
    """,
    "my_pkg/activations.py": """
        import torch.nn.functional as F


        def silu_and_mul(x):
            x1, x2 = x.chunk(2, dim=-1)
            return F.silu(x1) * x2


        def relu(x):
            return F.relu(x)
    """,
}


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


@pytest.fixture
def local_repo(tmp_path: Path) -> Path:
    """A local kernel repository as the document lays it out."""
    repo = tmp_path / "repo"
    write(repo, KERNELS)
    return repo


@pytest.fixture
def my_pkg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package whose functions the document replaces, importable."""
    write(tmp_path / "site", TARGETS)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        del sys.modules[name]


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / f"{NET}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__(NET)
    unapply_function_kernel()
    del sys.modules[NET]
