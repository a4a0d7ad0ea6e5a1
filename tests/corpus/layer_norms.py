"""Spellings of LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from norms import WIDTH, rows
from spelling import Corpus
from torch import nn

__all__ = ["CORPORA"]

LAYER = Corpus("layer_norm", inputs=rows, sizes=(WIDTH,))
CORPORA = (LAYER,)


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
