"""``nn.LayerNorm`` in whole models, in triton's interpreter or on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from rounding import assert_near
from torch import nn

from twinkle.apply.layers import kernelize_layers
from twinkle.kernel import kernelize_model, register_kernels, unkernelize_model
from twinkle.ops import launch
from twinkle.ops.layer_norm import triton_backend
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from twinkle.registry import Registry

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SMALL, "vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "GPT2LMHeadModel": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, **TEXT},
    "BertForMaskedLM": {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, **TEXT},
    "ViTForImageClassification": {"image_size": 8, "patch_size": 4, **SMALL},
}


OPERATIONS = 400
"""Behind a number of a model and its gradients: a dozen products over 8 to 24 columns, there and back."""


@pytest.fixture
def device(kernels: torch.device, clean_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where triton runs, with every embedded kernel wanted, at every size."""
    monkeypatch.setattr(triton_backend, "LEAST", 0)
    runtime.options.kernels = "auto"
    runtime.options.verify = "auto"
    return kernels


@pytest.fixture
def counted(device: torch.device, unplanned: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that ran, proofs included."""
    from twinkle.ops.layer_norm import triton

    ran: list[str] = []
    for name, function in (("forward", triton.forward), ("backward", triton.backward)):

        def run(*args: Any, _name: str = name, _run: Any = function, **kwargs: Any) -> Any:
            ran.append(_name)
            return _run(*args, **kwargs)

        monkeypatch.setattr(triton, name, run)
    return ran


def build(name: str, device: torch.device) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**FAMILIES[name])).to(device)
    for norm in norms(model):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    if name.startswith("ViT"):
        return model, {
            "pixel_values": torch.randn(2, 3, 8, 8, device=device),
            "labels": torch.tensor([0, 1], device=device),
        }
    tokens = torch.arange(10, device=device).view(2, 5) + 3
    return model, {"input_ids": tokens, "labels": tokens}


def norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.LayerNorm)]


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_the_original(
    device: torch.device, counted: list[str], clean_registry: Registry, name: str
) -> None:
    model, inputs = build(name, device)
    loss, gradients = step(model, inputs)
    assert not counted
    kernelize_layers(model)
    ours, after = step(model, inputs)
    found = [b for b in clean_registry.bindings if b.kernel == "layer_norm"]
    assert [(b.source, b.state, b.proof.partition(":")[0]) for b in found] == [
        ("embedded layer_norm (fused), triton", "active", "proven")
    ]
    assert found[0].instances == len(norms(model))
    counted.clear()
    step(model, inputs)
    assert counted.count("forward") == counted.count("backward") == len(norms(model))
    assert_near(ours, loss, OPERATIONS)
    assert after.keys() == gradients.keys()
    # Some are nothing but rounding: attention does not change with the bias of its keys.
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        assert_near(after[parameter], gradient, OPERATIONS, magnitude=largest)
    unkernelize_model(model)
    assert {type(norm) for norm in norms(model)} == {nn.LayerNorm}


@pytest.mark.parametrize(
    ("given", "swapped"),
    [
        ({}, True),
        ({"bias": False}, True),
        ({"elementwise_affine": False}, True),
        ({"normalized_shape": (4, 8)}, False),
    ],
)
def test_layers_of_torch_in_a_model_of_ones_own(
    device: torch.device, counted: list[str], given: dict[str, Any], swapped: bool
) -> None:
    norm = nn.LayerNorm(**{"normalized_shape": 8, "eps": 1e-3, **given}, device=device)
    x = torch.randn(2, 4, 8, device=device)
    expected = norm(x)
    kernelize_layers(nn.Sequential(norm))
    assert_near(norm(x), expected, OPERATIONS)
    assert bool(counted) is swapped


class Louder(nn.LayerNorm):
    """A forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Same(nn.LayerNorm):
    """That of torch."""


@pytest.mark.parametrize(("cls", "swapped"), [(Louder, False), (Same, True)])
def test_a_subclass_counts_by_its_forward(
    device: torch.device, counted: list[str], cls: type[nn.LayerNorm], swapped: bool
) -> None:
    norm, x = cls(8, device=device), torch.randn(2, 4, 8, device=device)
    expected = norm(x)
    kernelize_layers(nn.Sequential(norm))
    assert_near(norm(x), expected, OPERATIONS)
    assert bool(counted) is swapped


def test_the_fast_path_of_torchs_encoder_stays(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, dropout=0, batch_first=True, device=device),
        1,
        norm=nn.LayerNorm(16, device=device),
    )
    x = torch.randn(2, 4, 16, device=device)
    lost = torch.tensor([[False] * 4, [False, False, True, True]], device=device)
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(args) or fast(*args)
    )
    results = []
    for swapped in (False, True):
        if swapped:
            kernelize_layers(encoder)
        found = [encoder(x)]
        encoder.eval()
        with torch.no_grad():
            # With a mask the rows between are nested tensors.
            found += [encoder(x), encoder(x, src_key_padding_mask=lost)]
        encoder.train()
        results.append(found)
    assert len(calls) == 4
    assert_near(results[1], results[0], OPERATIONS)


@pytest.mark.parametrize("by", ["name", "structure"])
def test_the_layer_of_the_pack_is_bound(
    device: torch.device, counted: list[str], clean_registry: Registry, by: str
) -> None:
    layers = {"package_name": "twinkle.ops", "layer_name": "LayerNorm"}
    name = "torch.nn.modules.normalization:LayerNorm"
    target = {"match": "layer_norm"} if by == "structure" else {"target": name}
    register_kernels({"layers": {"Norm": {**target, **layers}}})
    norm, x = nn.LayerNorm(8, device=device), torch.randn(2, 4, 8, device=device)
    expected = norm(x)
    model = kernelize_model(nn.Sequential(norm), device=device.type, use_fallback=False)
    assert_near(model(x), expected, OPERATIONS)
    assert "forward" in counted
    assert [binding.state for binding in clean_registry.bindings] == ["active"]


def test_a_cpu_without_triton_leaves_torchs_layer_alone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "DEVICE_TYPES", frozenset())
    model = nn.Sequential(nn.LayerNorm(8))
    kernelize_layers(model)
    assert type(model[0]) is nn.LayerNorm


class Wide(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.float()).type_as(input)


class Wider(Wide):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


@pytest.mark.parametrize("cls", [Wide, Wider])
def test_a_class_whose_base_has_its_kernel_is_recognised(
    device: torch.device, counted: list[str], clean_registry: Registry, cls: type[nn.LayerNorm]
) -> None:
    """What stands as the ``forward`` of the base is Twinkle's by then; ``super()`` means the base's own."""
    for first in (nn.LayerNorm, Wide):
        model = nn.Sequential(first(8), nn.Linear(8, 8)).to(device)
        kernelize_layers(model)
        model(torch.randn(3, 8, device=device))
    model = nn.Sequential(cls(8), nn.Linear(8, 8)).to(device)
    kernelize_layers(model)
    x = torch.randn(3, 8, device=device, dtype=torch.float16)
    before = len(counted)
    found = model[0](x)
    assert len(counted) > before
    assert found.dtype == torch.float16
    states = {b.target.rpartition(":")[2]: b.state for b in clean_registry.bindings}
    assert states[cls.__qualname__] == "active"
    assert_near(found.float(), nn.functional.layer_norm(x.float(), (8,)), 10, dtype=torch.float16)
