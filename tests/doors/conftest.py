"""The same program, run by plain Python and through every door."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("TWINKLE_", "_TWINKLE_", "PYTHON", "COVERAGE", "PYTEST")


def make_venv(folder: Path, *, door: bool) -> Path:
    """A bare environment, with ``twinkle.pth`` and a path to the checkout or with nothing."""
    venv.create(folder, with_pip=False, symlinks=True)
    site_packages = folder / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    if door:
        (site_packages / "_checkout.pth").write_text(f"{ROOT}\n")
        for name in ("twinkle.pth", "twinkle.start"):
            (site_packages / name).write_text((ROOT / name).read_text())
        command = folder / "bin/twinkle"
        command.write_text(
            f"#!{folder / 'bin/python'}\nimport sys\nfrom twinkle.cli import main\nsys.exit(main())\n"
        )
        command.chmod(0o755)
    return folder


class Door:
    """A way into a program: what stands in front of it, and the environment that goes with it."""

    def __init__(self, folder: Path, prefix: tuple[str, ...] = (), **environ: str) -> None:
        self.folder = folder
        self.prefix = prefix
        self.environ = environ

    @property
    def python(self) -> str:
        return str(self.folder / "bin/python")

    def run(
        self, *program: str, options: tuple[str, ...] = (), plain: bool = False, **keywords: object
    ) -> subprocess.CompletedProcess[str]:
        """Run a program through this door, or (``plain``) by the same Python with the door shut."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
        if plain:
            command = [self.python, *options, *program]
        else:
            environ |= self.environ
            command = [self.python, *options, *self.prefix, *program]
        keywords.setdefault("timeout", 240)
        keywords.setdefault("stdin", None if "input" in keywords else subprocess.DEVNULL)
        if keywords["stdin"] is None:
            del keywords["stdin"]
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, **keywords)


@pytest.fixture(scope="session")
def doors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Door]:
    base = tmp_path_factory.mktemp("doors")
    installed = make_venv(base / "installed", door=True)
    bare = make_venv(base / "bare", door=False)
    template = f"{ROOT / 'sitecustomize_template'}{os.pathsep}{ROOT}"
    run = ("-m", "twinkle", "run", "--kernels", "off")
    return {
        "pth": Door(installed, TWINKLE_CONFIG="auto", TWINKLE_KERNELS="off"),
        "sitecustomize": Door(bare, PYTHONPATH=template, TWINKLE_CONFIG="auto", TWINKLE_KERNELS="off"),
        "run": Door(installed, run),
        "run without pth": Door(bare, run, PYTHONPATH=str(ROOT)),
        "console": Door(installed, (str(installed / "bin/twinkle"), "run", "--kernels", "off")),
    }


@pytest.fixture(params=["pth", "sitecustomize", "run", "run without pth", "console"])
def door(request: pytest.FixtureRequest, doors: dict[str, Door]) -> Door:
    """Every door that a program does not open by itself."""
    return doors[request.param]


@pytest.fixture(params=["pth", "run without pth"])
def main_door(request: pytest.FixtureRequest, doors: dict[str, Door]) -> Door:
    """The two that have every mechanism between them: .pth; a new interpreter and sitecustomize."""
    return doors[request.param]
