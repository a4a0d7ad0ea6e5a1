"""Match, plan, commit: a failure in any of them leaves the model and its functions as they were."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from twinkle.apply.bound import Bound
from twinkle.apply.layers import kernelize_layers
from twinkle.apply.matching import Rules, match
from twinkle.apply.places import Names
from twinkle.kernel import kernelize_model, register_kernels, unkernelize_model
from twinkle.runtime import runtime
from twinkle.swap.layers import candidates_of, placed

if TYPE_CHECKING:
    from collections.abc import Callable

    from twinkle.registry import Registry

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("clean_registry")

LLAMA = "transformers.models.llama.modeling_llama"


class NamedMLP(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class MatchedNorm(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)  # type: ignore[no-any-return]


def repeat(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    return hidden_states.repeat_interleave(n_rep, dim=1)


class Planted(RuntimeError):
    """The failure of a test."""


@pytest.fixture
def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    register_kernels(
        {
            "layers": {
                "MLP": {"target": f"{LLAMA}:LlamaMLP", "layer_impl": NamedMLP},
                "Norm": {"match": "rms_norm", "layer_impl": MatchedNorm},
            },
            "functions": {"repeat_kv": {"target_module": LLAMA, "func_impl": repeat}},
        }
    )
    runtime.options.kernels = "auto"
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    made: nn.Module = LlamaForCausalLM(config)
    return made


def state_of(model: nn.Module) -> dict[tuple[str, ...], Any]:
    """All that a swap could change: classes, attributes, and what the modules of the classes hold."""
    found: dict[tuple[str, ...], Any] = {}
    for path, module in model.named_modules():
        found[path, "class"] = type(module)
        for name, value in vars(module).items():
            found[path, name] = value
            if isinstance(value, dict):
                found.update({(path, name, str(key)): inner for key, inner in value.items()})
    for holder in {sys.modules[type(module).__module__] for module in model.modules()} | {nn.Linear}:
        found.update({(holder.__name__, name): value for name, value in vars(holder).items()})
    return found


def same(before: dict[tuple[str, ...], Any], after: dict[tuple[str, ...], Any]) -> bool:
    """The same names with the same objects."""
    changed = [name for name in before.keys() & after.keys() if before[name] is not after[name]]
    return before.keys() == after.keys() and not changed


def in_place(model: nn.Module) -> list[str]:
    names = [name for name, module in model.named_modules() if placed(module) is not None]
    return names + [b.target for b in runtime.registry.bindings if b.target.startswith(LLAMA) and b.instances]


def plant(patch: pytest.MonkeyPatch, where: str, at: int) -> None:
    """Let a function of Twinkle fail at its call number ``at``."""
    owner, _, name = where.rpartition(".")
    if owner.rpartition(".")[2][:1].isupper():
        module, _, cls = owner.rpartition(".")
        holder: Any = getattr(__import__(module, fromlist=["_"]), cls)
    else:
        holder = __import__(owner, fromlist=["_"])
    original = getattr(holder, name)
    calls = []

    def planted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == at:
            raise Planted(where)
        return original(*args, **kwargs)

    patch.setattr(holder, name, planted)


PLANNING = [
    ("twinkle.match.structure.check_instance", 3),
    ("twinkle.apply.layers.usable", 2),
    ("twinkle.swap.layers.plan", 2),
    ("twinkle.apply.functions.function_at", 1),
    ("twinkle.apply.functions.dispatcher", 1),
]
COMMITTING = [
    ("twinkle.swap.layers.Plan.commit", 2),
    ("twinkle.swap.instance.rebind", 2),
    ("twinkle.apply.functions.put", 1),
]


def hooked(model: nn.Module) -> Any:
    return kernelize_layers(model)


def called(model: nn.Module) -> Any:
    # A kernel that is decided for a mode and vouched for needs no dispatcher: it is compared here.
    for kernel in runtime.registry.function_kernels:
        kernel.verify = "first-use"
    return kernelize_model(model, use_fallback=False)


@pytest.mark.parametrize("kernelize", [hooked, called])
@pytest.mark.parametrize(("where", "at"), PLANNING + COMMITTING)
def test_a_failure_leaves_everything_as_it_was(
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    kernelize: Callable[[nn.Module], Any],
    where: str,
    at: int,
) -> None:
    before = state_of(model)
    with monkeypatch.context() as patch:
        plant(patch, where, at)
        with pytest.raises(Planted, match=where):
            kernelize(model)
    assert same(before, state_of(model))
    assert in_place(model) == []
    kernelize(model)
    assert len(in_place(model)) > 5


@pytest.mark.parametrize("kernelize", [hooked, called])
@pytest.mark.parametrize(("where", "at"), PLANNING)
def test_nothing_is_put_in_place_before_all_is_planned(
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    kernelize: Callable[[nn.Module], Any],
    where: str,
    at: int,
) -> None:
    plant(monkeypatch, where, at)
    for first in ("twinkle.swap.layers.Plan.commit", "twinkle.apply.functions.put"):
        plant(monkeypatch, first, 1)
    with pytest.raises(Planted, match=where):
        kernelize(model)


LOSS_PLANNING = [
    ("twinkle.deferred.install.plan_deferral", 1),
    ("twinkle.deferred.install.plan", 1),
    ("twinkle.swap.layers.Plan.resolve", 1),
    ("twinkle.swap.generated.LayerDispatch.prepare", 1),
    ("twinkle.deferred.install.leave_to_python", 1),
]
"""Of the deferred logits, which the hook alone plans: the forward of the model, its kernel loaded."""


@pytest.mark.parametrize(("where", "at"), LOSS_PLANNING)
def test_a_failure_in_planning_the_loss_leaves_every_layer_untouched(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, where: str, at: int
) -> None:
    before = state_of(model)
    with monkeypatch.context() as patch:
        plant(patch, where, at)
        for first in ("twinkle.swap.layers.Plan.commit", "twinkle.apply.functions.put"):
            plant(patch, first, 1)  # would fail first, if something was put in place by then
        with pytest.raises(Planted, match=where):
            kernelize_layers(model)
    assert same(before, state_of(model))
    assert in_place(model) == []
    kernelize_layers(model)
    assert "" in in_place(model)
    assert "lm_head" not in in_place(model)


def test_a_failure_in_putting_the_loss_in_place_takes_the_layers_back(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(model)
    with monkeypatch.context() as patch:
        # The swaps that are made before: an MLP and a norm for all of them.
        plant(patch, "twinkle.swap.layers.move", 3)
        with pytest.raises(Planted):
            kernelize_layers(model)
    assert same(before, state_of(model))
    kernelize_layers(model)
    counts = {b.target.rpartition(":")[2]: b.instances for b in runtime.registry.bindings}
    assert counts["LlamaForCausalLM"] == 1


class NamedLinear(nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, self.weight, self.bias)


def test_a_head_with_a_kernel_of_the_users_keeps_it(model: nn.Module) -> None:
    register_kernels(
        {"layers": {"Linear": {"target": "torch.nn.modules.linear:Linear", "layer_impl": NamedLinear}}}
    )
    kernelize_layers(model)
    assert [c.kernel.name for c in candidates_of(model.lm_head)] == ["Linear"]  # type: ignore[arg-type]
    assert candidates_of(model) == ()
    assert any("logits" in text and "a kernel already" in text for text in runtime.session.remarks)


def test_models_of_a_class_share_the_records_of_their_loss(model: nn.Module) -> None:
    other = type(model)(model.config)  # type: ignore[call-arg, operator]
    kernelize_layers(model)
    kernelize_layers(other)
    unkernelize_model(other)
    of_loss = [b for b in runtime.registry.bindings if b.kernel == "causal_lm_loss"]
    assert [(b.target.rpartition(":")[2], b.instances) for b in of_loss] == [("LlamaForCausalLM", 1)]


def test_a_model_that_is_kernelized_keeps_what_it_has(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernelize_layers(model)
    before = state_of(model)
    register_kernels({"layers": {"MLP": {"layer_impl": NamedMLP, "mode": "train"}}})
    plant(monkeypatch, "twinkle.swap.layers.Plan.commit", 2)
    with pytest.raises(Planted):
        kernelize_layers(model)
    assert same(before, state_of(model))


def test_matching_finds_modules_and_changes_neither_them_nor_the_records(
    model: nn.Module, clean_registry: Registry
) -> None:
    before, records = state_of(model), [(b.target, b.state) for b in clean_registry.bindings]
    found = match(model.modules(), Rules(None), Names(model))
    names = {module: name for name, module in model.named_modules()}
    assert [names[one.module] for one in found] == [
        f"model.{name}"
        for layer in (0, 1)
        for name in (
            f"layers.{layer}.{part}" for part in ("mlp", "input_layernorm", "post_attention_layernorm")
        )
    ] + ["model.norm"]
    assert {(one.cls.__name__, one.kernels[0].name, one.asked_for) for one in found} == {
        ("LlamaMLP", "MLP", True),
        ("LlamaRMSNorm", "Norm", True),
    }
    assert all(isinstance(one, Bound) and one.target is one.cls for one in found)
    assert same(before, state_of(model))
    assert records == [(b.target, b.state) for b in clean_registry.bindings]


def test_the_originals_come_back(model: nn.Module) -> None:
    before = state_of(model)
    kernelize_model(model)
    unkernelize_model(model)
    unkernelize_model(None)
    assert same(before, state_of(model))
