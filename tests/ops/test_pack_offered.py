"""``kernels = "auto"`` is the pack's document, registered beneath whatever a program binds by itself."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from torch import nn

import twinkle.ops
from twinkle.apply.layers import kernelize_layers, unkernelize
from twinkle.kernel import register_kernels
from twinkle.op_names import FUNCTION_OPS, LAYER_OPS
from twinkle.ops import catalog
from twinkle.ops.catalog import find_op
from twinkle.ops.rms_norm.layer import RMSNorm
from twinkle.runtime import runtime

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from twinkle.registry import Registry

PACK = Path(twinkle.ops.__file__).parent
IDS = torch.arange(8)[None]


def document() -> dict[str, Any]:
    return tomllib.loads((PACK / "twinkle.toml").read_text())


def specs() -> list[dict[str, str]]:
    both = document()
    return [*both["layers"].values(), *both["functions"].values()]


def mixtral(**given: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
        num_local_experts=4,
        num_experts_per_tok=1,  # a program of the interpreter for each slot of a token
        **given,
    )
    return transformers.MixtralForCausalLM(config)


def llama(**given: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
        **given,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def layers_wanted(clean_registry: Registry, kernels: torch.device) -> Registry:
    """The embedded kernels of the document are on, with triton's on whatever device there is."""
    runtime.options.kernels = tuple({spec["match"] for spec in specs()})
    return clean_registry


def bound(registry: Registry) -> set[tuple[str, str, str]]:
    met = [binding for binding in registry.bindings if not binding.target.startswith("match:")]
    return {(binding.target, binding.kernel, binding.state) for binding in met}


@pytest.mark.parametrize(
    ("section", "maker", "ops"),
    [("layers", "layer_class", LAYER_OPS), ("functions", "function_for", FUNCTION_OPS)],
)
def test_the_document_has_every_op_that_is_a_layer_or_a_function(
    section: str, maker: str, ops: tuple[str, ...]
) -> None:
    def makes_some(op: str) -> bool:
        return any(hasattr(backend.load(), maker) for backend in find_op(op).backends)

    assert {spec["match"] for spec in document()[section].values()} == {op for op in ops if makes_some(op)}


def test_the_document_to_copy_is_the_one_that_auto_registers() -> None:
    assert document() == catalog.document()


def test_auto_registers_the_document_and_nothing_among_what_the_user_registered(
    clean_registry: Registry,
) -> None:
    runtime.options.kernels = "auto"
    kernelize_layers(llama())
    targets = {target.kernel_name: str(target.target) for target in runtime.embedded.layer_targets}
    layers = {(k.name, targets[k.name], k.source.describe()) for k in runtime.embedded.layer_kernels}
    functions = {
        (k.name, str(k.target), k.source.describe()) for k in runtime.embedded.function_kernels if k.op
    }
    assert layers == {
        (name, f"match:{spec['match']}", f"installed {spec['package_name']}:{spec['layer_name']}")
        for name, spec in document()["layers"].items()
    }
    assert functions == {
        (name, f"match:{spec['match']}", f"installed {spec['package_name']}")
        for name, spec in document()["functions"].items()
    }
    assert clean_registry.layer_kernels == clean_registry.layer_targets == ()
    assert clean_registry.function_kernels == ()


@pytest.mark.parametrize("build", [llama, mixtral])
def test_a_copy_of_the_pack_binds_what_auto_binds(
    layers_wanted: Registry, kernels: torch.device, tmp_path: Path, build: Any
) -> None:
    model = build().to(kernels)
    kernelize_layers(model)
    expected = model(IDS.to(kernels)).logits
    by_auto = bound(layers_wanted)
    assert {b.origin for b in layers_wanted.bindings} == {"embedded"}
    runtime.reset()
    (tmp_path / "my_pack").mkdir()
    for name in ("__init__.py", "layers.py", "functions.py"):
        shutil.copy(PACK / name, tmp_path / "my_pack" / name)
    copied = document()
    for spec in (*copied["layers"].values(), *copied["functions"].values()):
        spec.update(repo_path=str(tmp_path), package_name=f"my_pack{spec['package_name'][11:]}")
    register_kernels(copied)
    runtime.options.kernels = "off"
    model = build().to(kernels)
    kernelize_layers(model)
    assert torch.equal(model(IDS.to(kernels)).logits, expected)
    assert bound(runtime.registry) == by_auto
    assert {state for *_, state in by_auto} == {"active"}


def test_what_auto_loads_is_what_for_variant_gives(
    layers_wanted: Registry, kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mine(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states * 3

    asked = []

    def for_variant(variant: Any, facts: Any) -> type[nn.Module]:
        asked.append((variant.name, facts["x"]))
        return Mine

    monkeypatch.setattr(RMSNorm, "for_variant", staticmethod(for_variant))
    runtime.options.verify = "off"
    norm: Any = llama().model.norm.to(kernels)
    kernelize_layers(norm)
    assert norm(torch.ones(2, 32, device=kernels)).eq(3).all()
    assert asked == [("llama", "hidden_states")]


class Doubled(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * 2


@pytest.mark.parametrize(
    "spec",
    [{"match": "rms_norm"}, {"target": "transformers.models.llama.modeling_llama:LlamaRMSNorm"}],
    ids=["by structure", "by name"],
)
@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_what_a_program_binds_by_itself_goes_first(
    layers_wanted: Registry, spec: dict[str, str], first: str
) -> None:
    if first == "ours":
        kernelize_layers(nn.Sequential())
    # Its name is that of the pack's kernel as well.
    register_kernels({"layers": {"rms_norm": {**spec, "layer_impl": Doubled, "verify": "off"}}})
    model = llama()
    kernelize_layers(model)
    assert torch.equal(model.model.norm(torch.ones(2, 32)), torch.full((2, 32), 2.0))
    assert {(b.kernel, b.origin == "embedded") for b in layers_wanted.bindings} == {
        ("rms_norm", False),
        ("gated_mlp", True),
        ("apply_rotary_pos_emb", True),
    }


def test_an_instance_that_no_kernel_is_for_is_a_remark_and_no_failure(layers_wanted: Registry) -> None:
    kernelize_layers(llama(hidden_act="mish"))
    assert "gated_mlp" not in {binding.kernel for binding in layers_wanted.bindings}
    assert any(
        "LlamaMLP is left alone: no kernel for the activation" in text for text in runtime.session.remarks
    )


def test_one_who_binds_the_pack_by_hand_reads_why_there_is_no_kernel(clean_registry: Registry) -> None:
    register_kernels({"layers": {"mlp": document()["layers"]["gated_mlp"]}})
    model = llama(hidden_act="mish")
    kernelize_layers(model)
    with pytest.warns(match="no kernel for the activation"):
        model(IDS)


def test_reset_forgets_the_document_and_the_kernels_made_from_it(layers_wanted: Registry) -> None:
    class Mine(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    register_kernels({"layers": {"mine": {"match": "rms_norm", "layer_impl": Mine, "verify": "off"}}})
    model = llama()
    kernelize_layers(model)
    assert runtime.embedded.layer_kernels
    sources = [
        weakref.ref(kernel.source)
        for kernel in (*layers_wanted.layer_kernels, *runtime.embedded.layer_kernels)
    ]
    unkernelize(model)
    runtime.reset()
    assert not runtime.embedded.layer_kernels
    assert not runtime.embedded.layer_targets
    del model
    gc.collect()
    assert [source() for source in sources if source() is not None] == []


def test_registering_a_document_imports_nothing_of_torch() -> None:
    code = f"""
import sys
from twinkle.apply.documents import register
from twinkle.config.files import parse
with open({str(PACK / "twinkle.toml")!r}) as file:
    register(parse(file.read(), "pack")[0], where="pack", allow_objects=False)
from twinkle.runtime import runtime
registry = runtime.registry
assert len(registry.layer_kernels + registry.function_kernels) == {len(specs())}
assert not {{"torch", "transformers", "twinkle.ops.layers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
