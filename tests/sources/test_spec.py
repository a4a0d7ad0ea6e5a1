"""Which keys go together, and what is said of those that do not."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twinkle import config
from twinkle.config import fields
from twinkle.errors import ConfigError
from twinkle.sources import from_spec
from twinkle.sources import spec as sources
from twinkle.sources.code import CodeSource


def layer(**spec: object):
    """The source of a layer that is registered with these keys."""
    document = {"layers": {"Fast": spec}}
    return config.validate(document, where="here", allow_objects=True).layers[0].source(False)


def function(default_name: str = "silu", **spec: object):
    """The source of a function that is registered with these keys."""
    document = {"functions": {default_name: {"target_module": "m", **spec}}}
    return config.validate(document, where="here", allow_objects=True).functions[0].source(False)


class Layer(torch.nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"layer_name": "X"},
        {"repo_id": "a/b", "repo_path": "x", "package_name": "p"},
        {"repo_id": "a/b", "layer_impl": Layer},
        {"repo_path": "x"},
        {"repo_path": "", "package_name": "p"},
        {"repo_path": 3, "package_name": "p"},
        {"repo_path": "x\0y", "package_name": "p"},
        {"repo_path": "x", "package_name": "my-kernels"},
        {"repo_path": "x", "package_name": "p", "version": 1},
        {"repo_path": "x", "package_name": "p", "revision": "main"},
        {"repo_path": "x", "package_name": "p", "layer_name": "a b"},
        {"repo_id": "a/b", "package_name": "p"},
        {"repo_id": "ab"},
        {"repo_id": "a/b", "version": 1, "revision": "main"},
        {"repo_id": "a/b", "version": "one"},
        {"repo_id": "a/b", "revision": 3},
        {"repo_id": "a/b", "trust_remote_code": 3},
        {"layer_impl": Layer, "layer_name": "X"},
        {"layer_impl": Layer()},
        {"layer_impl": len},
        {"layer_impl": int},
        {"layer_impl": "nothing"},
        {"func_impl": len},
        {"package_name": "pkg:A", "layer_name": "B"},
        {"package_name": "pkg:"},
        {"package_name": "pkg", "attributes": [1]},
    ],
    ids=str,
)
def test_a_combination_that_cannot_be_right_is_a_config_error(spec):
    with pytest.raises(ConfigError) as caught:
        layer(**spec)
    assert "here (layers.Fast" in str(caught.value)


@pytest.mark.parametrize(
    "spec", [{"func_impl": 3}, {"repo": object()}, {"repo": Layer}, {"layer_impl": Layer}]
)
def test_a_function_needs_something_callable(spec):
    with pytest.raises(ConfigError):
        function(**spec)


def test_an_autograd_function_is_refused_with_its_apply():
    class Square(torch.autograd.Function):
        pass

    with pytest.raises(ConfigError, match=r"Square\.apply"):
        function(func_impl=Square)


def test_none_is_as_good_as_absent():
    source = layer(repo_path="x", package_name="p", repo_id=None, layer_name=None, version=None)
    assert source.kind == "local"


def test_the_layer_is_called_as_the_kernel_unless_named():
    assert layer(repo_path="x", package_name="p").name == "Fast"
    assert layer(repo_path="x", package_name="p", layer_name="Other").name == "Other"


def test_the_kernel_of_a_method_is_called_as_the_method():
    assert function("Rotary.forward", repo_path="x", package_name="p").name == "forward"


def test_a_relative_path_starts_at_the_config_file():
    source = from_spec(
        {"repo_path": "kernels", "package_name": "p"}, kind="layer", default_name="A", base_dir="/etc/tw"
    )
    assert source.repo_path == "/etc/tw/kernels"


def test_a_relative_path_without_a_config_file_starts_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = layer(repo_path="kernels", package_name="p")
    monkeypatch.chdir("/")
    assert source.repo_path == str(tmp_path / "kernels")


def test_a_path_object_and_a_tilde_are_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/someone")
    assert layer(repo_path=Path("~/kernels"), package_name="p").repo_path == "/home/of/someone/kernels"


def test_the_mapping_is_not_changed():
    spec = {"repo_path": "x", "package_name": "p", "layer_name": "A"}
    copy = dict(spec)
    layer(**spec)
    from_spec(spec, kind="layer", default_name="A", base_dir=None)
    assert spec == copy


@pytest.mark.parametrize("version", [0, 1, "1", "0.1.0", ">=1,<3", None])
def test_versions_in_every_writing_are_registered(version):
    assert layer(repo_id="a/b", version=version).kind == "hub"


@pytest.mark.parametrize("version", [True, -1, 0.1, "", "one", ">=", ">=1,", [1]])
def test_a_malformed_version_is_refused_at_registration(version):
    with pytest.raises(ConfigError, match="version"):
        layer(repo_id="a/b", version=version)
    with pytest.raises(ConfigError, match="malformed version"):
        from_spec({"repo_id": "a/b", "version": version}, kind="layer", default_name="Fast", base_dir=None)


def test_a_path_as_repo_id_is_told_about_repo_path():
    with pytest.raises(ConfigError) as caught:
        layer(repo_id="./kernels")
    assert "repo_path" in caught.value.fix


def test_a_package_and_the_name_in_it_may_be_one_string():
    for more in ({}, {"repo_path": "x"}):
        source = layer(package_name="pkg:Other", **more)
        assert (source.package, source.name) == ("pkg", "Other")


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["a/b", "pkg", "pkg.mod:Name", "1", ">=1,<3", "main", "/tmp/x", Layer, len, {"a": 1}, [1]]
    ),
)
KEYS = st.sampled_from(
    [
        *("layer_impl", "func_impl", "repo", "repo_path", "package_name", "layer_name", "func_name"),
        *("repo_id", "version", "revision", "trust_remote_code", "attributes", "device"),
    ]
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spec=st.dictionaries(KEYS, VALUES, max_size=5), kind=st.sampled_from(["layer", "function"]))
def test_anything_is_a_source_or_a_config_error(spec, kind):
    with contextlib.suppress(ConfigError):
        source = layer(**spec) if kind == "layer" else function(**spec)
        assert isinstance(source.describe(), str)


@pytest.mark.parametrize(("kind", "keys"), [("layer", fields.LAYER_KEYS), ("function", fields.FUNCTION_KEYS)])
def test_every_key_of_a_source_has_its_values_checked(kind, keys):
    assert set(sources.source_keys(kind)) <= set(keys)


def test_a_new_source_is_one_record(monkeypatch):
    """Its rules, their messages and the object that is built all come from the record."""
    made = []

    def build(registration):
        made.append((registration.keys["wheel"], registration.name, registration.where))
        return CodeSource(Layer, kind=registration.kind)

    rule = sources.SourceRule(
        "wheel", build, kinds=("layer",), needs={"package_name": ("the package in it", "p")}
    )
    monkeypatch.setattr(sources, "SOURCES", (*sources.SOURCES, rule))
    monkeypatch.setitem(fields.LAYER_KEYS, "wheel", lambda value, objects: value)
    assert layer(wheel="k.whl", package_name="p").kind == "code"
    assert made == [("k.whl", "Fast", "here (layers.Fast)")]
    for spec, message in (
        ({"wheel": "k.whl"}, "wheel without package_name"),
        ({"wheel": "k.whl", "package_name": "p", "version": 1}, "version has no meaning beside wheel"),
        ({"wheel": "k.whl", "repo_id": "a/b"}, "two sources for one kernel: both repo_id and wheel"),
    ):
        with pytest.raises(ConfigError, match=message):
            layer(**spec)
    with pytest.raises(ConfigError, match="unknown key 'wheel'"):
        function(wheel="k.whl", func_impl=len)


def test_registering_imports_next_to_nothing():
    program = """
import sys
import twinkle.errors, twinkle.modes
from twinkle.sources import from_spec
specs = [
    ("layer", {"layer_impl": "a:B"}),
    ("layer", {"repo_path": "x", "package_name": "p"}),
    ("layer", {"package_name": "p:B"}),
    ("function", {"func_impl": "a.b"}),
    ("layer", {"repo_id": "a/b"}),
]
for kind, spec in specs:
    from_spec(spec, kind=kind, default_name="n", base_dir=None, trust_remote_code=False, where="w")
heavy = {"torch", "typing", "inspect", "logging", "pathlib", "dataclasses", "importlib.metadata", "ast"}
print(sorted(heavy & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
