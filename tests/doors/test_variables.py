"""The variables count for every way in, and no word of Twinkle stands in a program's way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from twinkle._environment import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
ACTIVE = "import sys; print(any(type(f).__module__.startswith('twinkle') for f in sys.meta_path))"


def with_variables(door, **environ):
    return type(door)(door.folder, door.prefix, **{**door.environ, **environ})


@pytest.fixture
def bare(doors):
    """The installed door, with no variable set."""
    return type(doors["pth"])(doors["pth"].folder)


@pytest.mark.parametrize("file", ["twinkle.pth", "sitecustomize_template/sitecustomize.py"])
def test_doors_ask_for_the_same_variables(file):
    text = (ROOT / file).read_text()
    assert [name for name in VARIABLES if f'"{name}"' not in text] == []
    assert text.count('"TWINKLE_') == len(VARIABLES)


@pytest.mark.parametrize(
    ("value", "opens"), [("auto", True), ("rms_norm", True), ("off", False), ("", False)]
)
def test_kernels_alone_open_the_door(bare, value, opens):
    done = with_variables(bare, TWINKLE_KERNELS=value).run("-c", ACTIVE)
    assert (done.stdout, done.stderr) == (f"{opens}\n", "")


def test_a_report_alone_is_written_and_says_why_nothing_is_bound(bare, tmp_path):
    door = with_variables(bare, TWINKLE_REPORT="r.json")
    done = door.run("-c", ACTIVE, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("False\n", "")  # it puts nothing in place
    (remark,) = json.loads((tmp_path / "r.json").read_text())["remarks"]
    assert remark.startswith("nothing is bound: nothing was registered, and the embedded kernels are off")
    assert "TWINKLE_CONFIG=auto" in remark


def test_a_report_alone_brings_in_no_hooks(bare, tmp_path):
    rooms = "('twinkle.hooks', 'twinkle.apply')"
    code = f"import sys; print([name for name in sys.modules if name.startswith({rooms})])"
    done = with_variables(bare, TWINKLE_REPORT="r.json").run("-c", code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert (tmp_path / "r.json").exists()


def test_a_log_alone_prints_the_report(bare):
    done = with_variables(bare, TWINKLE_LOG="info").run("-c", "print('ran')")
    assert done.stdout == "ran\n"
    assert "nothing is bound" in done.stderr


API = """
    import warnings; warnings.simplefilter("ignore")
    import torch
    from torch import nn
    from twinkle.kernel import register_layer_kernel, register_external_layer, kernelize_model
    class Layer(nn.Module):
        def forward(self, x): return x + 7
    class Kernel(nn.Module):
        def forward(self, x): return x + 1
    class Bad(nn.Module):
        def forward(self, y, z): return y
    import sys
    register_layer_kernel("K", layer_impl=Bad if sys.argv[1:] else Kernel)
    register_external_layer(Layer, "K")
    model = Layer()
    kernelize_model(model, mode="inference")
    with torch.no_grad():
        print(int(model(torch.zeros(1))))
"""


@pytest.fixture
def api(bare, tmp_path):
    """Run a program that only calls the API; with an argument its kernel does not fit."""
    (tmp_path / "api.py").write_text(textwrap.dedent(API))

    def run(*arguments, **environ):
        import torch

        site = str(Path(torch.__file__).parents[1])
        path = os.pathsep.join([site, *filter(None, [environ.pop("PYTHONPATH", None)])])
        door = with_variables(bare, PYTHONPATH=path, OMP_NUM_THREADS="1", **environ)
        return door.run("api.py", *arguments, cwd=tmp_path)

    return run


@pytest.mark.slow
def test_variables_count_for_a_program_that_only_calls_the_api(api, tmp_path):
    assert (api().stdout, api().stderr) == ("1\n", "")
    for off in ({"TWINKLE_DISABLE": "1"}, {"TWINKLE_DISABLE": "K"}, {"TWINKLE_USE_KERNELS": "0"}):
        assert api(**off).stdout == "7\n", off
    assert api(TWINKLE_VERIFY="first-use").stdout == "7\n"
    assert api("bad").stdout == "7\n"
    strict = api("bad", TWINKLE_STRICT="1")
    assert (strict.returncode, strict.stdout) == (1, "")
    assert "ApplyError" in strict.stderr
    wrong = api(TWINKLE_DEVICE="nonsense")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "ConfigError" in wrong.stderr
    assert "TWINKLE_TYPO is no variable" in api(TWINKLE_TYPO="1").stderr
    assert "mode = train has no effect" in api(TWINKLE_MODE="train").stderr
    assert api(TWINKLE_LOG="info").stderr.startswith("twinkle 0")
    api(TWINKLE_REPORT="r.json")
    assert [b["state"] for b in json.loads((tmp_path / "r.json").read_text())["bindings"]] == ["active"]


def test_package_alone_on_the_path_is_no_way_for_run(doors, tmp_path):
    shutil.copytree(ROOT / "twinkle", tmp_path / "lone/twinkle", ignore=shutil.ignore_patterns("__pycache__"))
    door = doors["run without pth"]
    lone = type(door)(door.folder, door.prefix, PYTHONPATH=str(tmp_path / "lone"))
    done = lone.run("-c", "print('ran')", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the package alone" in done.stderr


def test_folder_that_pythonpath_cannot_hold_is_no_way_for_run(doors, tmp_path):
    (tmp_path / f"a{os.pathsep}b").mkdir()
    (tmp_path / f"a{os.pathsep}b/twinkle").symlink_to(ROOT / "twinkle")
    code = f"import sys; sys.path.insert(1, {str(tmp_path / f'a{os.pathsep}b')!r}); "
    code += "from twinkle.cli import main; sys.exit(main(['run', '-c', 'print(1)']))"
    done = type(doors["pth"])(doors["sitecustomize"].folder).run("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no door of Twinkle opens" in done.stderr


STDERR = {"closed": "2>&-", "full disk": "2>/dev/full"}
MISTAKES = {
    "unknown variable": {"TWINKLE_CONFIG": "auto", "TWINKLE_FOO": "1"},
    "missing file": {"TWINKLE_CONFIG": "nowhere.toml"},
    "bad value": {"TWINKLE_KERNELS": "auto", "TWINKLE_MODE": "no mode"},
    "report that cannot be written": {"TWINKLE_REPORT": "/proc/no/r.json", "TWINKLE_LOG": "info"},
}


@pytest.mark.parametrize("name", ["pth", "sitecustomize", "run"])
@pytest.mark.parametrize("stderr", STDERR.values(), ids=STDERR.keys())
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_stdout_and_exit_code_are_the_programs_whatever_is_under_stderr(doors, name, stderr, mistake):
    if name == "run" and not {"nowhere.toml", "no mode"}.isdisjoint(mistake.values()):
        pytest.skip("an error of its own at a typed door")
    door = with_variables(doors[name], **mistake)
    command = " ".join([door.python, *door.prefix, "-c", "'print(1); raise SystemExit(3)'", stderr])
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("TWINKLE_", "_TWINKLE_", "PYTHON"))}
    done = subprocess.run(["sh", "-c", command], env=environ | door.environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "1\n")


@pytest.mark.parametrize("name", ["pth", "sitecustomize"])
def test_broken_pipe_under_stderr_does_not_stop_the_interpreter(doors, name):
    door = with_variables(doors[name], TWINKLE_FOO="1", TWINKLE_LOG="info")
    read, write = os.pipe()
    os.close(read)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("TWINKLE_", "_TWINKLE_", "PYTHON"))}
    done = subprocess.run(
        [door.python, "-c", "print(1)"], env=environ | door.environ, stdout=subprocess.PIPE, stderr=write
    )
    os.close(write)
    assert (done.returncode, done.stdout) == (0, b"1\n")


def test_broken_package_says_nothing_on_stdout(bare, tmp_path):
    environment = tmp_path / "environment"
    shutil.copytree(bare.folder, environment, symlinks=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "_checkout.pth").unlink()
    python = environment / "bin/python"
    for stderr in STDERR.values():
        done = subprocess.run(
            ["sh", "-c", f"{python} -c 'print(1)' {stderr}"],
            env={"TWINKLE_CONFIG": "auto", "PATH": os.environ["PATH"]},
            capture_output=True,
        )
        assert (done.returncode, done.stdout) == (0, b"1\n")
