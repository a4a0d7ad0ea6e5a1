"""The root of the repository holds known names only: a file that a command left there is found."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

KNOWN = {
    ".ci",
    ".gitignore",
    "LICENSE",
    "README.md",
    "benchmarks",
    "constraints.txt",
    "docs",
    "examples",
    "hatch_build.py",
    "pyproject.toml",
    "sitecustomize_template",
    "tests",
    "twinkle",
    "twinkle.pth",
    "twinkle.start",
}


def tracked(folder: Path) -> list[str]:
    """The paths that git tracks in a folder; skips where there is no git, or no repository."""
    git = shutil.which("git")
    if git is None or not (folder / ".git").exists():
        pytest.skip("not a checkout, or git is not installed")
    # safe.directory: a checkout of another user is refused otherwise, in a container for one.
    command = [git, "-c", f"safe.directory={folder}", "ls-files", "-z"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_root_holds_known_names_only():
    assert {path.split("/")[0] for path in tracked(ROOT)} == KNOWN
