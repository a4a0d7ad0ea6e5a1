"""``twinkle run``: where its options end, what it hands on, and what it refuses."""

from __future__ import annotations

import json
import os

import pytest

from twinkle import runner
from twinkle.cli import run as command
from twinkle.errors import ConfigError

COMMAND_LINES = {
    "script": (["python", "-m", "twinkle", "run", "x.py"], []),
    "console script": (["python", "/env/bin/twinkle", "run", "-m", "x"], []),
    "console script with options": (["/env/bin/python", "-s", "-I", "/env/bin/twinkle", "run"], ["-s", "-I"]),
    "one word": (["python", "-uOmtwinkle", "run"], ["-uO"]),
    "-Im": (["python", "-Im", "twinkle", "run", "-I"], ["-I"]),
    "values": (
        ["python", "-X", "dev", "-Wignore", "-W", "error", "-m", "twinkle"],
        ["-X", "dev", "-Wignore", "-W", "error"],
    ),
    "values behind letters": (
        ["python", "-uXdev", "-bW", "once", "-m", "twinkle"],
        ["-uXdev", "-bW", "once"],
    ),
    "long": (
        ["python", "--check-hash-based-pycs", "never", "-m", "twinkle"],
        ["--check-hash-based-pycs", "never"],
    ),
    "code": (["python", "-Bc", "import twinkle", "-O"], ["-B"]),
    "nothing": (["python"], []),
}


@pytest.mark.parametrize(("words", "options"), COMMAND_LINES.values(), ids=COMMAND_LINES.keys())
def test_options_of_python_are_told_from_the_program(words, options):
    assert runner.split_command(words)[0] == options


PROGRAMS = {
    "script": (["python", "-O", "x.py", "-m", "y"], ["x.py", "-m", "y"]),
    "module": (["python", "-Im", "twinkle", "-X"], ["-m", "twinkle", "-X"]),
    "module in one word": (["python", "-Bmtwinkle", "run"], ["-m", "twinkle", "run"]),
    "value that looks like a program": (["python", "-X", "x.py", "-W", "-m", "y.py"], ["y.py"]),
    "code": (["python", "-c", "pass", "a"], ["-c", "pass", "a"]),
    "dashes": (["python", "-B", "--", "x.py"], ["x.py"]),
    "standard input": (["python", "-", "a"], ["-", "a"]),
    "nothing": (["python", "-q"], []),
}


@pytest.mark.parametrize(("words", "program"), PROGRAMS.values(), ids=PROGRAMS.keys())
def test_program_is_told_from_the_options_of_python(words, program):
    assert runner.split_command(words)[1] == program


SPLITS = {
    "script": ("train.py --config x", "", "train.py --config x"),
    "option with a value": ("--config a.toml train.py", "--config a.toml", "train.py"),
    "option with an equals sign": ("--config=a.toml train.py", "--config=a.toml", "train.py"),
    "flags": ("--report --strict train.py --report", "--report --strict", "train.py --report"),
    "module": ("--report -m pkg --config x", "--report", "-m pkg --config x"),
    "module in one word": ("-mpkg a", "", "-mpkg a"),
    "code": ("--kernels off -c pass -m", "--kernels off", "-c pass -m"),
    "dashes": ("--report -- train.py -- a", "--report", "train.py -- a"),
    "dashes of the program": ("train.py -- a", "", "train.py -- a"),
    "standard input": ("--report - a", "--report", "- a"),
    "nothing": ("--report", "--report", ""),
}


@pytest.mark.parametrize(("words", "own", "program"), SPLITS.values(), ids=SPLITS.keys())
def test_our_options_end_where_the_program_begins(words, own, program):
    assert command.split(words.split()) == (own.split(), program.split())


def test_every_option_with_a_value_is_known_to_the_split():
    takes_value = {
        option
        for action in command.command_parser()._actions
        for option in action.option_strings
        if action.nargs is None
    }
    assert takes_value == set(command.WITH_VALUE)


def test_no_config_is_auto():
    assert runner.config_variable([], {}) == "auto"


def test_typed_configs_replace_the_variable_and_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = runner.config_variable(["b.toml", "auto", "/a.toml"], {"TWINKLE_CONFIG": "other.toml"})
    assert value.split(os.pathsep) == [f"{tmp_path}/b.toml", "auto", "/a.toml"]


def test_variable_counts_when_nothing_was_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runner.config_variable([], {"TWINKLE_CONFIG": f"a.toml{os.pathsep}"}) == f"{tmp_path}/a.toml"


def test_path_that_the_variable_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match="may not contain"):
        runner.config_variable([f"a{os.pathsep}b.toml"], {})


def test_options_become_variables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--strict", "--kernels", "rms_norm", "--report", "--report-file", "r.json"]
    assert command.settings(command.command_parser().parse_args(words), {}) == {
        "TWINKLE_CONFIG": "auto",
        "TWINKLE_KERNELS": "rms_norm",
        "TWINKLE_LOG": "info",
        "TWINKLE_REPORT": f"{tmp_path}/r.json",
        "TWINKLE_STRICT": "1",
    }


MISTAKES = {
    "missing": ("", "does not exist"),
    "syntax": ("[twinkle", "TOML"),
    "unknown key": ("[twinkle]\nmod = 'train'", "mod"),
    "no source": ("[layers.A]\ntarget = 'json:JSONDecoder'", "layers.A"),
}


@pytest.mark.parametrize(("text", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_wrong_config_ends_with_2_and_the_program_is_not_started(doors, text, said, tmp_path):
    if text:
        (tmp_path / "twinkle.toml").write_text(text)
    door = type(doors["run"])(doors["run"].folder, ("-m", "twinkle", "run", "--config", "twinkle.toml"))
    done = door.run("-c", "print('ran')", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("twinkle: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("--report-file", "1"), ("--config", "on"), ("--config=off",)])
def test_switch_in_place_of_a_path_ends_with_2(doors, words, tmp_path):
    door = type(doors["run"])(doors["run"].folder, ("-m", "twinkle", "run"))
    done = door.run(*words, "-c", "print('ran')", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    option, _, value = "=".join(words).partition("=")
    assert f"twinkle: {option}: not a path" in done.stderr
    assert f"write ./{value} if a file of that name is meant" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("off", [{"TWINKLE_DISABLE": "1"}, {"TWINKLE_USE_KERNELS": "0"}])
def test_off_switch_runs_the_program_unpatched(doors, off):
    door = type(doors["run"])(doors["run"].folder, ("-m", "twinkle", "run"), **off)
    done = door.run("-c", "import sys; print('twinkle.config' in sys.modules)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_report_is_printed_and_written(doors, tmp_path):
    words = ("-m", "twinkle", "run", "--kernels", "off", "--report", "--report-file", "report.json")
    done = type(doors["run"])(doors["run"].folder, words).run("-c", "print('ran')", cwd=tmp_path)
    assert done.stdout == "ran\n"
    assert "twinkle" in done.stderr.lower()
    assert json.loads((tmp_path / "report.json").read_text())["schema"]


@pytest.mark.parametrize("words", [(), ("--report",), ("-m",), ("--nonsense", "x.py")])
def test_command_line_without_a_program_is_an_error(doors, words):
    door = type(doors["run"])(doors["run"].folder, ("-m", "twinkle", "run"))
    done = door.run(*words)
    assert done.returncode == 2
    assert "usage: twinkle run" in done.stderr


def test_program_of_its_own_name_for_a_module_that_the_command_imports(doors, tmp_path):
    (tmp_path / "argparse.py").write_text("NAME = 'mine'")
    (tmp_path / "program.py").write_text("import argparse; print(argparse.NAME)")
    done = doors["console"].run(str(tmp_path / "program.py"), cwd="/")
    assert (done.stdout, done.stderr) == ("mine\n", "")
