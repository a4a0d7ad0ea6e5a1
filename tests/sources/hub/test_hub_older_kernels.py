"""The tests of this folder once more, with the oldest ``kernels`` that is supported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PINS = HERE.parent / "requirements-kernels-0.12.txt"


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A directory with the older packages, to go before the installed ones."""
    target = tmp_path_factory.mktemp("older")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    done = subprocess.run([*command, "-r", str(PINS)], capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"the older packages cannot be installed here: {done.stderr[-300:]}")
    return target


@pytest.mark.slow
def test_the_hub_works_with_the_oldest_kernels(older):
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(older), str(ROOT)))}
    code = "import kernels.utils as u, huggingface_hub as h; print(u.build_variants()[1], h.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=240
    )
    assert done.stdout == "torch-cpu 1.33.0\n", done.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", str(HERE)]
    command += ["--ignore", str(HERE / "test_hub_beside_transformers.py")]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:]
