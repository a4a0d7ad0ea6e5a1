"""What is said of a kernel that is left out: what, where, found, expected and what to do."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from twinkle.errors import TwinkleWarning
from twinkle.hooks.imports import watch_module
from twinkle.kernel import apply_function_kernel, kernelize_model, register_kernels

if TYPE_CHECKING:
    from pathlib import Path

    from twinkle.registry import Registry

pytestmark = pytest.mark.usefixtures("clean_registry")


class Scaled(nn.Module):
    def forward(self, x, scale=1.0):
        return x * scale


class KeywordOnly(nn.Module):
    def forward(self, x, *, scale=1.0):
        return x * scale


class Renamed(nn.Module):
    def forward(self, x, factor=1.0):
        return x * factor


class Raising(nn.Module):
    def forward(self, x, scale=1.0):
        raise ValueError("no such shape")


def warning_about(kernel: type | str, *, package: Path | None = None) -> warnings.WarningMessage:
    """The one warning that kernelizing a model with ``kernel`` and running it gives."""
    source = {"layer_impl": kernel}
    if package is not None:
        source = {"repo_path": package.parent, "package_name": package.name, "layer_name": kernel}
    register_kernels({"layers": {"Bad": {"target": Scaled, **source}}})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = kernelize_model(nn.Sequential(Scaled()))
        assert torch.equal(model(torch.ones(2)), torch.ones(2))
    (warning,) = (one for one in caught if one.category is TwinkleWarning)
    return warning


@pytest.mark.parametrize("kernel", [KeywordOnly, Renamed, Raising])
def test_the_warning_says_where_the_kernel_was_registered(kernel):
    assert f"where:    {__file__}:" in str(warning_about(kernel).message)


@pytest.mark.parametrize("kernel", [KeywordOnly, Renamed, Raising])
def test_the_warning_stands_at_a_line_of_the_program(kernel):
    assert warning_about(kernel).filename == __file__


def test_a_warning_from_within_an_import_stands_at_the_line_that_imports(tmp_path, monkeypatch):
    (tmp_path / "warned_of.py").write_text("def double(x): return 2 * x")
    monkeypatch.syspath_prepend(tmp_path)
    bad = {"target_module": "warned_of", "func_impl": "warned_of:twice"}
    register_kernels({"functions": {"double": bad}})
    watch = watch_module("warned_of", lambda module, name: apply_function_kernel(name))
    try:
        with pytest.warns(TwinkleWarning) as caught:
            importlib.import_module("warned_of")
    finally:
        watch.cancel()
    assert [warning.filename for warning in caught] == [__file__]


def test_the_signature_found_is_written_as_in_the_source():
    assert "found forward(self, x, *, scale=1.0)" in str(warning_about(KeywordOnly).message)


def test_the_warning_and_the_report_say_what_to_do(clean_registry: Registry):
    assert "rename it to 'scale'" in str(warning_about(Renamed).message)
    (binding,) = clean_registry.bindings
    assert "rename it to 'scale'" in binding.reason


def test_a_misspelt_layer_of_a_package_is_suggested(tmp_path):
    package = tmp_path / "kernels_here"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "layers.py").write_text("from torch import nn\nclass FastScaled(nn.Module): pass\n")
    assert "did you mean 'FastScaled'?" in str(warning_about("FastScale", package=package).message)
