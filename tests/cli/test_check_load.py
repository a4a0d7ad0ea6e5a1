"""Plugins of a configuration at the commands, and what ``check --load`` finds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

TARGETS = """
from torch import nn
def function(x): return x
class Layer(nn.Module):
    def forward(self, x): return x
class Other(nn.Module):
    def forward(self, y, z): return y
"""
LAYERS = "from torch import nn\nclass Same(nn.Module):\n    def forward(self, x): return x\n"
BINDS = '[layers.Same]\ntarget = "tw_plugged_target:Layer"\npackage_name = "tw_plugged"\n'


@pytest.fixture
def twinkle(tmp_path):
    """``twinkle("check", …)`` as the console script, where the plugin ``norms`` is installed."""
    site = tmp_path / "site"
    (site / "tw_plugged").mkdir(parents=True)
    (site / "tw_plugged/__init__.py").touch()
    (site / "tw_plugged/layers.py").write_text(LAYERS)
    (site / "tw_plugged/bindings.toml").write_text(BINDS)
    info = site / "tw_plugged-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tw-plugged\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[twinkle.kernels]\nnorms = tw_plugged:bindings.toml\n")
    work = tmp_path / "work"
    work.mkdir()
    (work / "good.toml").write_text('[twinkle]\nplugins = ["norms"]\n')
    (work / "misspelt.toml").write_text('[twinkle]\nplugins = ["nroms"]\n')
    (work / "program.py").write_text("print('it ran')")
    (work / "tw_plugged_target.py").write_text(TARGETS)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("TWINKLE")}
        environ["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
        # -P would be Python 3.11's word for it: a console script does not have the directory on its path.
        code = "import sys; sys.path.remove(''); from twinkle.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, *words]
        return subprocess.run(command, cwd=work, env=environ, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("command", [["check"], ["run", "--config"]])
def test_a_plugin_that_is_not_installed_is_an_error_at_a_typed_door(twinkle, command):
    program = ["program.py"] if command[0] == "run" else []
    done = twinkle(*command, "misspelt.toml", *program)
    assert (done.returncode, done.stdout) == (2, "")
    assert "misspelt.toml:2 (twinkle.plugins)" in done.stderr
    assert "did you mean 'norms'?" in done.stderr


def test_check_shows_what_a_plugin_binds(twinkle):
    done = twinkle("check", "good.toml")
    assert done.returncode == 0, done.stderr
    assert "tw_plugged_target:Layer  <-  installed tw_plugged:Same" in done.stdout


def test_check_load_loads_kernels_of_plugins_and_targets_of_the_working_directory(twinkle):
    done = twinkle("check", "--load", "good.toml")
    assert done.returncode == 0, done.stderr
    assert "kernel Same: loads" in done.stdout
    assert "target tw_plugged_target:Layer: loads" in done.stdout


def test_check_load_loads_what_is_bound_by_structure(twinkle):
    from twinkle import ops

    done = twinkle("check", "--load", os.path.join(os.path.dirname(ops.__file__), "twinkle.toml"))
    assert done.returncode == 0, done.stderr
    assert "kernel rotary: loads" in done.stdout
    assert "kernel rms_norm: loads" in done.stdout


CANNOT_WORK = {
    "misspelt module": ("tw_pluged_target:Layer", "there is no module tw_pluged_target", "tw_plugged_target"),
    "misspelt class": ("tw_plugged_target:Layr", "tw_plugged_target has no Layr", "did you mean 'Layer'?"),
    "no layer": ("tw_plugged_target:function", "is no layer", "an nn.Module class"),
    "another signature": ("tw_plugged_target:Other", "forward", "z"),
}


@pytest.mark.parametrize(("target", "said", "hint"), CANNOT_WORK.values(), ids=CANNOT_WORK.keys())
def test_check_load_fails_where_a_binding_cannot_work(twinkle, tmp_path, target, said, hint):
    text = f'[layers.Same]\ntarget = "{target}"\npackage_name = "tw_plugged"\n'
    (tmp_path / "work/bad.toml").write_text(text)
    done = twinkle("check", "--load", "bad.toml")
    assert done.returncode == 1
    assert said in done.stderr
    assert hint in done.stderr
    assert ": right" not in done.stdout


def test_check_says_right_of_nothing_it_did_not_look_at(twinkle, tmp_path):
    (tmp_path / "work/bad.toml").write_text('[layers.Same]\ntarget = "a:B"\npackage_name = "nowhere"\n')
    done = twinkle("check", "bad.toml")
    assert (done.returncode, done.stderr) == (0, "")
    assert ": right" not in done.stdout
    assert "twinkle check --load" in done.stdout
