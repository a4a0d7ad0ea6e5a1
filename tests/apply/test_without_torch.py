"""Function kernels in programs that do not import torch, or only later."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .conftest import Program

FILES = {
    "fast.py": """
def add(x, y):
    return x + y + 100

def turned(x, y):
    import pkg.ops
    return pkg.ops.add(y, x) + 100

def other(a, b):
    return a + b + 100

def broken(x, y):
    raise RuntimeError("broken on purpose")

calls = []

def breaks(x, y):
    calls.append(x)
    if len(calls) >= 3:
        raise RuntimeError("broken later")
    return x + y + 100
""",
    "heavy.py": "import torch\ndef add(x, y): return x + y + 100\n",
}


def config(kernel: str, more: str = "") -> str:
    return f'[functions.add]\ntarget_module = "pkg.ops"\nfunc_impl = "{kernel}"\n{more}\n'


@pytest.fixture
def light(program: Program) -> Program:
    for name, text in FILES.items():
        (program.root / "site" / name).write_text(text)
    return program


CALLS = """
import sys
from pkg.ops import add as mine
import pkg.ops, pkg.user
held = [pkg.ops.add]
"""
SHOW = "print(pkg.ops.add(1, 2), mine(1, 2), held[0](1, 2), pkg.user.three(), 'torch' in sys.modules)\n"


@pytest.mark.parametrize(
    ("kernel", "more", "shown"),
    [
        ("fast:add", "", "103 103 103 103 False"),
        ("fast:turned", "", "103 103 103 103 False"),
        ("heavy:add", "", "103 103 103 103 True"),
        ("fast:broken", "", "3 3 3 3 False"),
        ("fast:add", 'device = "cpu"', "3 3 3 3 False"),
        ("fast:add", 'mode = "inference"', "3 3 3 3 False"),
        ("fast:add", 'verify = "first-use"', "3 3 3 3 False"),
        ("fast:other", "", "3 3 3 3 False"),
    ],
)
def test_what_needs_no_torch_runs_without_it(light: Program, kernel: str, more: str, shown: str) -> None:
    first = "pkg.ops.add(1, 2)\n"
    assert light.run(CALLS + first + SHOW, config(kernel, more)).stdout.strip() == shown


def told(program: Program, code: str, text: str) -> dict[str, Any]:
    report = "import twinkle.report, json\nprint(json.dumps(twinkle.report.snapshot()['bindings'][0]))\n"
    lines = program.run(code + report, text).stdout.splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def test_the_report_says_what_became_of_it(light: Program) -> None:
    binding = told(light, CALLS + SHOW, config("fast:add"))
    assert (binding["state"], binding["instances"]) == ("active", 1)
    binding = told(light, CALLS, config("fast:add"))
    assert (binding["state"], binding["reason"]) == ("pending", "in place; loads at its first call")
    binding = told(light, CALLS + SHOW, config("fast:broken"))
    assert binding["state"] == "quarantined"
    assert "broken on purpose" in binding["reason"]
    binding = told(light, CALLS + SHOW, config("fast:other"))
    assert binding["state"] == "pending"
    assert "waits for the program to import torch" in binding["reason"]


@pytest.mark.parametrize("module", ["__main__", "script"])
def test_a_function_of_the_program_itself_is_named(light: Program, module: str) -> None:
    (light.root / "site" / "sitecustomize.py").write_text("import twinkle\ntwinkle.activate(door='pth')\n")
    (light.root / "script.py").write_text("def add(x, y): return x + y\nprint(add(1, 2))\n")
    text = config("fast:add").replace("pkg.ops", module)
    first = "import os, subprocess, sys\nos.environ.pop('_TWINKLE_JOB')\n"
    done = light.run(first + "subprocess.run([sys.executable, 'script.py'])", text)
    assert f"{module} is the program itself, whose functions wait for it to import torch" in done.stderr


def test_strict_raises_what_the_kernel_raises(light: Program) -> None:
    done = light.run(CALLS + SHOW, config("fast:broken"), check=False, TWINKLE_STRICT="1")
    assert done.returncode == 1
    assert "ApplyError: pkg.ops:add is not replaced" in done.stderr


def test_torch_may_come_later(light: Program) -> None:
    after = "first = pkg.ops.add\nfirst(1, 2)\nimport torch\n"
    code = CALLS + after + SHOW + "print(first(1, 2), first is pkg.ops.add)\n"
    assert light.run(code, config("fast:add")).stdout == "103 103 103 103 True\n103 True\n"
    adapted = CALLS + "import torch\n" + SHOW
    assert light.run(adapted, config("fast:add", 'mode = "train"')).stdout.split()[0] == "103"


def test_a_kernel_is_not_asked_for_before_its_module_is_imported(light: Program) -> None:
    code = CALLS + "import heavy\n" + SHOW
    assert light.run(code, config("heavy:add")).stdout.strip() == "103 103 103 103 True"


def test_the_functions_come_back(light: Program) -> None:
    code = CALLS + "import twinkle\npkg.ops.add(1, 2)\ntwinkle.runtime.runtime.reset()\n" + SHOW
    assert light.run(code, config("fast:add")).stdout.strip() == "3 3 3 3 False"


def test_only_the_names_of_the_program_are_counted(light: Program) -> None:
    binding = told(light, "import torch, pkg.ops\npkg.ops.add(1, 2)\n", config("fast:add"))
    assert (binding["state"], binding["instances"]) == ("active", 1)


def test_a_kernel_that_raises_at_a_later_call_is_taken_out(light: Program) -> None:
    code = CALLS + "print([mine(1, 2) for _ in range(5)], 'torch' in sys.modules)\nreport()\n"
    done = light.run(code, config("fast:breaks"))
    assert done.stdout.splitlines()[0] == "[103, 103, 3, 3, 3] False"
    (binding,) = json.loads(done.stdout.splitlines()[1])["bindings"]
    assert binding["state"] == "quarantined"
    assert "broken later" in binding["reason"]


def test_what_the_original_raises_as_well_leaves_the_kernel(light: Program) -> None:
    code = (
        CALLS
        + """
print(mine(1, 2))
try:
    mine(1, "2")
except TypeError as error:
    print(type(error).__name__, error.__context__)
print(mine(1, 2))
"""
    )
    done = light.run(code, config("fast:add"))
    assert done.stdout.splitlines()[:3] == ["103", "TypeError None", "103"]
