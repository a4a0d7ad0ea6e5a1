"""`benchmarks/suites.py` tells failures with Twinkle alone from others, and empty runs from good ones."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/suites.py"
DIFFERS = """
    def test_differs():
        assert "TWINKLE_CONFIG" not in os.environ
"""
UNSTEADY = """
    def test_unsteady():
        if "TWINKLE_CONFIG" in os.environ and not Path("been").exists():
            Path("been").touch()
            raise AssertionError("the first time only")
"""
PLAIN = """
    def test_drawn():
        with Path("drawn").open("a") as file:
            file.write(f"{random.random()}\\n")

    def test_fails_anyway():
        assert not "always"
"""


def suite(folder: Path, *tests: str) -> dict[str, Any]:
    """What the script says of a suite of these tests, and its exit status."""
    (folder / "tests").mkdir()
    (folder / "pyproject.toml").touch()
    body = "import os\nimport random\nfrom pathlib import Path\n" + "\n".join(map(textwrap.dedent, tests))
    (folder / "tests/test_it.py").write_text(body)
    command = [sys.executable, str(SCRIPT), str(folder / "tests/test_it.py"), "--json", "result.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    result = json.loads((folder / "result.json").read_text())["suites"][folder.name]
    return {**result, "exit": done.returncode}


def test_a_test_that_only_fails_with_twinkle_is_named_and_one_that_fails_once_is_not(tmp_path: Path) -> None:
    result = suite(tmp_path, PLAIN, DIFFERS, UNSTEADY)
    assert list(result["new failures"]) == ["tests/test_it.py::test_differs"]
    assert result["unsteady"] == ["tests/test_it.py::test_unsteady"]
    assert (result["plain"]["failed"], result["twinkle"]["failed"], result["exit"]) == (1, 3, 1)


def test_a_run_in_which_no_kernel_ran_told_nothing_and_both_draw_the_same_numbers(tmp_path: Path) -> None:
    result = suite(tmp_path, PLAIN)
    assert (result["new failures"], result["kernels"]["active"], result["exit"]) == ({}, {}, 2)
    drawn = (tmp_path / "drawn").read_text().split()
    assert len(drawn) == 2
    assert len(set(drawn)) == 1


def test_kernels_are_counted_by_op_and_those_given_up_have_their_reason() -> None:
    spec = importlib.util.spec_from_file_location("suites_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    norm = {"target": "m:Norm", "kernel": "rms_norm", "source": "embedded rms_norm (llama), plain torch"}
    head = {"target": "m:Head", "kernel": "causal_lm_loss", "source": "embedded causal_lm_loss"}
    assert script.kernels(
        [
            {**norm, "state": "active", "reason": "", "most_instances": 5},
            {**norm, "state": "failed", "reason": "computes something else", "most_instances": 0},
            {**head, "state": "pending", "reason": "has not run yet", "most_instances": 1},
        ]
    ) == {
        "in place": {"causal_lm_loss": 1, "rms_norm": 1},
        "active": {"rms_norm": 1},
        "given up": ["m:Norm (rms_norm): computes something else"],
    }
