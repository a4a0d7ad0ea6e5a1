"""Spellings of RMSNorm by a root of a mean of squares, and by torch's function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from spelling import Corpus
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CORPORA", "WIDTH", "Weighted", "rows"]

WIDTH = 24  # no power of two, nor is its root exact


def rows(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """``x`` as ``[2, 7, 24]``, from rows that eps outweighs to large ones, and one of zeros."""
    x = torch.randn(2, 7, WIDTH, generator=generator) * torch.logspace(-4, 2, 7)[:, None]
    x[1, 3] = 0
    return {"x": x.to(dtype)}


RMS = Corpus("rms_norm", inputs=rows, sizes=(WIDTH,))
CORPORA = (RMS,)


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
