"""Models in plain PyTorch, written as people write them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GPT", "Block", "Flux", "Mixture", "UNet", "VisionTransformer"]


class Block(nn.Module):
    """A layer of a transformer without its attention."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class GPT(nn.Module):
    """As nanoGPT: all of it in a ``ModuleDict``."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(16, width),
                "drop": nn.Dropout(0.0),
                "h": nn.ModuleList([Block(width) for _ in range(depth)]),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, 16, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer.drop(self.transformer.wte(tokens))  # type: ignore[operator]
        for block in self.transformer.h:  # type: ignore[union-attr]
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))  # type: ignore[operator, no-any-return]


class VisionTransformer(nn.Module):
    """Patches and a ``Sequential`` of blocks, which a function makes."""

    def __init__(self, depth: int = 4, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = _chain(Block(width), depth)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.blocks(x).mean(1))  # type: ignore[no-any-return]


def clones(layer: nn.Module, number: int) -> nn.Module:
    """As the annotated transformer has it."""
    return _copied(layer, number)


def _copied(layer: nn.Module, number: int) -> nn.Module:
    return nn.ModuleList([copy.deepcopy(layer) for _ in range(number)])


def _chain(block: nn.Module, depth: int) -> nn.Module:
    return nn.Sequential(*(copy.deepcopy(block) for _ in range(depth)))


class Mixture(Block):
    """A block with a list of experts."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.experts = nn.ModuleList([Block(width) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](super().forward(x))  # type: ignore[no-any-return]


class Flux(nn.Module):
    """As the transformers of diffusers: blocks of two kinds in two lists."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Mixture() for _ in range(2)])
        self.single_transformer_blocks = nn.ModuleList([Block() for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            x = block(x)
        return x


class _Down(nn.Module):
    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Block(), Block()])
        self.attentions = nn.ModuleList([Block(), Block()] if attends else [])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.resnets, *self.attentions):
            x = block(x)
        return x


class _Last(_Down):
    pass


class UNet(nn.Module):
    """As diffusers' U-Net: three stages of one class and a last one of another."""

    def __init__(self) -> None:
        super().__init__()
        stages: list[Any] = [_Down(True), _Down(True), _Down(True), _Last(False)]
        self.down_blocks = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.down_blocks:
            x = block(x)
        return x


def tokens() -> Tensor:
    """What :class:`GPT` takes."""
    return torch.arange(10).reshape(2, 5)
