"""Spellings of norms, activations and gated products as functions: what a layer keeps is an argument."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from norms import WIDTH, rows
from spelling import Corpus

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CORPORA"]


def _weight(generator: torch.Generator) -> Tensor:
    return torch.randn(WIDTH, generator=generator)


def weighted(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x``, a weight of its dtype, and eps."""
    return {**rows(dtype, generator), "weight": _weight(generator).to(dtype), "eps": 1e-5}


def kept(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x``, a weight in float32, and eps."""
    return {**rows(dtype, generator), "weight": _weight(generator), "eps": 1e-5}


def affine(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x``, weight, bias and eps."""
    return {**weighted(dtype, generator), "bias": _weight(generator).to(dtype)}


def entries(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``x`` about zero."""
    return {"x": torch.randn(2, 7, WIDTH, generator=generator).mul(3).to(dtype)}


def pairs(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """``gate`` and ``up``."""
    gate, up = torch.randn(2, 2, 7, WIDTH, generator=generator).mul(3).to(dtype)
    return {"gate": gate.clone(), "up": up.clone()}


RMS = Corpus("rms_norm", inputs=weighted)
RMS_KEPT = Corpus("rms_norm", inputs=kept)
ROWS = Corpus("rms_norm", inputs=rows)
LAYER = Corpus("layer_norm", inputs=affine)
ENTRIES = Corpus("activation", inputs=entries)
HALVES = Corpus("gated_mlp", inputs=entries)
PAIRS = Corpus("gated_mlp", inputs=pairs)
CORPORA = (RMS, RMS_KEPT, ROWS, LAYER, ENTRIES, HALVES, PAIRS)


# -- RMSNorm ------------------------------------------------------------------------------------------


@RMS.spelling("llama", regrouped=True)
@RMS_KEPT.spelling("llama", regrouped=True)
def rms_norm(x, weight, eps):
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return weight * (x.float() * torch.rsqrt(variance + eps)).to(x.dtype)


@RMS.look_alike(rms_norm, "eps is no number under the root")
def rms_norm_eps_outside(x, weight, eps):
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return weight * (x.float() * (torch.rsqrt(variance) + eps)).to(x.dtype)


@RMS.look_alike(rms_norm, "eps is multiplied")
def rms_norm_eps_multiplied(x, weight, eps):
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return weight * (x.float() * torch.rsqrt(variance * eps)).to(x.dtype)


@RMS.look_alike(rms_norm, "the weight is added")
def rms_norm_shifted(x, weight, eps):
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return weight + (x.float() * torch.rsqrt(variance + eps)).to(x.dtype)


@RMS_KEPT.look_alike(rms_norm, "over another axis")
def rms_norm_of_columns(x, weight, eps):
    variance = x.float().pow(2).mean(-2, keepdim=True)
    return weight * (x.float() * torch.rsqrt(variance + eps)).to(x.dtype)


@RMS.spelling("llama_nullable")
def rms_norm_or_plain(x, weight=None, eps=1e-6):
    h = x.to(torch.float32)
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    if weight is not None:
        h = h * weight
    return h


@RMS.look_alike(rms_norm_or_plain, "the other way round")
def rms_norm_if_none(x, weight=None, eps=1e-6):
    h = x.to(torch.float32)
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    if weight is None:
        h = h * 2
    return h


@RMS_KEPT.spelling("gemma")
def gemma_norm(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * (1.0 + weight.float())).type_as(x)


@RMS_KEPT.look_alike(gemma_norm, "one less")
def gemma_norm_less(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * (1.0 - weight.float())).type_as(x)


@RMS.spelling("fused")
def fused_norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


@RMS.look_alike(fused_norm, "the weight twice")
def fused_norm_twice(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps) * weight


@RMS.spelling("fused_then_weight")
def fused_then_weight(x, weight, eps):
    return F.rms_norm(x, (x.shape[-1],), eps=eps) * weight


@RMS.look_alike(fused_then_weight, "the weight before the norm")
def weight_then_fused(x, weight, eps):
    return F.rms_norm(x * weight, (x.shape[-1],), eps=eps)


@ROWS.spelling("unweighted")
def plain_norm(t):
    h = t.float()
    return (h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + 1e-6)).type_as(t)


@ROWS.look_alike(plain_norm, "the mean is subtracted afterwards")
def plain_norm_centred(t):
    h = t.float()
    h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + 1e-6)
    return (h - h.mean(-1, keepdim=True)).type_as(t)


# -- LayerNorm ----------------------------------------------------------------------------------------


@LAYER.spelling("fused")
def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, (x.size(-1),), weight, bias, eps)


@LAYER.look_alike(layer_norm, "weight and bias exchanged")
def layer_norm_exchanged(x, weight, bias, eps):
    return F.layer_norm(x, (x.size(-1),), bias, weight, eps) + eps


@LAYER.spelling("out_float32_both_mean_square_rsqrt_after_weight", regrouped=True)
def layer_norm_written(x, weight, bias, eps):
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    var = (h - mean).pow(2).mean(-1, keepdim=True)
    return ((h - mean) * torch.rsqrt(var + eps) * weight + bias).to(x.dtype)


@LAYER.look_alike(layer_norm_written, "the bias before the weight")
def layer_norm_biased(x, weight, bias, eps):
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    var = (h - mean).pow(2).mean(-1, keepdim=True)
    return (((h - mean) * torch.rsqrt(var + eps) + bias) * weight).to(x.dtype)


# -- Activations --------------------------------------------------------------------------------------


@ENTRIES.spelling("gelu_tanh_cubed", regrouped=True)
def gelu_new(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


@ENTRIES.look_alike(gelu_new, "another factor")
def gelu_other(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.047715 * torch.pow(x, 3.0))))


@ENTRIES.spelling("quick_gelu")
def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


@ENTRIES.look_alike(quick_gelu, "another factor")
def quicker_gelu(x):
    return x * torch.sigmoid(1.72 * x)


@ENTRIES.spelling("relu2")
def squared_relu(x):
    return F.relu(x).square()


@ENTRIES.look_alike(squared_relu, "the square first")
def relu_of_square(x):
    return F.relu(x.square())


# -- Gated products -----------------------------------------------------------------------------------


@HALVES.spelling("activation")
def swiglu(x):
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


@HALVES.look_alike(swiglu, "the other half is the gate")
def swiglu_other(x):
    a, b = x.chunk(2, -1)
    return a * F.silu(b)


@HALVES.look_alike(swiglu, "along another axis")
def swiglu_rows(x):
    a, b = torch.cat((x, x.flip(0))).chunk(2, 0)
    return F.silu(a) * b


@HALVES.spelling("activation")
def silu_and_mul(x):
    d = x.shape[-1] // 2
    return F.silu(x[..., :d]) * x[..., d:]


@HALVES.look_alike(silu_and_mul, "one half twice")
def silu_and_mul_first(x):
    d = x.shape[-1] // 2
    return F.silu(x[..., :d]) * x[..., :d]


@HALVES.look_alike(silu_and_mul, "every other entry")
def silu_and_mul_strided(x):
    return F.silu(x[..., ::2]) * x[..., 1::2]


@HALVES.spelling("activation_up_first")
def geglu(x):
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)


@HALVES.look_alike(geglu, "the gate is a factor as well")
def geglu_of_gate(x):
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate) * gate


@HALVES.spelling("activation_up_first")
def glu_by_hand(x):
    value, gate = x.split(x.shape[-1] // 2, dim=-1)
    return value * torch.sigmoid(gate)


@HALVES.look_alike(glu_by_hand, "torch's rounds once")
def glu_of_torch(x):
    return F.glu(x, dim=-1)


@PAIRS.spelling("given")
def gated(gate, up):
    return F.silu(gate) * up


@PAIRS.look_alike(gated, "both are activated")
def gated_both(gate, up):
    return F.silu(gate) * F.silu(up)


@PAIRS.look_alike(gated, "one twice")
def gated_twice(gate, up):
    return F.silu(gate) * gate + 0 * up


@PAIRS.spelling("given_float32")
def gated_in_float32(gate, up):
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


@PAIRS.look_alike(gated_in_float32, "the activation is rounded")
def gated_rounded(gate, up):
    return (F.silu(gate).float() * up.float()).to(gate.dtype)
