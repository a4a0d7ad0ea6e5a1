"""At the end of a program: what was asked for and did nothing, in words that are true then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from twinkle.report import idle
from twinkle.targets import Name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Run = "Callable[..., subprocess.CompletedProcess[str]]"


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program beside the modules ``lib`` and ``pkg``, with what ``TWINKLE_FUNCTIONS`` asks for."""
    tmp_path.chmod(0o755)
    (tmp_path / "lib.py").write_text("def f(x): return x\n")
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/__init__.py").write_text("from pkg.inner import f as _f\n")
    (tmp_path / "pkg/inner.py").write_text("def f(x): return x\nvalue = 1\n")
    (tmp_path / "fast.py").write_text("def f(x): return x + 1\n")

    def run(
        program: str, target: str, *, torch: bool = True, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        (tmp_path / "program.py").write_text(textwrap.dedent(program))
        module, _, name = target.partition(":")
        (tmp_path / "twinkle.toml").write_text(
            f'[functions.k]\nfunc_name = "{name}"\ntarget_module = "{module}"\nfunc_impl = "fast:f"\n'
        )
        plain = {key: value for key, value in os.environ.items() if "TWINKLE_" not in key}
        imports = "torch, runpy" if torch else "runpy"
        start = f"from twinkle._start import main; main(); import {imports}; runpy.run_path('program.py')"
        command = [sys.executable, "-c", start]
        environ = {"TWINKLE_CONFIG": "twinkle.toml", "OMP_NUM_THREADS": "1", **environ}
        return subprocess.run(command, cwd=tmp_path, env=plain | environ, capture_output=True, text=True)

    return run


SAID = {
    "not imported": ("import pkg", "lib:f", "lib was not imported yet"),
    "misspelt module": ("import lib", "lbi:f", "there is no module lbi; did you mean 'lib'?"),
    "misspelt submodule": ("import pkg", "pkg.iner:f", "there is no module pkg.iner; did you mean 'inner'?"),
    "no package": ("import lib", "lib.sub:f", "lib.sub"),
    "misspelt name": ("import lib", "lib:ff", "lib has no ff; did you mean 'f'?"),
    "somewhere else": ("import pkg.inner", "pkg:f", "pkg has no f; did you mean pkg.inner:f?"),
}


@pytest.mark.parametrize(("program", "target", "reason"), SAID.values(), ids=SAID.keys())
def test_what_did_nothing_is_one_line_with_its_reason(
    run: Run, program: str, target: str, reason: str
) -> None:
    done = run(program + "\nprint('ran')", target)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    lines = [line for line in done.stderr.splitlines() if line.startswith("twinkle: ")]
    assert len(lines) == 1, done.stderr
    assert target in lines[0]
    assert reason in lines[0]
    assert "twinkle.toml:1 (functions.k)" in lines[0]


def test_under_strict_it_is_an_error(run: Run) -> None:
    done = run("print('ran')", "lib:f", TWINKLE_STRICT="1")
    assert (done.returncode, done.stdout) == (1, "ran\n")
    assert "strict: 1 of the kernels that were asked for did nothing" in done.stderr


def test_what_ran_is_no_line_and_no_error(run: Run) -> None:
    done = run("import lib; print(lib.f(1))", "lib:f", TWINKLE_STRICT="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


def test_what_is_in_place_and_was_not_called_did_nothing(run: Run, tmp_path: Path) -> None:
    done = run("import lib", "lib:f", TWINKLE_REPORT="r.json")
    assert "in place, and has not run yet" in done.stderr
    (binding,) = json.loads((tmp_path / "r.json").read_text())["bindings"]
    assert (binding["state"], binding["reason"]) == ("pending", "in place, and has not run yet")


@pytest.mark.parametrize(
    "environ", [{"TWINKLE_LOG": "off"}, {"TWINKLE_DISABLE": "f"}, {"TWINKLE_DISABLE": "1"}]
)
def test_what_is_off_is_no_line(run: Run, environ: dict[str, str]) -> None:
    assert run("print('ran')", "lib:f", **environ).stderr == ""


WORKERS = """
    import multiprocessing, sys
    def work(number):
        import lib
        return lib.f(number)
    if __name__ == "__main__":
        with multiprocessing.get_context("fork").Pool(1) as pool:
            print(pool.map(work, [1]))
"""


def test_what_ran_in_a_worker_is_no_line(run: Run, tmp_path: Path) -> None:
    done = run(
        WORKERS.replace('__name__ == "__main__"', "True"), "lib:f", TMPDIR=str(tmp_path), TWINKLE_STRICT="1"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[2]\n", "")
    assert list(tmp_path.glob("twinkle-*")) == []  # the folder of the job is gone


KILLED = """
    import lib, os, signal
    child = os.fork()
    if child == 0:
        lib.f(1)
        os._exit(0)
    os.waitpid(child, 0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")
def test_the_folder_of_a_job_that_was_killed_is_removed_by_the_next(run: Run, tmp_path: Path) -> None:
    folders = tmp_path / "temporary"
    folders.mkdir()
    assert run(KILLED, "lib:f", TMPDIR=str(folders)).returncode == -signal.SIGKILL
    (left,) = folders.iterdir()
    name, pid, began = left.name.rsplit("-", 2)
    kept = [folders / f"{name}-{os.getpid()}-{began}", folders / f"{name}x-{pid}-{began}", folders / "other"]
    for folder in kept:  # of a job that runs, of another machine, of another program
        folder.mkdir()
    run("import lib; lib.f(1)", "lib:f", TMPDIR=str(folders))
    assert sorted(folders.iterdir()) == sorted(kept)


def test_report_of_a_job_says_what_its_workers_did(run: Run, tmp_path: Path) -> None:
    run(WORKERS.replace('__name__ == "__main__"', "True"), "lib:f", TWINKLE_REPORT="r.json")
    (binding,) = json.loads((tmp_path / "r.json").read_text())["bindings"]
    assert binding["state"] == "pending"
    assert [one["state"] for one in binding["elsewhere"]] == ["active"]
    assert binding["notes"] == ["in other processes of this job: active in 1"]
    assert len(list(tmp_path.glob("r.*.json"))) == 1


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 15)", "os._exit(0)"])
def test_process_that_does_not_come_to_its_end_leaves_its_report(run: Run, tmp_path: Path, end: str) -> None:
    run(f"import lib, os; lib.f(1); {end}", "lib:f", TWINKLE_REPORT="r.json")
    (binding,) = json.loads((tmp_path / "r.json").read_text())["bindings"]
    assert binding["state"] == "active"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("json.decoder", None),
        ("json.decodr", "there is no module json.decodr; did you mean 'decoder'?"),
        ("os.path", None),
        ("os.path.x", "there is no module os.path.x"),
        ("wave", None),
        ("wave.x", "wave is no package, and has no x"),
        ("no_such_package.x", "there is no module no_such_package"),
    ],
)
def test_absent_modules_are_found_without_importing_any(name: str, reason: str | None) -> None:
    if name.startswith("os.path."):
        assert idle.absent_module(name) is None  # os.path may make submodules: nobody can tell
        return
    before = set(sys.modules)
    assert idle.absent_module(name) == reason
    assert set(sys.modules) - before <= {"pkgutil"}


def test_lazy_package_is_not_made_to_import(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    class Lazy(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"{name} was asked for")

    monkeypatch.setitem(sys.modules, "tw_lazy", Lazy("tw_lazy"))
    assert idle.mistake(Name("tw_lazy", "Anything")) is None


def test_program_of_the_standard_library_alone_ends_without_a_word(run: Run) -> None:
    done = run("import json, wave; print('ran')", "lib:f", torch=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")
