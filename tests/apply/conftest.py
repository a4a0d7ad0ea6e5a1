"""Programs that run in a process of their own, with a package to be replaced and kernels to do it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest
from stem import Stem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILES = {
    "site/pkg/__init__.py": "",
    "site/pkg/layers.py": """
        import torch
        from torch import nn


        class Scale(nn.Module):
            def __init__(self, size: int = 4, *, fill: float = 1.0) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.full((size,), fill))

            def forward(self, x):
                return x * self.weight


        class ScaleMLP(Scale):
            pass


        class NoLayer:
            pass
    """,
    "site/pkg/ops.py": """
        def add(x, y):
            return x + y


        class Box:
            def get(self, x):
                return x
    """,
    "site/pkg/user.py": """
        from pkg.ops import add


        def three():
            return add(1, 2)
    """,
    "kernels/my_kernels/__init__.py": "from . import layers\n",
    "kernels/my_kernels/layers.py": """
        from torch import nn


        class Plus(nn.Module):
            def forward(self, x):
                return x * self.weight + 1


        class Broken(nn.Module):
            def forward(self, x):
                raise RuntimeError("broken on purpose")


        def plus_one(x, y):
            return x + y + 1


        def broken(x, y):
            raise RuntimeError("broken on purpose")
    """,
}


class Program:
    """Writes a configuration and programs, and runs them: in new interpreters, or forked of a stem."""

    def __init__(self, root: Path, stem: Stem | None = None) -> None:
        self.root = root
        self._stem = stem
        for name, text in FILES.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))

    def run(
        self, code: str, config: str | None = None, *, check: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run ``code`` after ``twinkle.activate()``; ``report()`` in it prints the report as JSON."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_")}
        paths = [str(self.root / "site"), os.path.dirname(os.path.dirname(os.path.dirname(__file__)))]
        environ["PYTHONPATH"] = os.pathsep.join(paths)
        environ["TWINKLE_CACHE"] = "off"
        if "sizes" not in (config or "") and variables.get("TWINKLE_CONFIG", "auto") == "auto":
            environ["TWINKLE_SIZES"] = "fixed"  # which kernels run is not to follow from a measurement
        if config is not None:
            (self.root / "twinkle.toml").write_text(textwrap.dedent(config))
            environ["TWINKLE_CONFIG"] = str(self.root / "twinkle.toml")
        environ.update(variables)
        prelude = (
            "import json, twinkle\n"
            "def report():\n    print(json.dumps(twinkle.report.snapshot()))\n"
            "twinkle.activate()\n"
        )
        whole = prelude + textwrap.dedent(code)
        if self._stem is not None:
            done = self._stem.run(whole, cwd=self.root, env=environ, timeout=240)
        else:
            done = subprocess.run(
                [sys.executable, "-c", whole],
                cwd=self.root,
                env=environ,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    def bindings(self, code: str, config: str | None = None, **variables: str) -> list[dict[str, Any]]:
        """What the report says at the end of ``code``."""
        done = self.run(textwrap.dedent(code) + "\nreport()\n", config, **variables)
        bindings: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["bindings"]
        return bindings


@pytest.fixture
def program_of_its_own(tmp_path: Path) -> Program:
    """A program that is an interpreter from its start on."""
    return Program(tmp_path)


@pytest.fixture(scope="session")
def stem() -> Iterator[Stem]:
    """A process with torch, of which the programs are forked whose start is not what is tested."""
    made = Stem()
    yield made
    made.close()


@pytest.fixture
def program_with_torch(tmp_path: Path, stem: Stem) -> Program:
    """A program that has torch when it begins."""
    return Program(tmp_path, stem)


@pytest.fixture
def program(program_of_its_own: Program) -> Program:
    """What most files use; those whose programs may begin with torch override it."""
    return program_of_its_own
