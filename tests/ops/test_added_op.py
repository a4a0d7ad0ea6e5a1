"""An op is one folder: one from outside the package is matched, proven, swapped and listed like any other."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest
import torch

from twinkle import op_names
from twinkle.apply.layers import kernelize_layers
from twinkle.cli import main
from twinkle.config.schema import validate
from twinkle.errors import ConfigError
from twinkle.match.structure import check_instance, recognise
from twinkle.ops import catalog, layers
from twinkle.proof.cache_key import kernel_version
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import ModuleType

    from twinkle.registry import Registry

OP = {
    "__init__.py": '''
        """Dynamic tanh: ``y = tanh(alpha · x) · w + b`` (Zhu et al., 2025)."""

        from twinkle.ops.catalog import Op

        OP = Op(
            "dynamic_tanh",
            kind="layer",
            summary="DyT layers",
            aliases=("dyt",),
            roles={"x": "input", "weight": "tensor", "bias": "tensor", "alpha": "tensor"},
            layers={"DynamicTanh": "layer"},
            backends=("torch_backend",),
        )
    ''',
    "recognition.py": '''
        """What tells the code of a dynamic tanh."""


        def core(code):
            """A bounded product, with few other steps."""
            return {"tanh", "mul"} <= code.ops and code.size < 40


        def check(instance):
            """One alpha for all channels."""
            alpha = instance.get(instance.facts["alpha"])
            if alpha.numel() != 1:
                instance.refuse(f"it has {alpha.numel()} alphas")
    ''',
    "reference.py": '''
        """The definition."""

        from dataclasses import dataclass

        import torch


        @dataclass(frozen=True)
        class DynamicTanhVariant:
            """Whether there is a bias."""

            name: str
            bias: bool = True


        def dynamic_tanh(x, weight, bias, alpha, *, variant):
            """``[..., hidden]`` to the same."""
            y = weight * torch.tanh(alpha * x)
            return y + bias if variant.bias else y


        VARIANTS = (DynamicTanhVariant("biased"), DynamicTanhVariant("plain", bias=False))
    ''',
    "torch_backend.py": '''
        """One step fewer."""

        import torch

        from twinkle.ops.build import forward_class


        def supports(variant, device=None, facts=None):
            return None if variant.bias else "it has no bias"


        def dynamic_tanh(x, weight, bias, alpha):
            return torch.addcmul(bias, torch.tanh(alpha * x), weight)


        def layer_class(variant, facts):
            return forward_class("DynamicTanh", dynamic_tanh, facts, inputs=("x",))
    ''',
    "layer.py": '''
        """What it exports."""

        from torch import nn

        from twinkle.ops.backends import layer_for


        class DynamicTanh(nn.Module):
            @staticmethod
            def for_variant(variant, facts):
                return layer_for("dynamic_tanh", variant, facts)
    ''',
    "samples.py": '''
        """Calls of it."""

        import torch
        from torch import nn

        from twinkle.ops.cases import SHAPES, Case, implementation, random, seeded
        from twinkle.ops.dynamic_tanh import reference


        def variants():
            return reference.VARIANTS


        class Layer(nn.Module):
            def __init__(self, width, dtype, generator):
                super().__init__()
                self.weight, self.bias = (nn.Parameter(random((width,), dtype, generator)) for _ in range(2))
                self.alpha = nn.Parameter(random((1,), dtype, generator))

            def forward(self, x):
                plain = reference.VARIANTS[0]
                return reference.dynamic_tanh(x, self.weight, self.bias, self.alpha, variant=plain)


        def cases(variant, dtype, device, backend):
            facts = {name: name for name in ("x", "weight", "bias", "alpha")}
            generator = seeded(device)
            kernel = implementation("dynamic_tanh", backend).layer_class(variant, facts).forward
            for shape, (lead, width) in SHAPES.items():
                x = random((*lead, width), dtype, generator)
                yield Case(shape, Layer.forward, kernel, (x,), Layer(width, dtype, generator), facts)
    ''',
}

PROGRAM = """
    import torch
    from torch import nn


    class Squash(nn.Module):
        def __init__(self, size=8, alphas=1):
            super().__init__()
            self.gain, self.shift = nn.Parameter(torch.rand(size)), nn.Parameter(torch.rand(size))
            self.sharpness = nn.Parameter(torch.rand(alphas))

        def forward(self, states):
            return torch.tanh(states * self.sharpness) * self.gain + self.shift


    class Halved(Squash):
        def forward(self, states):
            return torch.tanh(states * self.sharpness) * self.gain + self.shift / 2
"""


def write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(textwrap.dedent(text))


@pytest.fixture
def program(
    clean_registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """A program with a layer for an op that lies in a folder of its own, added while the test runs."""
    write(tmp_path / "more_ops" / "dynamic_tanh", OP)
    write(tmp_path / "site", {"squashing.py": PROGRAM})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with catalog.added_folder(tmp_path / "more_ops"):
        import squashing  # type: ignore[import-not-found]

        yield squashing
    del sys.modules["squashing"]


def test_its_code_is_recognised_and_a_near_miss_says_the_difference(program: Any) -> None:
    found = recognise(program.Squash)
    assert (found.op, found.variant.name) == ("dynamic_tanh", "biased")
    assert found.facts == {"x": "states", "weight": "gain", "bias": "shift", "alpha": "sharpness"}
    near = recognise(program.Halved).near
    assert [(miss.op, miss.variant.name) for miss in near] == [("dynamic_tanh", "biased")]


def test_what_must_hold_of_an_instance_is_asked_by_its_own_hook(program: Any) -> None:
    found = recognise(program.Squash)
    assert check_instance(found, program.Squash()) == found.facts
    assert str(check_instance(found, program.Squash(alphas=8))) == "it has 8 alphas"


def test_it_is_proven_and_swapped_where_the_embedded_kernels_are_on(program: Any) -> None:
    runtime.options.kernels = "auto"
    # On a GPU the embedded kernels are for the GPU.
    where = "cuda" if torch.cuda.is_available() else "cpu"
    model, x = program.Squash().to(where), torch.randn(2, 8, device=where, requires_grad=True)
    expected = model(x)
    kernelize_layers(model)
    assert torch.allclose(model(x), expected)
    (binding,) = [b for b in runtime.registry.bindings if b.instances]
    assert (binding.kernel, binding.state) == ("dynamic_tanh", "active")
    assert binding.source == "embedded dynamic_tanh (biased), plain torch"
    assert "proven" in str(binding.proof)


def test_its_name_is_known_where_ops_are_named(program: Any) -> None:
    assert "dynamic_tanh" in op_names.LAYER_OPS
    assert op_names.hint("DyT") == "did you mean 'dynamic_tanh'?"
    validate({"twinkle": {"kernels": ["dynamic_tanh"]}}, where="test")
    assert layers.DynamicTanh.__name__ == "DynamicTanh"
    assert kernel_version("dynamic_tanh") is not None


def test_twinkle_match_lists_it(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["match", "squashing"]) == 0
    out = capsys.readouterr().out
    assert "dynamic_tanh     biased" in out
    assert "not dynamic_tanh" in out


def test_twinkle_verify_lists_it(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--op", "dynamic_tanh", "--device", "cpu", "--dtype", "float32", "--all"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert {tuple(line.split()[1:4]) for line in out[1:-1]} == {("dynamic_tanh", "biased", "plain")}
    assert all(line.endswith("proven") for line in out[1:-1])


def test_an_op_is_forgotten_with_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "dynamic_tanh", OP)
    with catalog.added_folder(tmp_path):
        assert catalog.find_op("dynamic_tanh").variants
    assert "dynamic_tanh" not in op_names.OPS
    assert not [name for name in sys.modules if name.startswith("twinkle.ops.dynamic_tanh")]
    with pytest.raises(ConfigError, match="unknown op"):
        validate({"twinkle": {"kernels": ["dynamic_tanh"]}}, where="test")
