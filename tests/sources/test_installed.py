"""Kernels of installed packages, and classes that have an __init__."""

from __future__ import annotations

import importlib
import importlib.util
import textwrap

import pytest
import torch

from twinkle.errors import KernelError, MissingDependencyError, SourceError
from twinkle.sources import from_spec
from twinkle.sources.adapters import adapt_layer, explain_lacking
from twinkle.sources.installed import InstalledSource

KERNELS = """
import torch
from torch import nn

def scaled(x, weight):
    return x * weight

class NoInit(nn.Module):
    def forward(self, x):
        return scaled(x, self.weight)

class Norm(nn.Module):
    can_torch_compile = True
    unrelated = "not needed by forward"

    def __init__(self, hidden_size, eps=1e-6, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon, self.offset, self.casting_mode = eps, offset, casting_mode
        self.in_place = in_place
        self.row_mode = row_mode

    def helper(self, x):
        return x + self.offset

    def forward(self, x):
        assert self.row_mode is None and self.casting_mode == "llama"
        return self.helper(x) * self.weight

class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, 1)
        self.act = torch.nn.SiLU() if config.act == "silu" else None

    def forward(self, x):
        return self.act(self.proj(x))

class WithSuper(NoInit):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        return super().forward(x)
"""


@pytest.fixture
def package(site_dir):
    root = site_dir / "fast_kernels"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "ops.py").write_text(textwrap.dedent(KERNELS))
    return "fast_kernels.ops"


def layer(package, **more):
    return from_spec({"package_name": package, **more}, kind="layer", default_name="Norm", base_dir=None)


def test_a_layer_by_package_and_name(package):
    assert layer(package, layer_name="NoInit").load().__name__ == "NoInit"


def test_a_layer_by_one_string(package):
    assert layer(f"{package}:NoInit").load() is layer(package, layer_name="NoInit").load()


def test_a_function(package):
    source = from_spec({"package_name": package}, kind="function", default_name="scaled", base_dir=None)
    assert source.load()(2, 3) == 6


def test_a_name_in_the_layers_module_of_a_package(site_dir):
    root = site_dir / "with_layers"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "layers.py").write_text("import torch\nclass A(torch.nn.Module): pass\n")
    assert InstalledSource("with_layers", "A", kind="layer").load().__name__ == "A"


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(MissingDependencyError, match="no module 'no_such_package'"):
        InstalledSource("no_such_package.ops", "A", kind="layer").load()


def test_a_missing_name_comes_with_what_there_is(package):
    with pytest.raises(SourceError) as caught:
        layer(f"{package}:Norn").load()
    assert caught.value.found == "Mlp, NoInit, Norm, WithSuper"
    assert caught.value.fix == "did you mean 'Norm'?"


def test_a_class_with_init_becomes_one_without_that_runs_on_its_target(package):
    given = {"offset": 1.0, "casting_mode": "llama", "in_place": True}
    adapted = layer(package, attributes=given).load()
    assert adapted.__init__ is torch.nn.Module.__init__

    class Target(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((2,), 3.0))

    Swapped = type("Swapped", (Target,), {k: v for k, v in vars(adapted).items() if k[:2] != "__"})
    assert Swapped()(torch.ones(2)).tolist() == [6.0, 6.0]


def test_an_adapted_class_has_what_forward_needs_and_nothing_else(package):
    adapted = layer(package, attributes={"offset": 1.0}).load()
    members = {name for name in vars(adapted) if not name.startswith("__")}
    assert members == {"forward", "helper", "offset", "row_mode", "can_torch_compile"}


def test_an_adapted_class_keeps_its_name_and_its_source(package):
    import inspect

    adapted = layer(package, attributes={"offset": 1.0}).load()
    assert (adapted.__module__, adapted.__qualname__) == ("fast_kernels.ops", "Norm")
    assert "def forward" in inspect.getsource(adapted.forward)


def test_a_class_without_init_is_taken_as_it_is(package):
    adapted = layer(package, layer_name="NoInit").load()
    assert adapted is importlib.import_module("fast_kernels.ops").NoInit


def test_attributes_are_given_to_a_class_without_init_too(package):
    assert layer(package, layer_name="NoInit", attributes={"weight": 3}).load().weight == 3


def test_the_class_of_the_package_is_not_changed(package):
    layer(package, attributes={"offset": 1.0}).load()
    assert "offset" not in vars(importlib.import_module("fast_kernels.ops").Norm)


def test_a_nested_module_cannot_be_an_attribute(package):
    with pytest.raises(KernelError, match=r"self\.proj of Mlp is a nested module"):
        layer(package, layer_name="Mlp", attributes={"proj": 3}).load()


def test_forward_cannot_be_an_attribute(package):
    with pytest.raises(KernelError, match="cannot replace forward"):
        layer(package, attributes={"forward": 3}).load()


def test_a_forward_that_calls_super_is_refused(package):
    with pytest.raises(KernelError, match=r"calls super\(\)"):
        layer(package, layer_name="WithSuper").load()


def test_what_a_target_lacks_is_explained_by_the_defaults_of_init(package):
    adapted = layer(package).load()
    text = explain_lacking(adapted, ["in_place", "casting_mode", "offset"])
    assert text.endswith('attributes = { in_place = true, casting_mode = "llama", offset = 0.0 }')


def test_a_nested_module_that_a_target_lacks_is_explained(package):
    adapted = layer(package, layer_name="Mlp").load()
    text = explain_lacking(adapted, ["act", "proj"])
    assert "self.act (SiLU), self.proj (Linear)" in text
    assert "never run" in text


def test_nothing_is_explained_about_a_name_that_init_does_not_set(package):
    assert explain_lacking(layer(package).load(), ["other"]) is None


def test_a_class_without_source_can_be_adapted():
    namespace = {}
    exec(
        "import torch\n"
        "class Made(torch.nn.Module):\n"
        "    def __init__(self): super().__init__()\n"
        "    def forward(self, x): return x + self.offset\n",
        namespace,
    )
    assert adapt_layer(namespace["Made"], {"offset": 2}).offset == 2


liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None,
    reason="needs liger-kernel and triton",
)


@liger
def test_liger_rms_norm_loads_and_fits_the_norm_of_a_llama():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from twinkle.fit.layer import check_layer

    source = from_spec(
        {
            "package_name": "liger_kernel.transformers:LigerRMSNorm",
            "attributes": {"offset": 0.0, "casting_mode": "llama", "in_place": True},
        },
        kind="layer",
        default_name="RMSNorm",
        base_dir=None,
    )
    fit = check_layer(source.load(), LlamaRMSNorm, instances=[LlamaRMSNorm(8)])
    assert fit.members["casting_mode"] == "llama"


@liger
def test_liger_says_what_it_needs_when_attributes_are_left_out():
    source = layer("liger_kernel.transformers:LigerRMSNorm")
    assert explain_lacking(source.load(), ["offset", "casting_mode", "in_place"]) == (
        "LigerRMSNorm.__init__ sets by default: "
        'attributes = { offset = 0.0, casting_mode = "llama", in_place = true }'
    )


@liger
def test_liger_swiglu_fits_an_mlp_without_attributes():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    from twinkle.fit.layer import check_layer

    source = layer("liger_kernel.transformers:LigerSwiGLUMLP")
    config = LlamaConfig(hidden_size=32, intermediate_size=64)
    check_layer(source.load(), LlamaMLP, instances=[LlamaMLP(config)])


@liger
def test_a_liger_function_loads():
    source = from_spec(
        {"package_name": "liger_kernel.transformers:liger_rotary_pos_emb"},
        kind="function",
        default_name="apply_rotary_pos_emb",
        base_dir=None,
    )
    assert callable(source.load())
