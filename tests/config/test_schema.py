"""Layers, functions and settings as one document: what is kept."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from twinkle.config.files import parse
from twinkle.config.schema import validate
from twinkle.modes import Mode
from twinkle.targets import Class, Name, Op, Pattern


def checked(text: str) -> Any:
    document, locations = parse(text, "t.toml")
    return validate(document, locate=locations, base_dir="/base")


class Layer:
    """Stands for an nn.Module."""


class Repo:
    """Stands for a repository object."""

    def load(self) -> type:
        return Layer


def add(x: int, y: int) -> int:
    return x + y


def test_a_layer_keeps_its_keys() -> None:
    layer = checked(
        """
        [layers.MLP]
        target = ["m.a:MLP", "m.*.b:*MLP"]
        repo_path = "kernels"
        package_name = "my_kernels"
        layer_name = "FastMLP"
        device = "cuda:1"
        mode = "compile|train"
        verify = "off"
        attributes = { offset = 0.5 }
        """
    ).layers[0]
    assert (layer.kind, layer.name, layer.device, layer.mode) == (
        "layer",
        "MLP",
        "cuda",
        Mode.parse("train|compile"),
    )
    assert layer.targets == (Name("m.a", "MLP"), Pattern("m.*.b", "*MLP"))
    assert (layer.verify, layer.enabled) == ("off", True)
    assert layer.attributes == {"offset": 0.5}
    assert (layer.base_dir, layer.origin) == ("/base", "t.toml:2 (layers.MLP)")
    assert layer.spec == {
        "repo_path": "kernels",
        "package_name": "my_kernels",
        "layer_name": "FastMLP",
        "device": "cuda",
        "attributes": {"offset": 0.5},
    }


def test_a_function_keeps_its_keys() -> None:
    function = checked(
        """
        [functions.silu]
        target_module = "my.act"
        repo_id = "kernels-community/activation"
        version = ">=1,<3"
        trust_remote_code = ["kernels-community/activation"]
        mode = "inference"
        """
    ).functions[0]
    assert (function.kind, function.name, function.target_module) == ("function", "silu", "my.act")
    assert (function.device, str(function.mode)) == (None, "inference")
    assert function.spec == {
        "repo_id": "kernels-community/activation",
        "version": ">=1,<3",
        "trust_remote_code": ("kernels-community/activation",),
    }


def test_settings_are_kept_as_checked_values_with_their_places() -> None:
    document = checked(
        """
        [twinkle]
        mode = "auto"
        device = "cuda:0"
        use_fallback = false
        strict = true
        verify = "first-use"
        kernels = ["rms_norm", "rotary"]
        trust_remote_code = ["a/b"]
        plugins = ["liger"]
        log = "debug"
        report = "r.json"
        """
    )
    assert document.settings == {
        "mode": None,
        "device": "cuda",
        "use_fallback": False,
        "strict": True,
        "verify": "first-use",
        "kernels": ("rms_norm", "rotary"),
        "trust_remote_code": ("a/b",),
        "plugins": ("liger",),
        "log": "debug",
        "report": "r.json",
    }
    assert document.origins["strict"] == "t.toml:6 (twinkle.strict)"


def test_one_name_may_have_several_specs() -> None:
    layers = checked(
        """
        [[layers.MLP]]
        layer_impl = "k:Train"
        mode = "train"
        [[layers.MLP]]
        layer_impl = "k:Infer"
        mode = "inference"
        """
    ).layers
    assert [(layer.name, str(layer.mode)) for layer in layers] == [("MLP", "train"), ("MLP", "inference")]
    assert [layer.origin for layer in layers] == ["t.toml:2 (layers.MLP[0])", "t.toml:5 (layers.MLP[1])"]


def test_a_section_may_be_a_list_of_specs_with_their_names() -> None:
    document = checked(
        """
        [[layers]]
        kernel_name = "MLP"
        layer_impl = "k:MLP"
        [[functions]]
        func_name = "add"
        target_module = "m"
        func_impl = "k:add"
        [[functions]]
        name = "mul"
        target_module = "m"
        func_impl = "k:mul"
        """
    )
    assert [entry.name for entry in (*document.layers, *document.functions)] == ["MLP", "add", "mul"]


def test_func_name_overrides_the_key_of_a_function() -> None:
    functions = checked(
        """
        [functions.add_cpu]
        func_name = "add"
        target_module = "m"
        func_impl = "k:add_cpu"
        device = "cpu"
        [functions.add_cuda]
        func_name = "add"
        target_module = "m"
        func_impl = "k:add_cuda"
        device = "cuda"
        """
    ).functions
    assert [(function.name, function.device) for function in functions] == [("add", "cpu"), ("add", "cuda")]


def test_a_function_of_a_local_package_may_have_a_name_of_its_own() -> None:
    text = '[functions.f]\ntarget_module = "m"\nrepo_path = "kernels"\npackage_name = "my_kernels.fast:g"\n'
    source: Any = checked(text).functions[0].source(False)
    assert (source.kind, source.package, source.name) == ("local", "my_kernels.fast", "g")


def test_match_is_kept_as_a_target() -> None:
    layer = checked('[layers.N]\ntarget = "m:A"\nmatch = "rms_norm"\nlayer_impl = "k:N"\n').layers[0]
    assert layer.targets == (Name("m", "A"), Op("rms_norm"))


@pytest.mark.parametrize("version", ["1", '"1"', '"0.1.0"', '">=0.1,<0.3"'])
def test_version_is_kept_as_written(version: str) -> None:
    text = f'[layers.N]\nrepo_id = "a/b"\nversion = {version}\n'
    assert repr(checked(text).layers[0].spec["version"]) == version.replace('"', "'")


def test_objects_are_kept_from_python() -> None:
    repo = Repo()
    document = {
        "layers": {"L": {"layer_impl": Layer, "target": [Layer, "m:B"], "mode": Mode.parse("train")}},
        "functions": {
            "add": {"target_module": "m", "func_impl": add},
            "mul": {"target_module": "m", "repo": repo, "device": None},
            "sub": {"target_module": "m", "repo_path": Path("/k"), "package_name": "p"},
        },
    }
    found = validate(document, allow_objects=True)
    assert found.layers[0].spec["layer_impl"] is Layer
    assert found.layers[0].targets == (Class(Layer), Name("m", "B"))
    assert found.functions[0].spec["func_impl"] is add
    assert found.functions[1].spec["repo"] is repo
    assert found.functions[2].spec["repo_path"] == "/k"


def test_a_torch_device_is_a_device_from_python() -> None:
    class Device:
        type = "cuda"

    document = {"layers": {"L": {"layer_impl": Layer, "device": Device()}}}
    assert validate(document, allow_objects=True).layers[0].device == "cuda"


def test_the_unified_example_of_the_specification_is_accepted() -> None:
    document = {
        "layers": {
            "linear": {
                "repo_id": "kernels-community/linear",
                "layer_name": "Linear",
                "version": "0.1.0",
                "device": "cuda",
                "mode": "train",
            },
            "conv2d": {
                "repo_path": "/path/to/local/repo",
                "package_name": "my_kernels",
                "layer_name": "Conv2d",
                "device": "cuda",
            },
        },
        "functions": {
            "add": {
                "target_module": "my_pkg.math_ops",
                "func_impl": lambda x, y: x + y + 1,
                "device": "cuda",
                "mode": "inference",
            },
            "relu": {
                "target_module": "my_pkg.activations",
                "repo_id": "kernels-community/activation",
                "revision": "main",
                "device": "cuda",
            },
        },
    }
    found = validate(document, allow_objects=True)
    assert [entry.name for entry in (*found.layers, *found.functions)] == ["linear", "conv2d", "add", "relu"]


def test_any_mapping_is_a_table_from_python() -> None:
    spec = MappingProxyType({"layer_impl": "k:L"})
    assert validate(OrderedDict(layers={"L": spec}), allow_objects=True).layers[0].name == "L"


def test_the_document_is_not_changed_and_not_shared() -> None:
    attributes = {"offset": 0.0}
    document = {"layers": {"L": {"layer_impl": Layer, "target": ["m:A"], "attributes": attributes}}}
    before = copy.deepcopy(document)
    layer = validate(document, allow_objects=True).layers[0]
    assert document == before
    attributes["offset"] = 1.0
    assert layer.attributes == {"offset": 0.0}


def test_a_second_kernel_that_is_turned_off_is_no_conflict() -> None:
    text = "[[layers.X]]\nlayer_impl = 'k:A'\n[[layers.X]]\nlayer_impl = 'k:B'\nenabled = false\n"
    assert [layer.enabled for layer in checked(text).layers] == [True, False]
