"""The sitecustomize door: it chains to what it hides, and opens once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "sitecustomize_template"
SAY = "import sys; print('twinkle._bootstrap' in sys.modules)"


@pytest.fixture
def start(doors):
    """Run a line in a bare environment with these folders on PYTHONPATH."""

    def start(*folders: object, code: str = SAY, environ: dict[str, str] | None = None):
        door = type(doors["pth"])(doors["sitecustomize"].folder)
        door.environ = {"TWINKLE_CONFIG": "auto", "TWINKLE_KERNELS": "off"} if environ is None else environ
        door.environ = door.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
        done = door.run("-c", code)
        assert done.returncode == 0, done.stderr
        return done

    return start


def hidden(folder: Path, text: str = "print('hidden ran')") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(text)
    return folder


def test_hidden_file_runs_once_and_first(start, tmp_path):
    text = "import sys; print('hidden ran', 'twinkle._bootstrap' in sys.modules)"
    done = start(TEMPLATE, hidden(tmp_path / "a", text), ROOT)
    assert (done.stdout, done.stderr) == ("hidden ran False\nTrue\n", "")


def test_hidden_package_runs(start, tmp_path):
    package = tmp_path / "sitecustomize"
    package.mkdir()
    (package / "__init__.py").write_text("from . import part")
    (package / "part.py").write_text("print('part of', __package__)")
    assert start(TEMPLATE, tmp_path, ROOT).stdout == "part of sitecustomize\nTrue\n"


def test_hidden_symlink_runs(start, tmp_path):
    real = hidden(tmp_path / "real")
    link = tmp_path / "link"
    link.mkdir()
    (link / "sitecustomize.py").symlink_to(real / "sitecustomize.py")
    assert start(TEMPLATE, link, ROOT).stdout == "hidden ran\nTrue\n"


def test_only_the_first_of_two_hidden_ones_runs_as_under_plain_python(start, tmp_path):
    first, second = hidden(tmp_path / "1", "print(1)"), hidden(tmp_path / "2", "print(2)")
    assert start(TEMPLATE, tmp_path, first, second, ROOT).stdout == "1\nTrue\n"


def test_hidden_one_in_front_of_us_is_not_run_by_us(start, tmp_path):
    assert start(hidden(tmp_path / "front"), TEMPLATE, ROOT).stdout == "hidden ran\nFalse\n"


def test_program_that_imports_sitecustomize_gets_the_hidden_one(start, tmp_path):
    folder = hidden(tmp_path / "a", "ANSWER = 42; NAME = __name__, __spec__.name, __file__")
    code = "import sitecustomize as s; print(s.ANSWER, *s.NAME)"
    file = folder / "sitecustomize.py"
    assert start(TEMPLATE, folder, ROOT, code=code).stdout == f"42 sitecustomize sitecustomize {file}\n"


def test_copy_of_the_file_found_twice_activates_and_chains_once(start, tmp_path):
    copies = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(TEMPLATE / "sitecustomize.py", folder)
        copies.append(folder)
    linked = tmp_path / "linked"
    linked.symlink_to(TEMPLATE)
    found = hidden(tmp_path / "hidden")
    done = start(TEMPLATE, copies[0], linked, TEMPLATE, copies[1], copies[0], found, ROOT)
    assert (done.stdout, done.stderr) == ("hidden ran\nTrue\n", "")


def test_hidden_one_that_fails_is_reported_by_python_and_does_not_close_the_door(start, tmp_path):
    folder = hidden(tmp_path / "a", "raise ValueError('bad hidden')")
    done = start(TEMPLATE, folder, ROOT)
    assert done.stdout == "True\n"
    assert "bad hidden" in done.stderr
    assert "Error in sitecustomize" in done.stderr


def test_interpreter_without_twinkle_runs_the_program_in_silence(start):
    done = start(TEMPLATE)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_nothing_of_twinkle_is_imported_without_a_variable(start):
    code = "import sys; print([name for name in sys.modules if name.startswith('twinkle')])"
    assert start(TEMPLATE, ROOT, code=code, environ={}).stdout == "[]\n"


@pytest.mark.parametrize("variable", ["TWINKLE_LAYERS", "TWINKLE_FUNCTIONS"])
def test_tables_in_a_variable_open_the_door(start, variable):
    assert start(TEMPLATE, ROOT, environ={variable: "{}", "TWINKLE_KERNELS": "off"}).stdout == "True\n"


def test_wrong_config_warns_once_and_the_program_runs(start, tmp_path):
    environ = {"TWINKLE_CONFIG": str(tmp_path / "missing.toml")}
    done = start(TEMPLATE, ROOT, code="print('ran')", environ=environ)
    assert done.stdout == "ran\n"
    assert done.stderr.count("twinkle is not active") == 1


def test_both_doors_open_once(doors, tmp_path):
    door = doors["pth"]
    environ = {
        "TWINKLE_CONFIG": str(tmp_path / "missing.toml"),
        "PYTHONPATH": f"{TEMPLATE}{os.pathsep}{ROOT}",
    }
    done = type(door)(door.folder, **environ).run("-c", "print('ran')")
    assert done.stdout == "ran\n"
    assert done.stderr.count("twinkle is not active") == 1
