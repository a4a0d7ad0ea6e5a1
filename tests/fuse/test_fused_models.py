"""Fused kernels inside the forwards of whole models, in triton's interpreter or on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from rounding import assert_near

from twinkle.apply.layers import kernelize_layers
from twinkle.fuse import forward, qk_norm_rotary
from twinkle.kernel import unkernelize_model
from twinkle.runtime import runtime
from twinkle.swap.layers import placed
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from twinkle.registry import Registry

transformers = pytest.importorskip("transformers")

SMALL = dict(  # noqa: C408
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    vocab_size=32,
    pad_token_id=0,
    max_position_embeddings=64,
)


FAMILIES = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", {"residual_norm"}),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"residual_norm", "qk_norm_rotary"}),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"residual_norm", "qk_norm_rotary"}),
    "Olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {"qk_norm_rotary"}),
    # The rotation is under a condition; the queries are clamped under another.
    "Exaone4": ("Exaone4Config", "Exaone4ForCausalLM", {"qk_norm_rotary"}),
    "Olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"residual_norm", "qk_norm_rotary"}),
    "Granite": ("GraniteConfig", "GraniteForCausalLM", {"residual_norm"}),
}


OPERATIONS = 400
"""Behind a number of a model and its gradients: a dozen products over 8 to 32 columns, there and back."""


def build(family: str, device: torch.device, **more: Any) -> Any:
    config, model, _ = FAMILIES[family]
    torch.manual_seed(0)
    given = {**SMALL, "bos_token_id": 1, "eos_token_id": None, **more}
    made = getattr(transformers, model)(getattr(transformers, config)(**given)).to(device)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    return made


def test_a_condition_that_is_off_leaves_the_norms_alone(
    device: torch.device, counted: dict[str, int]
) -> None:
    kinds = {"sliding_window": 4, "layer_types": ["full_attention"]}
    model = build("Exaone4", device, **kinds)
    logits, _ = step(model, tokens(device))
    kernelize_layers(model)
    assert torch.equal(step(model, tokens(device))[0], logits)
    assert counted["qk_norm_rotary"] == 0


def tokens(device: torch.device) -> torch.Tensor:
    return torch.arange(6, device=device).view(2, 3) + 3


def step(model: Any, given: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    outputs = model(given, labels=given)
    outputs.loss.backward()
    return outputs.logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def close(ours: Any, theirs: Any) -> None:
    assert_near(ours, theirs, OPERATIONS)


def states(registry: Registry) -> dict[str, tuple[str, str]]:
    return {b.kernel: (b.state, b.proof.partition(":")[0]) for b in registry.bindings}


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_original(
    device: torch.device, clean_registry: Registry, counted: dict[str, int], family: str
) -> None:
    model = build(family, device)
    logits, gradients = step(model, tokens(device))
    kernelize_layers(model)
    found, after = step(model, tokens(device))
    close(found, logits)
    for ours, theirs in zip(after, gradients, strict=True):
        close(ours, theirs)
    assert states(clean_registry) == dict.fromkeys(FAMILIES[family][2], ("active", "proven"))
    assert {op for op, count in counted.items() if count} == FAMILIES[family][2]


@pytest.mark.parametrize("length", [48, 49])
def test_a_pair_is_proven_on_the_first_tokens_of_a_long_call(
    device: torch.device, clean_registry: Registry, length: int
) -> None:
    model = build("Qwen3", device, max_position_embeddings=512)
    kernelize_layers(model)
    given = torch.arange(2 * length, device=device).view(2, length) % 29 + 1
    model(given)
    states = {b.kernel: (b.state, b.proof.partition(":")[0]) for b in clean_registry.bindings}
    assert states["qk_norm_rotary"] == ("active", "proven")


def test_the_cache_of_keys_and_values_is_written_once(device: torch.device) -> None:
    model = build("Qwen3", device).eval()
    prompt = tokens(device)[:1]
    expected = model.generate(prompt, max_new_tokens=3, do_sample=False)
    kernelize_layers(model)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(prompt, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 3
    assert torch.equal(model.generate(prompt, max_new_tokens=3, do_sample=False), expected)
    static = model.generate(prompt, max_new_tokens=3, do_sample=False, cache_implementation="static")
    assert torch.equal(static, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(device: torch.device, clean_registry: Registry, reentrant: bool) -> None:
    model = build("Llama", device).train()
    _, gradients = step(model, tokens(device))
    kernelize_layers(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _, after = step(model, tokens(device))
    for ours, theirs in zip(after, gradients, strict=True):
        close(ours, theirs)
    assert {state for state, _ in states(clean_registry).values()} == {"active"}


def test_attentions_are_still_given(device: torch.device) -> None:
    model = build("Qwen3", device, attn_implementation="eager").eval()
    expected = model(tokens(device), output_attentions=True).attentions
    kernelize_layers(model)
    found = model(tokens(device), output_attentions=True).attentions
    close(found[0], expected[0])


def test_a_hook_on_a_norm_is_called_and_sees_what_it_always_saw(device: torch.device) -> None:
    model = build("Qwen3", device).eval()
    kernelize_layers(model)
    with torch.no_grad():
        model(tokens(device))  # proven, so that the quick way would be taken
    layer, seen = model.model.layers[0], {}
    for name in ("post_attention_layernorm", "self_attn.q_norm", "self_attn.v_proj"):
        layer.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: out.shape})
        )
    with torch.no_grad():
        model(tokens(device))
    assert list(seen) == ["self_attn.q_norm", "self_attn.v_proj", "post_attention_layernorm"]
    assert seen["self_attn.q_norm"] == (2, 3, 2, 8)


def test_the_report_says_who_computes_what_is_never_called(
    device: torch.device, clean_registry: Registry
) -> None:
    runtime.options.kernels = ("rms_norm", "rotary", *forward.OPS)
    model = build("Olmo2", device)
    kernelize_layers(model)
    model(tokens(device))
    told = {b.kernel: b.notes for b in clean_registry.bindings if b.state == "pending"}
    note = "its calls in Olmo2Attention are computed by qk_norm_rotary"
    assert told == {"rms_norm": [note], "apply_rotary_pos_emb": [note]}


def test_classes_stay_and_unkernelize_restores_their_forwards(device: torch.device) -> None:
    model = build("Qwen3", device)
    classes = [type(module) for module in model.modules()]
    before = [cls.forward for cls in classes]  # models of other tests may have kernels in their classes
    kernelize_layers(model)
    assert [type(module) for module in model.modules()] == classes
    assert any(placed(module) is not None for module in model.modules())
    unkernelize_model(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(placed(module) is None for module in model.modules())
    assert all(cls.forward in (was, own_forward(cls)) for cls, was in zip(classes, before, strict=True))


def test_a_wrong_pair_kernel_never_runs(
    device: torch.device, clean_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = qk_norm_rotary.run
    monkeypatch.setattr(qk_norm_rotary, "run", lambda *args: tuple(x * 1.01 for x in right(*args)))
    runtime.options.kernels = ("qk_norm_rotary",)
    model = build("Qwen3", device).eval()
    expected = model(tokens(device)).logits
    kernelize_layers(model)
    with pytest.warns(Warning, match="keeps its original"):
        found = model(tokens(device)).logits
    assert torch.equal(found, expected)
    assert states(clean_registry)["qk_norm_rotary"] == ("failed", "rejected")


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "warm"), [("eager", True), ("aot_eager", False)])
def test_a_compiler_sees_the_kernels_and_no_break(device: torch.device, backend: str, warm: bool) -> None:
    model = build("Qwen3", device)
    kernelize_layers(model)
    layer = model.model.layers[0]
    x = torch.randn(1, 3, 16, device=device)
    places = torch.arange(3, device=device)[None]
    given = {"position_embeddings": model.model.rotary_emb(x, places), "attention_mask": None}
    if warm:
        layer(x, **given)
    names: list[str] = []

    def spy(graph: Any, inputs: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        if backend == "eager":
            return graph
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    found = torch.compile(layer, fullgraph=True, backend=spy)(x, **given)
    assert {name for name in names if name.startswith("twinkle")} == {
        "twinkle.residual_norm.default",
        "twinkle.qk_norm_rotary.default",
    }
    unkernelize_model(model)
    close(found, layer(x, **given))


@pytest.mark.slow
def test_lora_beside_the_norms(device: torch.device) -> None:
    peft = pytest.importorskip("peft")
    model = build("Qwen3", device)
    runtime.options.kernels = ("qk_norm_rotary",)
    kernelize_layers(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    given = tokens(device)
    found = model(given, labels=given).logits
    model.loss = model(given, labels=given).loss
    model.loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert any("lora_B" in name for name in trained)
    unkernelize_model(model)
    close(found, model(given).logits)
