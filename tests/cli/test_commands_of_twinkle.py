"""The command line: help, versions, ``check`` and ``env``."""

from __future__ import annotations

import subprocess
import sys

import pytest

import twinkle
from twinkle.cli import COMMANDS, main
from twinkle.cli.env import clash

CONFIG = """\
[twinkle]
strict = true

[layers.MLP]
target = ["models.*:*MLP", "models.two:Other"]
layer_impl = "json:JSONEncoder"
mode = "train"

[functions.dumps]
target_module = "json"
func_impl = "json:loads"
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "twinkle.toml"
    path.write_text(CONFIG)
    return str(path)


def test_help_names_every_command_and_shows_examples(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("run", "check", "env", "examples:", "TWINKLE_CONFIG"):
        assert word in text


def test_no_command_shows_the_help_and_is_an_error(capsys):
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"twinkle {twinkle.__version__}\n"


def test_misspelt_command_is_an_error_with_a_suggestion(capsys):
    assert main(["rnu"]) == 2
    assert "did you mean 'run'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: twinkle {command}" in capsys.readouterr().out


def test_command_line_imports_no_torch_and_no_wrapt():
    code = (
        "import sys; from twinkle.cli import main; main(['check', 'auto']); main(['env']);"
        "print([n for n in ('torch', 'wrapt', 'transformers', 'kernels') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_check_shows_each_binding_with_its_source_and_line(config, capsys):
    assert main(["check", config]) == 0
    lines = capsys.readouterr().out.splitlines()
    for target in ("models.*:*MLP", "models.two:Other"):
        (line,) = [line for line in lines if target in line]
        assert "json:JSONEncoder" in line
        assert "train" in line
        assert f"{config}:4" in line
    (line,) = [line for line in lines if "json:dumps" in line]
    assert "json:loads" in line


def test_check_shows_the_settings(config, capsys):
    main(["check", config])
    assert "strict             yes" in capsys.readouterr().out


def test_check_of_a_wrong_config_ends_with_2(tmp_path, capsys):
    path = tmp_path / "twinkle.toml"
    path.write_text("[twinkle]\nstrct = true\n")
    assert main(["check", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}:2" in error
    assert "strict" in error


def test_check_load_says_what_does_not_load_and_ends_with_1(tmp_path, capsys):
    path = tmp_path / "twinkle.toml"
    path.write_text("[functions.nothing]\ntarget_module = 'json'\nfunc_impl = 'json:missing'\n")
    assert main(["check", "--load", str(path)]) == 1
    error = capsys.readouterr().err
    assert "kernel nothing" in error
    assert "target json:nothing" in error


def test_check_says_that_twinkle_is_switched_off(config, capsys, monkeypatch):
    monkeypatch.setenv("TWINKLE_DISABLE", "1")
    assert main(["check", config]) == 0
    assert "switched off" in capsys.readouterr().out


def test_check_says_what_was_left_out(config, capsys, monkeypatch):
    monkeypatch.setenv("TWINKLE_DISABLE", "MLP")
    main(["check", config])
    assert "left out: MLP" in capsys.readouterr().out


def test_env_shows_versions_doors_and_variables(capsys, monkeypatch):
    monkeypatch.setenv("TWINKLE_MODE", "train")
    main(["env"])
    text = capsys.readouterr().out
    for word in (
        f"twinkle {twinkle.__version__}",
        "torch ",
        "installed",
        "sitecustomize",
        "TWINKLE_MODE=train",
    ):
        assert word in text


def test_other_package_of_our_name_is_noticed(tmp_path, monkeypatch, capsys):
    assert clash([str(tmp_path), str(tmp_path / "missing")]) is None
    (tmp_path / "twinkle_kit-0.2.0.dist-info").mkdir()
    assert "twinkle-kit" in clash([str(tmp_path)])
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["env"]) == 1
    assert "pip uninstall twinkle-kit" in capsys.readouterr().out
