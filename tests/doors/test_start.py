"""The door of the interpreter's start: idle it costs nothing, and it never stops a program."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = "import sys; print(*sorted(sys.modules))"
ACTIVE = "import sys; print('twinkle._bootstrap' in sys.modules)"


def test_idle_interpreter_imports_nothing_more_than_a_bare_one(doors):
    bare = type(doors["pth"])(doors["sitecustomize"].folder)
    assert doors["pth"].run("-c", MODULES, plain=True).stdout == bare.run("-c", MODULES).stdout


def test_empty_variable_is_no_variable(doors):
    door = type(doors["pth"])(doors["pth"].folder, TWINKLE_CONFIG="")
    assert door.run("-c", MODULES).stdout == doors["pth"].run("-c", MODULES, plain=True).stdout


@pytest.mark.parametrize("variable", ["TWINKLE_LAYERS", "TWINKLE_FUNCTIONS"])
def test_tables_in_a_variable_open_the_door(doors, variable):
    door = type(doors["pth"])(doors["pth"].folder, **{variable: "{}", "TWINKLE_KERNELS": "off"})
    assert door.run("-c", ACTIVE).stdout == "True\n"


def test_pth_is_one_line_that_python_executes(doors):
    lines = (ROOT / "twinkle.pth").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("import ")


def test_start_file_names_a_callable_without_arguments():
    import inspect
    import pkgutil

    lines = (ROOT / "twinkle.start").read_text(encoding="utf-8-sig").splitlines()
    (entry,) = [line for line in lines if line.strip() and not line.startswith("#")]
    assert ":" in entry
    inspect.signature(pkgutil.resolve_name(entry)).bind()


def test_wrong_config_warns_once_and_the_program_runs(doors, tmp_path):
    door = type(doors["pth"])(doors["pth"].folder, TWINKLE_CONFIG=str(tmp_path / "missing.toml"))
    done = door.run("-c", "print('ran')")
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert done.stderr.count("twinkle is not active") == 1
    assert "missing.toml" in done.stderr


@pytest.mark.parametrize("name", ["pth", "sitecustomize"])
@pytest.mark.parametrize("variable", ["TWINKLE_CONFIG", "TWINKLE_REPORT", "TWINKLE_LOCK", "TWINKLE_CACHE"])
def test_switch_in_place_of_a_path_warns_and_the_program_runs(doors, name, variable, tmp_path):
    environ = {**doors[name].environ, variable: "1"}
    done = type(doors[name])(doors[name].folder, **environ).run("-c", "print('ran')", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert done.stderr.count("twinkle is not active") == 1
    assert f"{variable}: not a path" in done.stderr
    assert "write ./1 if a file of that name is meant" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("off", [{"TWINKLE_DISABLE": "1"}, {"TWINKLE_USE_KERNELS": "0"}])
def test_off_switch_closes_the_door_before_the_config_is_read(doors, off, tmp_path):
    door = type(doors["pth"])(doors["pth"].folder, TWINKLE_CONFIG=str(tmp_path / "missing.toml"), **off)
    done = door.run("-c", "import sys; print('ran', 'twinkle.config' in sys.modules)")
    assert (done.stdout, done.stderr) == ("ran False\n", "")


@pytest.mark.parametrize("damage", ["absent", "broken", "someone else's"])
def test_package_that_cannot_be_imported_does_not_stop_the_program(doors, damage, tmp_path):
    environment = tmp_path / "environment"
    shutil.copytree(doors["pth"].folder, environment, symlinks=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "_checkout.pth").unlink()
    if damage != "absent":
        (site_packages / "twinkle").mkdir()
        (site_packages / "twinkle/__init__.py").write_text("def broken(:" if damage == "broken" else "")
    door = type(doors["pth"])(environment, TWINKLE_CONFIG="auto")
    done = door.run("-c", "print('ran')")
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert "twinkle is not active" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("option", "active"), [("-I", False), ("-E", False), ("-s", True), ("-S", False)])
def test_options_of_python_that_touch_the_door(doors, option, active):
    assert doors["pth"].run("-c", ACTIVE, options=(option,)).stdout == f"{active}\n"


def test_relative_config_is_found_by_a_child_in_another_directory(doors, tmp_path):
    (tmp_path / "mine.toml").write_text("[twinkle]\nkernels = 'off'\n")
    door = type(doors["pth"])(doors["pth"].folder, TWINKLE_CONFIG="mine.toml")
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ACTIVE!r}], cwd='/')"
    done = door.run("-c", code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("True\n", "")


HEAVY = [
    *("asyncio", "dataclasses", "importlib.metadata", "inspect", "logging"),
    *("pathlib", "tomllib", "torch", "typing", "wrapt"),
]
FILE = """\
[layers.MLP]
target = "transformers.models.*.modeling_*:*MLP"
repo_path = "kernels"
package_name = "my_kernels"

[functions.rope]
target_module = "transformers.models.qwen3.modeling_qwen3"
func_name = "apply_rotary_pos_emb"
func_impl = "my_kernels.rope:apply_rotary_pos_emb"
"""


@pytest.mark.parametrize("config", ["auto", "file"])
def test_active_interpreter_has_imported_nothing_heavy(doors, config, tmp_path):
    if config == "file":
        config = str(tmp_path / "twinkle.toml")
        (tmp_path / "twinkle.toml").write_text(FILE)
    door = type(doors["pth"])(doors["pth"].folder, TWINKLE_CONFIG=config)
    done = door.run("-c", MODULES)
    assert done.stderr == ""
    imported = done.stdout.split()
    assert "twinkle.hooks.imports" in imported
    assert [name for name in HEAVY if name in imported] == []


def test_command_of_ours_does_not_open_the_door_for_itself(doors, tmp_path):
    missing = str(tmp_path / "missing.toml")
    for prefix in (("-m", "twinkle"), ("-Bmtwinkle",), (str(doors["pth"].folder / "bin/twinkle"),)):
        door = type(doors["pth"])(doors["pth"].folder, prefix, TWINKLE_CONFIG=missing)
        done = door.run("run", "-c", "print('ran')")
        assert (done.returncode, done.stdout) == (2, "")
        assert "twinkle is not active" not in done.stderr


@pytest.mark.parametrize("program", [("-c", ACTIVE, "-m", "twinkle"), ("-c", ACTIVE, "twinkle")])
def test_program_with_arguments_like_our_command_is_patched(doors, program):
    assert doors["pth"].run(*program).stdout == "True\n"
