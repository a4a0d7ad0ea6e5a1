"""What is said of a class is what its models get."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch
from torch import nn

from twinkle.fuse.survey import recognise_all, recognise_places

transformers = pytest.importorskip("transformers")


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class Rounded(nn.Module):
    """A LayerNorm that rounds before its weight: no kernel does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        mean = wide.mean(-1, keepdim=True)
        variance = (wide - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * ((wide - mean) / torch.sqrt(variance + 1e-5)).to(x.dtype) + self.bias


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.grow = nn.Linear(8, 8), nn.Linear(8, 8)
        self.first = Rounded()
        self.after = Norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x + self.mix(x))
        x = x + 0.5 * self.grow(x)
        return self.after(x)


class Super(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(x + super().forward(x))


def test_places_with_a_kernel_and_without() -> None:
    [found] = recognise_all(Block)
    assert (found.op, found.variant.name) == ("residual_norm", "rms_norm_llama_scaled")
    assert found.facts == {
        "norm": "after",
        "scale": "0.5",
        "wired": True,
        "sites": (
            {"variant": "rms_norm_llama_scaled", "norm": "after", "scale": "0.5", "wired": True},
            {
                "variant": "layer_norm_out_float32_both_mean_square_divide_before_weight",
                "norm": "first",
                "scale": None,
                "wired": False,
                "reason": "there is no kernel for Rounded behind other steps "
                "(out_float32_both_mean_square_divide_before_weight)",
            },
        ),
    }


def test_a_forward_that_cannot_be_rewritten_says_why() -> None:
    [found] = recognise_places(Super)
    assert found.facts["wired"] is False
    assert found.facts["reason"] == "its forward stays as it is: it uses super()"


@pytest.mark.parametrize(
    ("target", "op", "variant", "wired"),
    [
        ("llama:LlamaDecoderLayer", "residual_norm", "rms_norm_llama", True),
        ("gemma4:Gemma4TextDecoderLayer", "residual_norm", "rms_norm_gemma4", True),
        ("longcat_flash:LongcatFlashDecoderLayer", "residual_norm", "rms_norm_llama", True),
        ("bert:BertSelfOutput", "residual_norm", "layer_norm_fused", True),
        ("qwen3:Qwen3Attention", "qk_norm_rotary", "llama_half_head", True),
        ("exaone4:Exaone4Attention", "qk_norm_rotary", "llama_half_head", True),
        ("olmoe:OlmoeAttention", "qk_norm_rotary", "llama_half_all", True),
        ("glm4_moe:Glm4MoeAttention", "qk_norm_rotary", "llama_partial_head", False),
        ("llama:LlamaAttention", None, None, None),
    ],
)
def test_known_families(target: str, op: str | None, variant: str | None, wired: bool | None) -> None:
    family, name = target.split(":")
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError:
        pytest.skip(f"this transformers has no {family}")
    [found] = recognise_all(getattr(module, name))
    assert (found.op, found.variant and found.variant.name, found.facts.get("wired")) == (op, variant, wired)


def test_the_command_says_what_is_left_as_it_is(capsys: Any) -> None:
    from twinkle.cli.match import main

    assert main(["transformers.models.deberta"]) == 0
    out = capsys.readouterr().out
    assert "left as it is: there is no kernel for DebertaLayerNorm behind other steps" in out
    assert "of these are places inside a forward, 0 with a kernel" in out
    assert main(["transformers.models.llama", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    [row] = [row for row in rows if row["op"] == "residual_norm"]
    assert row == {
        "target": "transformers.models.llama.modeling_llama:LlamaDecoderLayer",
        "op": "residual_norm",
        "variant": "rms_norm_llama",
        "facts": {"norm": "post_attention_layernorm", "scale": None, "wired": True},
    }
