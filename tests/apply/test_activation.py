"""From a configuration to kernels in place, without a call in the program."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Program

LAYER = """
    [layers.Plus]
    target = "pkg.layers:Scale"
    repo_path = "kernels"
    package_name = "my_kernels"
"""
FUNCTION = """
    [functions.add]
    target_module = "pkg.ops"
    repo_path = "kernels"
    package_name = "my_kernels:plus_one"
"""
USE = """
    import torch
    from pkg.layers import Scale
    x = torch.zeros(4)
"""
ADD = """
    [functions.add]
    target_module = "pkg.ops"
    func_impl = "impl:plus_one"
"""


@pytest.fixture(autouse=True)
def _implementation(program: Program) -> None:
    (program.root / "site" / "impl.py").write_text(
        "def plus_one(x, y):\n    return x + y + 1\n\n\n"
        "def broken(x, y):\n    raise RuntimeError('on purpose')\n"
    )


def test_a_named_layer_is_replaced_at_its_construction(program: Program) -> None:
    done = program.run(USE + "    print(Scale()(x).tolist())", LAYER)
    assert done.stdout == "[1.0, 1.0, 1.0, 1.0]\n"


def test_the_report_names_target_kernel_source_state_and_count(program: Program) -> None:
    (binding,) = program.bindings(USE + "    a, b = Scale(), Scale(); a(x)", LAYER)
    assert (binding["target"], binding["kernel"], binding["state"], binding["instances"]) == (
        "pkg.layers:Scale",
        "Plus",
        "active",
        2,
    )
    assert "my_kernels" in binding["source"]
    assert "twinkle.toml:2 (layers.Plus)" in binding["origin"]


def test_a_subclass_that_inherits_forward_is_replaced(program: Program) -> None:
    done = program.run(USE + "    from pkg.layers import ScaleMLP; print(ScaleMLP()(x).sum().item())", LAYER)
    assert done.stdout == "4.0\n"


def test_a_subclass_that_overrides_forward_is_left_alone(program: Program) -> None:
    code = (
        USE
        + """
    class Mine(Scale):
        def forward(self, x):
            return x - 5
    print(Mine()(x)[0].item())
    """
    )
    assert program.run(code, LAYER).stdout == "-5.0\n"


def test_a_pattern_finds_its_classes(program: Program) -> None:
    config = LAYER.replace("pkg.layers:Scale", "pkg.*:*MLP")
    code = (
        USE
        + "    from pkg.layers import ScaleMLP; print(Scale()(x).sum().item(), ScaleMLP()(x).sum().item())"
    )
    assert program.run(code, config).stdout == "0.0 4.0\n"


def test_the_constructor_keeps_its_signature(program: Program) -> None:
    code = USE + "    import inspect; print(inspect.signature(Scale), inspect.signature(Scale.__init__))"
    expected = (
        "(size: int = 4, *, fill: float = 1.0) -> None (self, size: int = 4, *, fill: float = 1.0) -> None\n"
    )
    assert program.run(code, LAYER).stdout == expected


def test_a_module_imported_before_activation_is_replaced_too(program: Program) -> None:
    code = """
    import pkg.layers, torch
    from pkg.user import three
    twinkle.activate("twinkle.toml")
    print(pkg.layers.Scale()(torch.zeros(4)).sum().item(), three())
    """
    (program.root / "twinkle.toml").write_text((LAYER + FUNCTION).replace("\n    ", "\n"))
    done = program.run(code, TWINKLE_CONFIG="auto")
    assert done.stdout == "4.0 4\n"


def test_a_function_is_replaced_for_everyone_who_took_it(program: Program) -> None:
    assert program.run("from pkg.user import three; import torch; print(three())", FUNCTION).stdout == "4\n"


def test_a_reload_is_patched_again_for_everyone(program: Program) -> None:
    code = """
    import importlib, pkg.ops, torch
    from pkg import layers
    from pkg.user import three
    before = layers.Scale
    importlib.reload(pkg.ops), importlib.reload(layers)
    assert layers.Scale is not before
    print(pkg.ops.add(1, 2), three(), layers.Scale()(torch.zeros(4)).sum().item())
    """
    assert program.run(code, LAYER + FUNCTION).stdout == "4 4 4.0\n"


def test_a_method_is_replaced(program: Program) -> None:
    config = """
    [functions."Box.get"]
    target_module = "pkg.ops"
    func_impl = "impl:get"
    """
    (program.root / "site" / "impl.py").write_text("def get(self, x):\n    return x, self\n")
    done = program.run("import torch; from pkg.ops import Box; b = Box(); print(b.get(3) == (3, b))", config)
    assert done.stdout == "True\n"


def test_a_function_for_inference_runs_only_without_gradients(program: Program) -> None:
    code = """
    import torch
    from pkg.ops import add
    x = torch.zeros(1)
    with torch.no_grad():
        print(add(x, x).item())
    print(add(x, x).item())
    """
    assert program.run(code, ADD + '    mode = "inference"').stdout == "1.0\n0.0\n"


def test_a_layer_kernel_that_raises_at_its_first_call_is_taken_out(program: Program) -> None:
    code = USE + "    m = Scale(); print(m(x).sum().item(), m(x).sum().item())"
    config = LAYER + '    layer_name = "Broken"'
    done = program.run(code, config)
    assert done.stdout == "0.0 0.0\n"
    assert "broken on purpose" in done.stderr
    (binding,) = program.bindings(code, config)
    assert binding["state"] == "quarantined"
    assert "broken on purpose" in binding["reason"]


def test_a_function_kernel_that_raises_at_its_first_call_is_taken_out(program: Program) -> None:
    config = ADD.replace("plus_one", "broken")
    code = "import torch; from pkg.user import three; assert three() == 3 == three()"
    (binding,) = program.bindings(code, config)
    assert binding["state"] == "quarantined"


@pytest.mark.parametrize(
    ("change", "state", "reason"),
    [
        (("pkg.layers:Scale", "pkg.layers:Scael"), "failed", "did you mean 'Scale'"),
        (("pkg.layers:Scale", "pkg.layers:NoLayer"), "failed", "no nn.Module"),
        (("pkg.layers:Scale", "pkg.nothing:Scale"), "pending", "there is no module pkg.nothing"),
        (('"my_kernels"', '"your_kernels"'), "failed", "your_kernels"),
        (('"kernels"', '"kernel"'), "failed", "kernel"),
        (("[layers.Plus]", "[layers.Pluss]"), "failed", "Plus"),
    ],
    ids=["class", "no layer", "module", "package", "path", "kernel class"],
)
def test_what_is_missing_leaves_the_program_unharmed(
    program: Program, change: tuple[str, str], state: str, reason: str
) -> None:
    code = USE + "    assert Scale()(x).sum().item() == 0"
    (binding,) = program.bindings(code, LAYER.replace(*change))
    assert binding["state"] == state
    assert reason in binding["reason"]


def test_strict_makes_it_an_error_of_the_program(program: Program) -> None:
    config = "[twinkle]\nstrict = true\n" + ADD.replace("impl:plus_one", "impl:nothing").replace(
        "\n    ", "\n"
    )
    done = program.run("import torch, pkg.ops", config, check=False)
    assert done.returncode == 1
    assert "nothing" in done.stderr


@pytest.mark.parametrize(
    "variables",
    [{"TWINKLE_DISABLE": "1"}, {"TWINKLE_USE_KERNELS": "0"}, {"TWINKLE_DISABLE": "Plus"}],
    ids=lambda variables: "=".join(*variables.items()),
)
def test_the_off_switches(program: Program, variables: dict[str, str]) -> None:
    assert program.run(USE + "    print(Scale()(x).sum().item())", LAYER, **variables).stdout == "0.0\n"


def test_a_table_on_stderr_when_log_is_info(program: Program) -> None:
    done = program.run(USE + "    Scale()(x)", LAYER, TWINKLE_LOG="info")
    assert done.stdout == ""
    (row,) = [line for line in done.stderr.splitlines() if "pkg.layers:Scale" in line]
    assert row.split()[:2] == ["+", "active"]


def test_nothing_on_stderr_by_default(program: Program) -> None:
    assert program.run(USE + "    Scale()(x)", LAYER).stderr == ""


def test_json_where_twinkle_report_says(program: Program) -> None:
    program.run(USE + "    Scale()(x)", LAYER, TWINKLE_REPORT="r.json")
    assert json.loads((program.root / "r.json").read_text())["bindings"][0]["state"] == "active"


def test_layers_from_a_variable(program: Program) -> None:
    inline = 'Plus = { target = "pkg.layers:Scale", repo_path = "kernels", package_name = "my_kernels" }'
    done = program.run(USE + "    print(Scale()(x).sum().item())", TWINKLE_LAYERS=inline)
    assert done.stdout == "4.0\n"


def test_registrations_after_activation_are_watched_as_well(program: Program) -> None:
    code = """
    import torch
    from twinkle.kernel import register_external_layer, register_layer_kernel
    register_layer_kernel("late", repo_path="kernels", package_name="my_kernels", layer_name="Plus")
    register_external_layer("pkg.layers:Scale", "late")
    from pkg.layers import Scale
    print(Scale()(torch.zeros(4)).sum().item())
    """
    assert program.run(code, TWINKLE_CONFIG="auto").stdout == "4.0\n"


def test_a_model_built_on_meta_gets_its_kernels_when_it_has_data(program: Program) -> None:
    code = """
    import torch
    from pkg.layers import Scale
    with torch.device("meta"):
        model = torch.nn.Sequential(Scale())
    model.to_empty(device="cpu")
    model[0].weight.data.fill_(2)
    print(model(torch.ones(4)).sum().item())
    """
    assert program.run(code, LAYER).stdout == "12.0\n"


def test_activating_twice_is_activating_once(program: Program) -> None:
    (binding,) = program.bindings("    twinkle.activate()" + USE + "    m = Scale()", LAYER)
    assert binding["instances"] == 1


def test_a_plugin_that_is_not_there_is_said(program: Program) -> None:
    done = program.run("print(1)", '[twinkle]\nplugins = ["nobody"]\n', check=False)
    assert done.returncode == 1
    assert "nobody" in done.stderr
