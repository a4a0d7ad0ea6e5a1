"""Programs of the kinds that people write, for programs.py: plain PyTorch, and models of transformers.

Each maker gives a model and a function from a step's number to its loss. None of it has heard of Twinkle.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class LayerNorm(nn.Module):
    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Any) -> Any:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Any) -> Any:
        batch, tokens, dim = x.size()
        q, k, v = self.qkv(x).split(dim, dim=2)
        q, k, v = (
            part.view(batch, tokens, self.heads, dim // self.heads).transpose(1, 2) for part in (q, k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).contiguous().view(batch, tokens, dim))


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.gelu = nn.GELU()
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Any) -> Any:
        return self.down(self.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = LayerNorm(dim, False), LayerNorm(dim, False)
        self.attention, self.mlp = Attention(dim, heads), MLP(dim)

    def forward(self, x: Any) -> Any:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """GPT-2's shape in plain PyTorch, its loss computed in its own forward."""

    def __init__(self, vocab: int, length: int, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = LayerNorm(dim, False)
        self.lm_head = nn.Linear(dim, vocab, bias=False)
        self.tokens.weight = self.lm_head.weight
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(self, idx: Any, targets: Any = None) -> tuple[Any, Any]:
        x = self.tokens(idx) + self.places(torch.arange(idx.size(1), device=idx.device))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Any) -> Any:
        dtype = x.dtype
        x = x.float()
        return (x * torch.rsqrt(torch.mean(x**2, dim=-1, keepdim=True) + 1e-6)).to(dtype=dtype) * self.scale


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


class DiTBlock(nn.Module):
    """A block of Flux's shape: norms shifted by a condition, norms of queries and keys, their rotation."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(dim, 6 * dim)
        self.norm_1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm_2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = RMSNorm(dim // heads), RMSNorm(dim // heads)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Any, condition: Any, cos: Any, sin: Any) -> Any:
        parts = self.modulation(F.silu(condition))[:, None, :].chunk(6, dim=-1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        h = self.norm_1(x) * (1 + scale_1) + shift_1
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.norm_q(q), cos, sin), rotate(self.norm_k(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + gate_1 * self.proj(y.transpose(1, 2).flatten(2))
        return x + gate_2 * self.mlp(self.norm_2(x) * (1 + scale_2) + shift_2)


class DiT(nn.Module):
    def __init__(self, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock(dim, heads) for _ in range(layers))

    def forward(self, x: Any, condition: Any, cos: Any, sin: Any) -> Any:
        for block in self.blocks:
            x = block(x, condition, cos, sin)
        return x


def nanogpt(device: str, small: bool, autocast: bool) -> tuple[nn.Module, Callable[[int], Any]]:
    sizes = (512, 64, 64, 4, 2) if small else (50304, 1024, 768, 12, 12)
    batch = 2 if small else 16
    if not autocast:
        torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    with torch.device(device):
        model = GPT(*sizes)
        tokens = torch.randint(0, sizes[0], (4, batch, sizes[1] + 1))

    def loss(step: int) -> Any:
        x, y = tokens[step % 4, :, :-1], tokens[step % 4, :, 1:].contiguous()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return model(x, y)[1]

    return model, loss


def bert(device: str, small: bool) -> tuple[nn.Module, Callable[[int], Any]]:
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.BertConfig(
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **(sizes if small else {})
    )
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    with torch.device(device):
        model = transformers.BertForMaskedLM(config)
        tokens = torch.randint(0, config.vocab_size, (4, *((2, 32) if small else (64, 512))))
        # Of masked language models 15 % of the labels count.
        labels = torch.where(torch.rand(tokens.shape) < 0.15, tokens, -100)
    return model, lambda step: model(input_ids=tokens[step % 4], labels=labels[step % 4]).loss


def t5(device: str, small: bool) -> tuple[nn.Module, Callable[[int], Any]]:
    import transformers

    sizes: dict[str, Any] = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
    if small:
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        **sizes,
    )
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    with torch.device(device):
        model = transformers.T5ForConditionalGeneration(config)
        tokens = torch.randint(1, 32128, (4, *((2, 32) if small else (16, 512))))
    return model, lambda step: model(input_ids=tokens[step % 4], labels=tokens[(step + 1) % 4]).loss


def whisper(device: str, small: bool) -> tuple[nn.Module, Callable[[int], Any]]:
    import transformers

    depth, width, heads = (2, 64, 4) if small else (12, 768, 12)
    config = transformers.WhisperConfig(
        d_model=width,
        encoder_layers=depth,
        decoder_layers=depth,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        vocab_size=51865,
        dropout=0.0,
    )
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    batch, length = (1, 16) if small else (16, 256)
    with torch.device(device):
        model = transformers.WhisperForConditionalGeneration(config)
        sound = torch.randn(2, batch, 80, 3000)
        labels = torch.randint(0, 50000, (2, batch, length))
    return model, lambda step: model(input_features=sound[step % 2], labels=labels[step % 2]).loss


def vit(device: str, small: bool) -> tuple[nn.Module, Callable[[int], Any]]:
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.ViTConfig(num_labels=1000, **(sizes if small else {}))
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    with torch.device(device):
        model = transformers.ViTForImageClassification(config)
        images = torch.randn(2, 2 if small else 128, 3, 224, 224)
        labels = torch.randint(0, 1000, images.shape[:2])
    return model, lambda step: model(pixel_values=images[step % 2], labels=labels[step % 2]).loss


def dit(device: str, small: bool) -> tuple[nn.Module, Callable[[int], Any]]:
    dim, heads, layers, batch, tokens = (64, 4, 2, 1, 32) if small else (3072, 24, 4, 2, 4608)
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    with torch.device(device):
        model = DiT(dim, heads, layers)
        x, condition = torch.randn(2, batch, tokens, dim), torch.randn(batch, dim)
        width = dim // heads
        angles = torch.arange(tokens, dtype=torch.float32)[:, None] * torch.logspace(
            0, -4, width // 2, dtype=torch.float32
        )
        cos, sin = (part.repeat_interleave(2, dim=-1) for part in (angles.cos(), angles.sin()))

    def loss(step: int) -> Any:
        return (model(x[step % 2], condition, cos, sin) - x[(step + 1) % 2]).float().square().mean()

    return model, loss


def qwen3(device: str, small: bool) -> tuple[nn.Module, Callable[[int], Any]]:
    """Of the shape of Qwen3-0.6B, 8 x 2048 tokens."""
    import transformers

    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128}
    if small:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    config = transformers.Qwen3Config(
        vocab_size=512 if small else 151936,
        num_attention_heads=4 if small else 16,
        num_key_value_heads=2 if small else 8,
        tie_word_embeddings=True,
        use_cache=False,
        **sizes,
    )
    return language_model(transformers.Qwen3ForCausalLM, config, device, small, 8)


def gemma3(device: str, small: bool) -> tuple[nn.Module, Callable[[int], Any]]:
    """Of the shape of Gemma3-1B, 4 x 2048 tokens."""
    import transformers

    sizes = {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "head_dim": 256}
    if small:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    config = transformers.Gemma3TextConfig(
        vocab_size=512 if small else 262144,
        num_attention_heads=4,
        num_key_value_heads=1,
        query_pre_attn_scalar=256,
        use_cache=False,
        **sizes,
    )
    return language_model(transformers.Gemma3ForCausalLM, config, device, small, 4)


def language_model(
    cls: Any, config: Any, device: str, small: bool, batch: int
) -> tuple[nn.Module, Callable[[int], Any]]:
    """A model for the next token, and its loss on random tokens of 2048 a sample."""
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        model = cls(config)
        tokens = torch.randint(0, config.vocab_size, (4, *((2, 32) if small else (batch, 2048))))
    return model, lambda step: model(input_ids=tokens[step % 4], labels=tokens[step % 4]).loss


PROGRAMS: dict[str, Callable[[str, bool], tuple[nn.Module, Callable[[int], Any]]]] = {
    "nanogpt": lambda device, small: nanogpt(device, small, autocast=True),
    "nanogpt-bf16": lambda device, small: nanogpt(device, small, autocast=False),
    "bert": bert,
    "t5": t5,
    "whisper": whisper,
    "dit": dit,
    "vit": vit,
    "qwen3-0.6b": qwen3,
    "gemma3-1b": gemma3,
}
"""From the name of a program to what makes it, on a device, small for a trial on a CPU."""


def parameters(model: nn.Module) -> int:
    """How many numbers a model learns, each once, for the report."""
    return sum(math.prod(p.shape) for p in model.parameters())
