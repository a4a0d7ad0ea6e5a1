"""Spellings of RMSNorm by a Euclidean norm."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from norms import WIDTH, rows
from spelling import Corpus
from torch import nn

__all__ = ["CORPORA"]

RMS = Corpus("rms_norm", inputs=rows, sizes=(WIDTH,))
CORPORA = (RMS,)


class Scaled(nn.Module):
    """A norm with a weight, and the root of the width as ``scale``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.eps = 1e-3
        self.scale = dim**0.5
        self.g = nn.Parameter(torch.ones(dim))


@RMS.spelling("normalize")
class Lucidrains(Scaled):
    """`F.normalize(x, dim=-1) * self.scale * self.g`."""

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.scale * self.g


@RMS.look_alike(Lucidrains, "over another axis")
class NormalizeOtherAxis(Scaled):
    def forward(self, x):
        return F.normalize(x, dim=-2) * self.scale * self.g


class Halves(nn.Module):
    def normalize(self, x, dim):
        return x / 2


@RMS.look_alike(Lucidrains, "a method of a layer that is called like torch's function")
class NormalizeOfLayer(Scaled):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.tool = Halves()

    def forward(self, x):
        return self.tool.normalize(x, dim=-1) * self.scale * self.g


@RMS.look_alike(Lucidrains, "the default axis is not the last")
class NormalizeDefaultAxis(Scaled):
    def forward(self, x):
        return F.normalize(x) * self.scale * self.g


@RMS.look_alike(Lucidrains, "another norm")
class NormalizeManhattan(Scaled):
    def forward(self, x):
        return F.normalize(x, p=1, dim=-1) * self.scale * self.g


@RMS.look_alike(Lucidrains, "weight and scale first")
class NormalizeOtherGrouping(Scaled):
    def forward(self, x):
        return F.normalize(x, dim=-1) * (self.scale * self.g)


@RMS.spelling("normalize")
class NormalizeWidth(Scaled):
    """The width at the call."""

    def forward(self, x):
        return self.g * (F.normalize(x, p=2.0, dim=-1, eps=self.eps) * x.shape[-1] ** 0.5)


@RMS.look_alike(NormalizeWidth, "the width itself")
class NormalizeByWidth(Scaled):
    def forward(self, x):
        return self.g * (F.normalize(x, p=2.0, dim=-1, eps=self.eps) * x.shape[-1])


@RMS.spelling("normalize_one_plus")
class NormalizeOnePlus(Scaled):
    def forward(self, x):
        return F.normalize(x, dim=-1) * math.sqrt(self.dim) * (self.g + 1)


@RMS.look_alike(NormalizeOnePlus, "one is added at the end")
class NormalizePlusOne(Scaled):
    def forward(self, x):
        return F.normalize(x, dim=-1) * math.sqrt(self.dim) * self.g + 1


@RMS.spelling("normalize_offset")
class NormalizeOffset(Scaled):
    """As in x-transformers: a flag says whether the weight is one less than it is."""

    def __init__(self, dim: int, unit_offset: bool = True) -> None:
        super().__init__(dim)
        self.unit_offset = unit_offset

    def forward(self, x):
        gamma = self.g + float(self.unit_offset)
        return F.normalize(x, dim=-1) * self.scale * gamma


@RMS.look_alike(NormalizeOffset, "the flag scales")
class NormalizeFlagged(NormalizeOffset):
    def forward(self, x):
        gamma = self.g * float(self.unit_offset)
        return F.normalize(x, dim=-1) * self.scale * gamma


@RMS.spelling("normalize_offset", unit_offset=False)
class NormalizeNoOffset(NormalizeOffset):
    """The same with the flag off."""


@RMS.look_alike(NormalizeNoOffset, "the other way round", unit_offset=False)
class NormalizeNegatedOffset(NormalizeOffset):
    def forward(self, x):
        gamma = self.g + float(not self.unit_offset)
        return F.normalize(x, dim=-1) * self.scale * gamma


@RMS.spelling("normalize_unweighted")
class Simple(Scaled):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        del self.g

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.scale


@RMS.look_alike(Simple, "scaled by a condition")
class Conditioned(Scaled):
    def forward(self, x, condition=1.0):
        return F.normalize(x, dim=-1) * condition


@RMS.look_alike(Simple, "divided by the scale")
class SimpleDivided(Simple):
    def forward(self, x):
        return F.normalize(x, dim=-1) / self.scale


@RMS.spelling("normalize_unscaled")
class ScaleNorm(Scaled):
    """No root of the width: the weight has it."""

    def forward(self, x):
        return F.normalize(x, dim=-1, eps=self.eps) * self.g


@RMS.look_alike(ScaleNorm, "eps is added to the norm")
class ScaleNormAdded(Scaled):
    def forward(self, x):
        return x / (x.norm(2, dim=-1, keepdim=True) + self.eps) * self.g


@RMS.spelling("normalize_scaled_last")
class ScaledLast(Scaled):
    def forward(self, x):
        return F.normalize(x, dim=-1) * self.g * self.dim**0.5


@RMS.look_alike(ScaledLast, "another power of the width")
class ScaledLastOtherPower(Scaled):
    def forward(self, x):
        return F.normalize(x, dim=-1) * self.g * self.dim**0.25


@RMS.spelling("normalize_float32_late")
class NormalizeFloat32(Scaled):
    def forward(self, x):
        return (F.normalize(x.float(), dim=-1) * self.scale * self.g).to(x.dtype)


@RMS.look_alike(NormalizeFloat32, "not in float32")
class NormalizeInput(Scaled):
    def forward(self, x):
        return (F.normalize(x, dim=-1) * self.scale * self.g).to(x.dtype)


@RMS.spelling("normalize_float32")
class NormalizeFloat32Rounded(Scaled):
    def forward(self, x):
        return (F.normalize(x.float(), dim=-1) * self.scale).type_as(x) * self.g


@RMS.spelling("normalize_rounded")
@RMS.look_alike(NormalizeFloat32Rounded, "rounded before the scale")
class NormalizeRoundedEarly(Scaled):
    """As lucidrains' newer ones: in float32, and rounded before both products."""

    def forward(self, x):
        return F.normalize(x.float(), dim=-1).type_as(x) * self.scale * self.g


@RMS.look_alike(NormalizeRoundedEarly, "weight and scale exchanged")
class NormalizeWeightEarly(Scaled):
    def forward(self, x):
        return F.normalize(x.float(), dim=-1).type_as(x) * self.g * self.scale


@RMS.look_alike(NormalizeRoundedEarly, "another eps, outside")
class NormalizeRoundedEps(Scaled):
    def forward(self, x):
        return (F.normalize(x.float(), dim=-1) + self.eps).type_as(x) * self.scale * self.g


@RMS.look_alike(NormalizeRoundedEarly, "over another axis")
class NormalizeRoundedAxis(Scaled):
    def forward(self, x):
        return F.normalize(x.float(), dim=-2).type_as(x) * self.scale * self.g


@RMS.spelling("normalize_rounded_one_plus")
class NormalizeRoundedGamma(Scaled):
    """The same with a weight that begins at 0."""

    def forward(self, x):
        return F.normalize(x.float(), dim=-1).to(x.dtype) * self.scale * (self.g + 1)


@RMS.look_alike(NormalizeRoundedGamma, "one less")
class NormalizeRoundedLess(Scaled):
    def forward(self, x):
        return F.normalize(x.float(), dim=-1).to(x.dtype) * self.scale * (self.g - 1)


@RMS.spelling("normalize_rounded_unweighted")
class NormalizeRoundedPlain(Scaled):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        del self.g

    def forward(self, x):
        return F.normalize(x.float(), dim=-1).type_as(x) * x.shape[-1] ** 0.5


@RMS.look_alike(NormalizeRoundedPlain, "the width of another axis")
class NormalizeRoundedRows(NormalizeRoundedPlain):
    def forward(self, x):
        return F.normalize(x.float(), dim=-1).type_as(x) * x.shape[-2] ** 0.5


@RMS.spelling("normalize")
class ByHand(Scaled):
    """What `F.normalize` does, written out."""

    def forward(self, x):
        denom = x.norm(p=2, dim=-1, keepdim=True).clamp_min(self.eps).expand_as(x)
        return (x / denom) * self.scale * self.g


@RMS.look_alike(ByHand, "the norm is squared")
class ByHandSquared(Scaled):
    def forward(self, x):
        denom = x.norm(p=2, dim=-1, keepdim=True).pow(2).clamp_min(self.eps).expand_as(x)
        return (x / denom) * self.scale * self.g


@RMS.spelling("norm")
class NormWidth(Scaled):
    """The norm over the root of the width, and eps on it."""

    def forward(self, x):
        norm_x = x.norm(2, dim=-1, keepdim=True)
        rms = norm_x * (x.size(-1) ** -0.5)
        return x / (rms + self.eps) * self.g


@RMS.look_alike(NormWidth, "eps before the width")
class NormEpsFirst(Scaled):
    def forward(self, x):
        norm_x = x.norm(2, dim=-1, keepdim=True)
        rms = (norm_x + self.eps) * (x.size(-1) ** -0.5)
        return x / rms * self.g


@RMS.look_alike(NormWidth, "without the width")
class NormWithoutWidth(Scaled):
    def forward(self, x):
        return x / (x.norm(2, dim=-1, keepdim=True) + self.eps) * self.g


@RMS.spelling("norm_divided")
class NormOverRoot(Scaled):
    def forward(self, x):
        norm = torch.norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
        return self.g * (x / (norm + self.eps))


@RMS.look_alike(NormOverRoot, "multiplied by the root")
class NormTimesRoot(Scaled):
    def forward(self, x):
        norm = torch.norm(x, dim=-1, keepdim=True) * math.sqrt(x.shape[-1])
        return self.g * (x / (norm + self.eps))


@RMS.spelling("norm_inverse_first")
class NormInverse(Scaled):
    def forward(self, x):
        norm = x.norm(dim=-1, keepdim=True) * (1.0 / math.sqrt(x.shape[-1]))
        return self.g * x / (norm + self.eps)


@RMS.look_alike(NormInverse, "two over the root")
class NormTwice(Scaled):
    def forward(self, x):
        norm = x.norm(dim=-1, keepdim=True) * (2.0 / math.sqrt(x.shape[-1]))
        return self.g * x / (norm + self.eps)


@RMS.spelling("norm_least")
class NormLeast(Scaled):
    """As in older x-transformers: a least value after the width."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.scale = dim**-0.5

    def forward(self, x):
        norm = torch.norm(x, dim=-1, keepdim=True) * self.scale
        return x / norm.clamp(min=self.eps) * self.g


@RMS.look_alike(NormLeast, "a least value before the width")
class NormLeastFirst(NormLeast):
    def forward(self, x):
        norm = torch.norm(x, dim=-1, keepdim=True).clamp(min=self.eps) * self.scale
        return x / norm * self.g


@RMS.spelling("norm_divided_float32")
class VectorNorm(Scaled):
    def forward(self, x):
        h = x.float()
        h = h / (torch.linalg.vector_norm(h, dim=-1, keepdim=True) / self.dim**0.5 + self.eps)
        return h.to(x.dtype) * self.g


@RMS.look_alike(VectorNorm, "the largest magnitude instead")
class LargestNorm(Scaled):
    def forward(self, x):
        h = x.float()
        top = torch.linalg.vector_norm(h, ord=float("inf"), dim=-1, keepdim=True)
        h = h / (top / self.dim**0.5 + self.eps)
        return h.to(x.dtype) * self.g
