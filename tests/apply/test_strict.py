"""``strict`` and ``use_fallback = false`` make an error of what is silent otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Program

LAYER = '[layers.K]\ntarget = "pkg.layers:Scale"\nrepo_path = "kernels"\npackage_name = "my_kernels"\n'
FUNCTION = '[functions.add]\ntarget_module = "pkg.ops"\nrepo_path = "kernels"\n'
WRONG = {
    "a layer that is not there": LAYER + 'layer_name = "Plsu"\n',
    "a layer that raises at its first call": LAYER + 'layer_name = "Broken"\n',
    "a package that is not there": LAYER.replace("my_kernels", "no_kernels"),
    "a target that is not there": LAYER.replace(":Scale", ":Sclae") + 'layer_name = "Plus"\n',
    "a function that is not there": FUNCTION + 'package_name = "my_kernels:plus_oen"\n',
    "a function that raises at its first call": FUNCTION + 'package_name = "my_kernels.layers:broken"\n',
}
USE = """
    import torch, pkg.ops
    from pkg.layers import Scale
    Scale()(torch.zeros(4)), pkg.ops.add(1, 2)
    print("silent")
"""


@pytest.fixture
def program(program_with_torch: Program) -> Program:
    return program_with_torch


@pytest.mark.parametrize("setting", ["strict = true", "use_fallback = false"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_an_error_of_the_program(program: Program, wrong: str, setting: str) -> None:
    done = program.run(USE, f"[twinkle]\n{setting}\n{wrong}", check=False)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "twinkle.toml:" in done.stderr or "broken on purpose" in done.stderr


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_without_either_the_program_runs(program: Program, wrong: str) -> None:
    assert program.run(USE, wrong).stdout == "silent\n"
