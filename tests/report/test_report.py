"""The report: what it says, and that writing it harms nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from twinkle.modes import Mode
from twinkle.records import FunctionKernel, LayerKernel
from twinkle.registry import Registry
from twinkle.report.exit import write_json
from twinkle.report.records import snapshot
from twinkle.report.text import render

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _targets_can_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of the example are none of this machine, which a report would say."""
    monkeypatch.setattr("twinkle.report.idle.mistake_in", lambda text: None)


class InWords:
    kind = "code"

    def __init__(self, words: str) -> None:
        self.words = words

    def describe(self) -> str:
        return self.words

    def load(self) -> object:
        raise AssertionError("a report loads nothing")


def example() -> Registry:
    registry = Registry()
    active = registry.bind(
        LayerKernel("FastMLP", InWords("my_kernels at /k"), mode=Mode.parse("train")), "pkg.models:MLP"
    )
    active.count(28)
    active.set("active")
    failed = registry.bind(
        FunctionKernel("add", "pkg.ops", InWords("my_kernels:add"), device="cuda"), "pkg.ops:add"
    )
    failed.set("failed", "no module named my_kernels")
    failed.note("taken by name in pkg.user before the patch")
    return registry


def test_every_binding_is_a_row_with_its_state_and_counts() -> None:
    text = render(snapshot(example()), width=140)
    (row,) = [line for line in text.splitlines() if "pkg.models:MLP" in line]
    shown = "+ active pkg.models:MLP FastMLP my_kernels at /k any/train 28 layers"
    assert row.split() == shown.split()


def test_a_reason_and_notes_stand_below_their_row() -> None:
    lines = render(snapshot(example()), width=140).splitlines()
    (at,) = [i for i, line in enumerate(lines) if "pkg.ops:add" in line]
    assert [line.strip() for line in lines[at + 1 : at + 3]] == [
        "no module named my_kernels",
        "taken by name in pkg.user before the patch",
    ]


def test_the_first_line_counts_the_states() -> None:
    assert render(snapshot(example())).splitlines()[0].endswith(": 1 active, 1 failed")


@pytest.mark.parametrize("state", ["pending", "active"])
def test_layers_that_are_gone_were_met(state: str) -> None:
    """At the end of a program its models are gone: "no layer was met" was said of 5 layers that were."""
    registry, layers = Registry(), [object(), object()]
    binding = registry.bind(LayerKernel("FastMLP", InWords("my_kernels")), "collections:OrderedDict")
    assert snapshot(registry)["bindings"][0]["reason"].startswith("no layer was met")
    binding.lives_in(layers)
    binding.set(state, "in place; loads at the first forward on a cpu tensor")
    binding.ran = False
    layers.clear()
    (row,) = snapshot(registry)["bindings"]
    assert (row["state"], row["instances"], row["most_instances"]) == ("pending", 0, 2)
    assert row["reason"] == "was in place on 2 layers, now gone, and has not run"


def test_an_empty_report_says_so() -> None:
    assert "nothing is bound" in render(snapshot(Registry()))


def test_a_narrow_terminal_cuts_cells_not_reasons() -> None:
    registry = Registry()
    binding = registry.bind(LayerKernel("K", InWords("s" * 90)), "m" * 90 + ":C")
    binding.set("failed", "because " * 30)
    lines = render(snapshot(registry), width=100).splitlines()
    assert max(len(line) for line in lines) <= 100
    assert " ".join(line.strip() for line in lines[5:]) == ("because " * 30).strip()


def test_json_holds_what_the_table_shows(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(snapshot(example()), str(path))
    bindings = json.loads(path.read_text())["bindings"]
    assert [(b["target"], b["state"], b["instances"], b["mode"]) for b in bindings] == [
        ("pkg.models:MLP", "active", 28, "train"),
        ("pkg.ops:add", "failed", 0, "any"),
    ]


def test_a_report_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.mkdir()
    with pytest.raises(OSError, match="report"):
        write_json(snapshot(Registry()), str(path))
    assert list(tmp_path.iterdir()) == [path]


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if "TWINKLE_" not in key}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_program_that_fails_still_reports_and_keeps_its_exit_code(tmp_path: Path) -> None:
    code = (
        "from twinkle._bootstrap import report_at_exit\n"
        "report_at_exit(text=True, path='r.json')\nraise SystemExit(7)"
    )
    done = run(code, tmp_path)
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.startswith("twinkle ")
    assert json.loads((tmp_path / "r.json").read_text())["schema"] == 1


def test_a_child_program_does_not_overwrite_its_parents_report(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "from twinkle._bootstrap import report_at_exit\n"
        "report_at_exit(text=True, path='r.json')\n"
        "child = 'from twinkle._bootstrap import report_at_exit as r; r(text=True, path=\"r.json\")'\n"
        "subprocess.run([sys.executable, '-c', child], check=True)\n"
    )
    done = run(code, tmp_path)
    assert done.stderr.count("twinkle ") == 1
    assert len(list(tmp_path.glob("r.*.json"))) == 1
    assert json.loads((tmp_path / "r.json").read_text())["process"]["argv"] == ["-c"]


def test_a_report_path_that_cannot_be_written_is_said_and_harms_nothing(tmp_path: Path) -> None:
    code = "from twinkle._bootstrap import report_at_exit as r; r(path='no/such/r.json')"
    done = run(code, tmp_path)
    assert done.returncode == 0
    assert "cannot write the report to no/such/r.json" in done.stderr
