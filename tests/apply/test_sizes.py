"""Layers of one class in two sizes: each size is compared at its own first call, and not before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from twinkle.apply.layers import kernelize_layers
from twinkle.runtime import runtime

if TYPE_CHECKING:
    import pytest

    from twinkle.registry import Registry


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def test_each_size_is_proven_by_itself(clean_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    from twinkle.proof import first_use

    widths: list[int] = []
    real = first_use.compare

    def compare(*given: object, **named: object) -> object:
        widths.append(given[2][0].shape[-1])  # type: ignore[index]
        return real(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(first_use, "compare", compare)
    monkeypatch.setenv("TWINKLE_CACHE", "off")
    runtime.options.kernels = "auto"
    model = nn.ModuleList([Norm(48), Norm(16), Norm(48)])
    kernelize_layers(model)
    for _ in range(2):
        for layer in (model[0], model[2]):
            layer(torch.randn(2, 5, 48))
    assert widths == [48]
    model[1](torch.randn(2, 5, 16))
    assert widths == [48, 16]
    assert [(b.kernel, b.instances) for b in clean_registry.bindings] == [("rms_norm", 2), ("rms_norm", 1)]
