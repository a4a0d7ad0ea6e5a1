"""Spellings of RMSNorm and LayerNorm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
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


# -- RMSNorm: a root of a mean of squares -------------------------------------------------------------


@RMS.spelling("llama", regrouped=True)
class MeanOfProduct(Weighted):
    """`torch.mean(x * x, -1)`."""

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(torch.mean(h * h, dim=-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


@RMS.look_alike(MeanOfProduct, "the mean is kept in no dimension")
class MeanOfAll(Weighted):
    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(torch.mean(h * h) + self.eps)
        return self.weight * h.to(x.dtype)


@RMS.spelling("llama")
class Torchtune(Weighted):
    """As in torchtune: one name for the row in float32, a weight that is called scale."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps)
        self.scale = self.weight
        del self.weight

    def forward(self, x):
        x_fp32 = x.float()
        x_normed = (x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)
        return x_normed * self.scale


@RMS.look_alike(Torchtune, "the product is rounded, not the norm")
class TorchtuneLate(Torchtune):
    def forward(self, x):
        x_fp32 = x.float()
        x_normed = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x_normed * self.scale).type_as(x)


@RMS.spelling("helium", regrouped=True)
class WeightInFloat32(Weighted):
    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)


@RMS.look_alike(WeightInFloat32, "squares of the rounded row")
class SquaresOfInput(Weighted):
    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)


@RMS.spelling("input")
class InInput(Weighted):
    """Nothing is cast: two products, from left to right."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


@RMS.look_alike(InInput, "the other grouping of the two products")
class OtherGrouping(Weighted):
    def forward(self, x):
        return x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight)


@RMS.spelling("input_divided")
class DividedByRms(Weighted):
    def forward(self, x):
        rms = torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True) + self.eps)
        return (x / rms) * self.weight


@RMS.look_alike(DividedByRms, "the weight is divided first")
class WeightDivided(Weighted):
    def forward(self, x):
        rms = torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True) + self.eps)
        return x * (self.weight / rms)


@RMS.spelling("input_divided")
class Chained(Weighted):
    """Every step a method: `.add(eps).sqrt()`."""

    def forward(self, x):
        rms = x.pow(2).mean(dim=-1, keepdim=True).add(self.eps).sqrt()
        return x / rms * self.weight


@RMS.look_alike(Chained, "multiplied by the inverse root")
class ChainedInverse(Weighted):
    def forward(self, x):
        rms = x.pow(2).mean(dim=-1, keepdim=True).add(self.eps).rsqrt()
        return x * rms * self.weight


@RMS.spelling("scaled_first")
class WeightFirst(Weighted):
    def forward(self, x):
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(variance + self.eps)


@RMS.look_alike(WeightFirst, "the weight last")
class WeightLast(Weighted):
    def forward(self, x):
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps))


@RMS.spelling("float32_out")
class StaysFloat32(Weighted):
    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


@RMS.look_alike(StaysFloat32, "rounded to the dtype of the weight")
class RoundedToWeight(Weighted):
    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h.to(self.weight.dtype) * self.weight).float()


@RMS.spelling("gemma")
class OnePlus(Weighted):
    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (h * (1.0 + self.weight.float())).type_as(x)


@RMS.look_alike(OnePlus, "one less the weight")
class OneMinus(Weighted):
    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (h * (1.0 - self.weight.float())).type_as(x)


@RMS.spelling("unweighted")
class Unweighted(nn.Module):
    """No weight: an epsilon that is written into the code."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x):
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@RMS.look_alike(Unweighted, "a power that is not the inverse root")
class OtherPower(Unweighted):
    def forward(self, x):
        h = x.float()
        return (h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).pow(-0.4)).to(x.dtype)


@RMS.spelling("root")
class EpsBehindRoot(Weighted):
    """eps is added to the root, not under it."""

    def forward(self, x):
        rms = x.pow(2).mean(-1, keepdim=True).sqrt()
        return self.weight * (x / (rms + self.eps))


@RMS.look_alike(EpsBehindRoot, "eps under the root")
class EpsUnderRoot(Weighted):
    def forward(self, x):
        rms = (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return self.weight * (x / rms)


@RMS.spelling("root_first")
class EpsBehindRootWeightFirst(Weighted):
    def forward(self, x):
        rms = x.pow(2).mean(dim=-1, keepdim=True).sqrt()
        return self.weight * x / (rms + self.eps)


@RMS.look_alike(EpsBehindRootWeightFirst, "eps is taken off")
class EpsTakenOff(Weighted):
    def forward(self, x):
        rms = x.pow(2).mean(dim=-1, keepdim=True).sqrt()
        return self.weight * x / (rms - self.eps)


@RMS.spelling("root_least")
class LeastRoot(Weighted):
    def forward(self, x):
        rms = x.pow(2).mean(-1, keepdim=True).sqrt()
        return x / rms.clamp(min=self.eps) * self.weight


@RMS.look_alike(LeastRoot, "eps is the most, not the least")
class MostRoot(Weighted):
    def forward(self, x):
        rms = x.pow(2).mean(-1, keepdim=True).sqrt()
        return x / rms.clamp(max=self.eps) * self.weight


@RMS.spelling("sum_float32", regrouped=True)
class SumOverWidth(Weighted):
    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt((h * h).sum(-1, keepdim=True) / h.shape[-1] + self.eps)
        return h.to(x.dtype) * self.weight


@RMS.look_alike(SumOverWidth, "over the number of rows")
class SumOverRows(Weighted):
    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt((h * h).sum(-1, keepdim=True) / h.shape[-2] + self.eps)
        return h.to(x.dtype) * self.weight


@RMS.spelling("sum_divided", regrouped=True)
class SumOverDim(Weighted):
    def forward(self, x):
        return x / ((x**2).sum(dim=-1, keepdim=True) / self.dim + self.eps) ** 0.5 * self.weight


@RMS.look_alike(SumOverDim, "not over the width")
class SumAlone(Weighted):
    def forward(self, x):
        return x / ((x**2).sum(dim=-1, keepdim=True) + self.eps) ** 0.5 * self.weight


# -- RMSNorm: a Euclidean norm ------------------------------------------------------------------------


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


@RMS.look_alike(NormalizeFloat32Rounded, "rounded before the scale")
class NormalizeRoundedEarly(Scaled):
    def forward(self, x):
        return F.normalize(x.float(), dim=-1).type_as(x) * self.scale * self.g


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


# -- RMSNorm: torch's function ------------------------------------------------------------------------


@RMS.spelling("fused_unweighted")
def nanochat_norm(x):
    """Functional, without a weight."""
    return F.rms_norm(x, (x.size(-1),))


@RMS.look_alike(nanochat_norm, "over the last two dimensions")
def norm_of_two(x):
    return F.rms_norm(x, x.shape[-2:])


@RMS.look_alike(nanochat_norm, "over another axis of a square input")
def norm_of_transposed(x):
    return F.rms_norm(x.transpose(-1, -2), (x.size(-2),)).transpose(-1, -2)


@RMS.spelling("fused")
class LastDimension(Weighted):
    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


@RMS.look_alike(LastDimension, "another eps")
class LastDimensionTwice(Weighted):
    def forward(self, x):
        return F.rms_norm(F.rms_norm(x, x.shape[-1:], self.weight, self.eps), x.shape[-1:])


@RMS.spelling("fused")
class WeightShape(Weighted):
    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, weight=self.weight, eps=1e-5)


@RMS.look_alike(WeightShape, "the weight is squared")
class WeightSquared(Weighted):
    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, weight=self.weight**2, eps=1e-5)


@RMS.spelling("fused")
class DimShape(Weighted):
    def forward(self, x):
        return F.rms_norm(x, (self.dim,), self.weight, self.eps)


@RMS.look_alike(DimShape, "the weight as a bias")
class WeightAdded(Weighted):
    def forward(self, x):
        return F.rms_norm(x, (self.dim,), None, self.eps) + self.weight


@RMS.spelling("fused_one_plus")
class FusedOnePlus(Weighted):
    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight + 1, self.eps)


@RMS.look_alike(FusedOnePlus, "one less")
class FusedOneLess(Weighted):
    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight - 1, self.eps)


@RMS.spelling("fused_then_weight")
class FusedThenWeight(Weighted):
    def forward(self, x):
        return self.weight * F.rms_norm(x, (x.size(-1),), eps=self.eps)


@RMS.look_alike(FusedThenWeight, "the weight before the norm")
class WeightThenFused(Weighted):
    def forward(self, x):
        return F.rms_norm(self.weight * x, (x.size(-1),), eps=self.eps)


@RMS.spelling("fused_float32_cast")
class FusedFloat32(Weighted):
    def forward(self, x):
        return F.rms_norm(x.float(), (self.dim,), self.weight.float(), self.eps).to(x.dtype)


@RMS.look_alike(FusedFloat32, "cast back before the weight")
class FusedFloat32Early(Weighted):
    def forward(self, x):
        return F.rms_norm(x.float(), (self.dim,), None, self.eps).to(x.dtype) * self.weight.float()


@RMS.spelling("fused", WIDTH)
class OfTorch(nn.RMSNorm):
    """torch's own class, as Flux and Wan have it."""


@RMS.look_alike(OfTorch, "twice", WIDTH)
class OfTorchTwice(nn.RMSNorm):
    def forward(self, x):
        return 2 * F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


# -- RMSNorm: weights that may be None ----------------------------------------------------------------


def is_npu() -> bool:
    return False


class Diffusers(nn.Module):
    """A weight that may be None, a bias that may be None, and a cast that asks the weight."""

    def __init__(self, dim: int, eps: float = 1e-5, affine: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x):
        if is_npu():
            x = x + 1
        else:
            input_dtype = x.dtype
            variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
            x = x * torch.rsqrt(variance + self.eps)
            if self.weight is not None:
                if self.weight.dtype in [torch.float16, torch.bfloat16]:
                    x = x.to(self.weight.dtype)
                x = x * self.weight
                if self.bias is not None:
                    x = x + self.bias
            else:
                x = x.to(input_dtype)
        return x


@RMS.spelling("diffusers")
class DiffusersWeight(Diffusers):
    """With a weight."""


@RMS.look_alike(DiffusersWeight, "the bias is taken off", bias=True)
class DiffusersBiasOff(Diffusers):
    def forward(self, x):
        input_dtype = x.dtype
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            if self.weight.dtype in [torch.float16, torch.bfloat16]:
                x = x.to(self.weight.dtype)
            x = x * self.weight
            if self.bias is not None:
                x = x - self.bias
        else:
            x = x.to(input_dtype)
        return x


@RMS.spelling("diffusers", affine=False)
class DiffusersPlain(Diffusers):
    """Without a weight."""


@RMS.look_alike(DiffusersPlain, "stays in float32 without a weight", affine=False)
class DiffusersStays(Diffusers):
    def forward(self, x):
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            x = x * self.weight
        return x


@RMS.spelling("diffusers", bias=True)
class DiffusersBias(Diffusers):
    """With a bias."""


@RMS.look_alike(DiffusersBias, "the bias before the weight", bias=True)
class DiffusersBiasFirst(Diffusers):
    def forward(self, x):
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            if self.weight.dtype in [torch.float16, torch.bfloat16]:
                x = x.to(self.weight.dtype)
            x = (x + self.bias) * self.weight
        return x


@RMS.spelling("promoted_nullable")
class Mochi(Diffusers):
    def forward(self, x):
        input_dtype = x.dtype
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            x = x * self.weight
        return x.to(input_dtype)


@RMS.look_alike(Mochi, "only without a weight is it cast")
class MochiOther(Diffusers):
    def forward(self, x):
        input_dtype = x.dtype
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        if self.weight is None:
            return x.to(input_dtype)
        return x * self.weight


@RMS.spelling("llama_nullable")
class LlamaNullable(Diffusers):
    def forward(self, x):
        h = x.float()
        h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        if self.weight is not None:
            h = h * self.weight
        return h


@RMS.look_alike(LlamaNullable, "the weight where there is none")
class LlamaNullableOther(Diffusers):
    def forward(self, x):
        h = x.float()
        h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        if self.weight is None:
            h = h * 2
        return h


# -- LayerNorm ----------------------------------------------------------------------------------------


class Affine(nn.Module):
    """A norm with weight and bias."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))


@LAYER.spelling("fused")
class LayerShape(nn.Module):
    """As in nanoGPT: the shape of the weight, a bias that may be None."""

    def __init__(self, ndim: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


@LAYER.look_alike(LayerShape, "the weight on both sides")
class LayerShapeTwice(LayerShape):
    def forward(self, x):
        return F.layer_norm(x * self.weight, self.weight.shape, self.weight, self.bias, 1e-5)


@LAYER.spelling("fused")
class LayerLast(Affine):
    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)


@LAYER.look_alike(LayerLast, "weight and bias exchanged")
class LayerExchanged(Affine):
    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, None) - self.bias


@LAYER.spelling("fused_unweighted")
def plain_layer_norm(x):
    return F.layer_norm(x, (x.size(-1),))


@LAYER.look_alike(plain_layer_norm, "over two dimensions")
def layer_norm_of_two(x):
    return F.layer_norm(x, (x.size(-2), x.size(-1)))


@LAYER.spelling("fused", WIDTH)
class LayerOfTorch(nn.LayerNorm):
    """torch's own class."""


@LAYER.look_alike(LayerOfTorch, "negated", WIDTH)
class LayerNegated(nn.LayerNorm):
    def forward(self, x):
        return -F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


@LAYER.spelling("fused_float32_nullable", WIDTH)
class LayerFloat32(nn.LayerNorm):
    """As in Wan: all in float32, weight and bias as well."""

    def forward(self, x):
        origin_dtype = x.dtype
        return F.layer_norm(
            x.float(),
            self.normalized_shape,
            self.weight.float() if self.weight is not None else None,
            self.bias.float() if self.bias is not None else None,
            self.eps,
        ).to(origin_dtype)


@LAYER.look_alike(LayerFloat32, "not cast back", WIDTH)
class LayerStaysFloat32(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(
            x.float(),
            self.normalized_shape,
            self.weight.float() if self.weight is not None else None,
            self.bias.float() if self.bias is not None else None,
            self.eps,
        )


@LAYER.spelling("fused_float32_nullable", WIDTH, elementwise_affine=False)
class LayerFloat32Plain(LayerFloat32):
    """As in Wan's blocks: without weight and bias."""


@LAYER.look_alike(LayerFloat32Plain, "a weight of its own", WIDTH, elementwise_affine=False)
class LayerFloat32Doubled(LayerFloat32):
    def forward(self, x):
        return 2 * super().forward(x)


@LAYER.spelling("fused_float32_cast")
class LayerFloat32Cast(Affine):
    def forward(self, x):
        y = F.layer_norm(x.float(), (self.dim,), self.weight.float(), self.bias.float(), self.eps)
        return y.type_as(x)


@LAYER.look_alike(LayerFloat32Cast, "the bias is added in the dtype of the input")
class LayerBiasBehind(Affine):
    def forward(self, x):
        y = F.layer_norm(x.float(), (self.dim,), self.weight.float(), None, self.eps)
        return y.type_as(x) + self.bias


@LAYER.spelling("fused_float32", WIDTH)
class LayerOfParent(nn.LayerNorm):
    """As in CLIP: the parent's forward, in float32."""

    def forward(self, x):
        return super().forward(x.type(torch.float32)).type(x.dtype)


@LAYER.look_alike(LayerOfParent, "another parent", WIDTH)
class LayerOfParentTwice(LayerNegated):
    def forward(self, x):
        return super().forward(x.type(torch.float32)).type(x.dtype)


@LAYER.spelling("fused_one_plus_no_bias")
class LayerOnePlus(Affine):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        del self.bias

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], weight=self.weight + 1, eps=self.eps)


@LAYER.look_alike(LayerOnePlus, "two more")
class LayerTwoPlus(LayerOnePlus):
    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], weight=self.weight + 2, eps=self.eps)


@LAYER.spelling("fused_then_both")
class LayerThenAffine(Affine):
    def forward(self, x):
        return F.layer_norm(x, (x.shape[-1],), eps=self.eps) * self.weight + self.bias


@LAYER.look_alike(LayerThenAffine, "the bias before the weight")
class LayerThenBias(Affine):
    def forward(self, x):
        return (F.layer_norm(x, (x.shape[-1],), eps=self.eps) + self.bias) * self.weight


@LAYER.spelling("out_input_both_var_divide_after_weight", regrouped=True)
class LayerWritten(Affine):
    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        var = x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(var + self.eps) * self.weight + self.bias


@LAYER.look_alike(LayerWritten, "the unbiased variance")
class LayerUnbiased(Affine):
    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        var = x.var(-1, keepdim=True)
        return (x - mean) / torch.sqrt(var + self.eps) * self.weight + self.bias


@LAYER.look_alike(LayerWritten, "the mean is not taken off")
class LayerUncentred(Affine):
    def forward(self, x):
        var = x.var(-1, unbiased=False, keepdim=True)
        return x / torch.sqrt(var + self.eps) * self.weight + self.bias


@LAYER.spelling("out_input_weight_var_rsqrt_after_weight", regrouped=True)
class LayerLucidrains(Affine):
    """`correction=0`, and no bias."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        del self.bias

    def forward(self, x):
        var = torch.var(x, dim=-1, correction=0, keepdim=True)
        mean = torch.mean(x, dim=-1, keepdim=True)
        return (x - mean) * (var + self.eps).rsqrt() * self.weight


@LAYER.look_alike(LayerLucidrains, "one degree of freedom less")
class LayerCorrected(LayerLucidrains):
    def forward(self, x):
        var = torch.var(x, dim=-1, correction=1, keepdim=True)
        mean = torch.mean(x, dim=-1, keepdim=True)
        return (x - mean) * (var + self.eps).rsqrt() * self.weight


@LAYER.spelling("out_input_both_mean_square_divide_after_weight", regrouped=True)
class LayerSquares(Affine):
    def forward(self, x):
        u = x.mean(-1, keepdim=True)
        s = (x - u).pow(2).mean(-1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight * x + self.bias


@LAYER.look_alike(LayerSquares, "squares of what is not centred")
class LayerRawSquares(Affine):
    def forward(self, x):
        u = x.mean(-1, keepdim=True)
        s = x.pow(2).mean(-1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight * x + self.bias


@LAYER.spelling("out_float32_both_mean_square_rsqrt_before_weight", regrouped=True)
class LayerRoundedEarly(Affine):
    def forward(self, x):
        h = x.float()
        d = h - h.mean(dim=-1, keepdim=True)
        n = (d * torch.rsqrt((d * d).mean(dim=-1, keepdim=True) + self.eps)).to(x.dtype)
        return n * self.weight + self.bias


@LAYER.look_alike(LayerRoundedEarly, "rounded behind the weight")
class LayerRoundedBetween(Affine):
    def forward(self, x):
        h = x.float()
        d = h - h.mean(dim=-1, keepdim=True)
        n = d * torch.rsqrt((d * d).mean(dim=-1, keepdim=True) + self.eps)
        return (n * self.weight).to(x.dtype) + self.bias


@LAYER.spelling("out_float32_both_mean_square_rsqrt_after_weight", regrouped=True)
class LayerRoundedLate(Affine):
    def forward(self, x):
        h = x.float()
        mean = h.mean(-1, keepdim=True)
        variance = (h - mean).square().mean(-1, keepdim=True)
        return ((h - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias).to(x.dtype)


@LAYER.look_alike(LayerRoundedLate, "eps on the root")
class LayerEpsOutside(Affine):
    def forward(self, x):
        h = x.float()
        mean = h.mean(-1, keepdim=True)
        variance = (h - mean).square().mean(-1, keepdim=True)
        return ((h - mean) / (torch.sqrt(variance) + self.eps) * self.weight + self.bias).to(x.dtype)


@LAYER.spelling("std_input_both_first", regrouped=True)
class LayerAnnotated(Affine):
    """As in the annotated transformer: the unbiased deviation, and eps on it."""

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        return self.weight * (x - mean) / (std + self.eps) + self.bias


@LAYER.look_alike(LayerAnnotated, "the biased deviation")
class LayerBiasedDeviation(Affine):
    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True, unbiased=False)
        return self.weight * (x - mean) / (std + self.eps) + self.bias
