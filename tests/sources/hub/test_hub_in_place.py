"""A fault of the Hub under a model: the original runs, the report has the reason."""

from __future__ import annotations

import warnings

import pytest
import torch
from loopback_hub import Repo, kernel_files
from torch import nn

from twinkle.errors import TwinkleError
from twinkle.kernel import (
    kernelize_model,
    register_external_layer,
    register_function_kernel,
    register_layer_kernel,
    unkernelize_model,
)

KERNEL = """
import torch.nn as nn

class Twice(nn.Module):
    def forward(self, x):
        return x + x
"""
FUNCTION = """
from . import layers

def double(x):
    return x + x
"""
FAULTS = {
    "down": (".", "drop", 0),
    "slow": ("/refs", "slow", 1.0),
    "login": ("/refs", "status", 401),
    "refused": ("/tree/", "status", 403),
    "absent": ("/refs", "status", 404),
    "limited": ("/refs", "status", 429),
    "broken": (r"GET .*/resolve/", "status", 500),
    "truncated": (r"GET .*/resolve/.*layers", "truncate", 0),
    "corrupted": (r"GET .*/resolve/.*layers", "corrupt", 0),
    "untrusted": None,
    "no variant": {"variant": "torch-cuda"},
    "import fails": {"files": {"__init__.py": "1 / 0"}},
    "dependency": {"python-depends": ["einops"]},
    "not exported": {"files": {"layers.py": "", "__init__.py": ""}},
}


class Double(nn.Module):
    def forward(self, x):
        return x * 2


def double(x):
    return x * 2


@pytest.fixture
def faulty(hub, monkeypatch, clean_registry):
    """``faulty(name)`` puts a fault between the program and a good kernel."""
    from huggingface_hub import constants, file_download

    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.3)
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.3)

    def make(name):
        fault = FAULTS[name] if name else {}
        options = dict(fault) if isinstance(fault, dict) else {}
        files = {"layers.py": KERNEL, "__init__.py": FUNCTION, **options.pop("files", {})}
        hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files=files, **options)})
        if isinstance(fault, tuple):
            hub.fault(*fault)
        if name == "untrusted":
            hub.trusted.clear()
        return hub

    return make


def register_layer():
    register_layer_kernel("Twice", repo_id="acme/my-kernel", layer_name="Twice", version=1)
    register_external_layer(Double, "Twice")


def register_function():
    register_function_kernel("double", __name__, repo_id="acme/my-kernel", version=1)


def bindings():
    from twinkle.runtime import runtime

    return runtime.registry.bindings


def test_kernel_of_the_hub_is_put_in_place(faulty):
    faulty(None)
    register_layer()
    model = kernelize_model(nn.Sequential(Double()))
    assert model(torch.ones(2)).tolist() == [2, 2]
    assert [binding.state for binding in bindings()] == ["active"]


def test_report_says_which_version_the_newest_was(faulty):
    faulty(None)
    register_layer_kernel("Twice", repo_id="acme/my-kernel", layer_name="Twice")
    register_external_layer(Double, "Twice")
    kernelize_model(nn.Sequential(Double()))(torch.ones(2))
    (binding,) = bindings()
    assert "newest version (v1 at" in binding.source
    assert any("no version was given: the newest was taken" in note for note in binding.notes)


@pytest.mark.parametrize("fault", FAULTS)
def test_original_layer_runs_and_the_report_has_the_reason(faulty, fault):
    faulty(fault)
    register_layer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kernelize_model(nn.Sequential(Double()))
        assert model(torch.ones(2)).tolist() == [2, 2]
    (binding,) = bindings()
    assert binding.state == "failed"
    assert "acme/my-kernel" in binding.reason or "torch-cpu" in binding.reason


@pytest.mark.parametrize("fault", FAULTS)
def test_without_fallback_it_raises_and_the_model_is_as_it_was(faulty, fault):
    faulty(fault)
    register_layer()
    model = nn.Sequential(Double(), nn.Linear(2, 2))
    layer, before = model[0], dict(model[0].__dict__)
    with pytest.raises(TwinkleError):
        kernelize_model(model, use_fallback=False)
    assert model[0] is layer
    assert type(layer) is Double
    assert layer.__dict__ == before


@pytest.mark.parametrize("fault", FAULTS)
def test_original_function_runs_and_without_fallback_it_raises(faulty, fault):
    faulty(fault)
    original = double
    register_function()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernelize_model(None)
    assert double(torch.ones(1)).item() == 2
    with pytest.raises(TwinkleError):
        kernelize_model(None, use_fallback=False)
    assert double is original
    unkernelize_model(None)
