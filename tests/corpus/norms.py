"""Spellings of RMSNorm and LayerNorm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from spelling import Corpus
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CORPORA"]

WIDTH = 24  # no power of two, nor is its root exact


def rows(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """``x`` as ``[2, 7, 24]``, from rows that eps outweighs to large ones, and one of zeros."""
    x = torch.randn(2, 7, WIDTH, generator=generator) * torch.logspace(-4, 2, 7)[:, None]
    x[1, 3] = 0
    return {"x": x.to(dtype)}


RMS = Corpus("rms_norm", inputs=rows, sizes=(WIDTH,))
LAYER = Corpus("layer_norm", inputs=rows, sizes=(WIDTH,))
CORPORA = (RMS, LAYER)


class Weighted(nn.Module):
    """A norm with a weight, and eps as ``eps``."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))


@RMS.spelling("llama")
class WithHelper(Weighted):
    """The norm in a method of its own, as in the first Llama."""

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


@RMS.look_alike(WithHelper, "eps outside of the root")
class EpsOutside(WithHelper):
    def _norm(self, x):
        return x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + self.eps)


@RMS.look_alike(WithHelper, "rounded behind the weight")
class RoundedLate(WithHelper):
    def forward(self, x):
        return (self._norm(x.float()) * self.weight).type_as(x)


@RMS.look_alike(WithHelper, "over another axis")
class OtherAxis(WithHelper):
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + self.eps)
