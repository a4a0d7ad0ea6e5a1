"""Norms that are scaled and shifted by a condition, as public programs write them, and look-alikes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from spelling import Corpus
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CORPORA"]

BATCH, WIDTH = 3, 6


def conditioned(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Tokens, as many as samples so that a mistaken axis fits, and a scale and a shift of each sample."""
    shapes = {"x": (BATCH, BATCH, WIDTH), "scale": (BATCH, WIDTH), "shift": (BATCH, WIDTH)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


SAMPLES = Corpus("modulated_norm", inputs=conditioned)
CORPORA = (SAMPLES,)
spelling, look_alike = SAMPLES.spelling, SAMPLES.look_alike

BARE, BOTH, RMS = "layer_norm_fused_unweighted", "layer_norm_fused", "rms_norm_fused"


class Layer(nn.Module):
    """One without weight, and one with."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.drop = nn.Dropout(0.0)


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)


# -- in one expression ----------------------------------------------------------------------------


@spelling(BOTH)
class Indexed(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None]


@look_alike(Indexed, "nothing is added to the scale")
class WithoutOne(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * scale[:, None] + shift[:, None]


@look_alike(Indexed, "the scale is subtracted")
class OneMinus(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * (1 - scale[:, None]) + shift[:, None]


@look_alike(Indexed, "one is subtracted")
class MinusOne(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * (scale[:, None] - 1) + shift[:, None]


@look_alike(Indexed, "another number")
class TwoPlus(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * (2 + scale[:, None]) + shift[:, None]


@look_alike(Indexed, "the shift comes before the scale")
class ShiftFirst(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (self.norm(x) + shift[:, None]) * (1 + scale[:, None])


@look_alike(Indexed, "scale and shift are exchanged")
class Exchanged(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * (1 + shift[:, None]) + scale[:, None]


@look_alike(Indexed, "the condition is one of tokens")
class OtherAxis(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * (1 + scale[None]) + shift[None]


@look_alike(Indexed, "as torch broadcasts it, the condition is one of tokens")
class NoAxis(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * (1 + scale) + shift


@look_alike(Indexed, "the shift is one of tokens")
class ShiftOfTokens(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * (1 + scale[:, None]) + shift


@look_alike(Indexed, "the shift is subtracted")
class MinusShift(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * (1 + scale[:, None]) - shift[:, None]


@look_alike(Indexed, "a quotient")
class Divided(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) / (1 + scale[:, None]) + shift[:, None]


@look_alike(Indexed, "something is done to the normed tokens")
class Between(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.relu(self.norm(x)) * (1 + scale[:, None]) + shift[:, None]


@look_alike(Indexed, "something is done to the scaled tokens")
class BetweenProductAndSum(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.relu(self.norm(x) * (1 + scale[:, None])) + shift[:, None]


@look_alike(Indexed, "the factor is squared")
class Squared(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * (1 + scale[:, None]) ** 2 + shift[:, None]


@look_alike(Indexed, "tokens and channels are normalised together")
class OverTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((BATCH, WIDTH), elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None]


@look_alike(Indexed, "the samples are normalised")
class OverSamples(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x.transpose(0, 1)) * (1 + scale[:, None]) + shift[:, None]


@look_alike(Indexed, "the layer is given more")
class MoreArguments(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Twice()  # type: ignore[assignment]

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x, 2.0) * (1 + scale[:, None]) + shift[:, None]


class Twice(nn.Module):
    def forward(self, x: Tensor, number: float) -> Tensor:
        return F.layer_norm(x, (WIDTH,)) * number


@spelling(BOTH)
class Unsqueezed(Weighted):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (scale.unsqueeze(1) + 1.0) * self.norm(x) + shift.unsqueeze(1)


@look_alike(Unsqueezed, "the factor is negative")
class Negative(Weighted):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return -(scale.unsqueeze(1) + 1.0) * self.norm(x) + shift.unsqueeze(1)


@look_alike(Unsqueezed, "the other axis")
class UnsqueezedBefore(Weighted):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (scale.unsqueeze(0) + 1.0) * self.norm(x) + shift.unsqueeze(0)


@spelling(BOTH)
class FactorIndexed(Layer):
    """An index of the factor."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return shift[:, None, :] + self.norm(x) * (1 + scale)[:, None, :]


@look_alike(FactorIndexed, "the index is that of tokens")
class FactorIndexedBefore(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return shift[None, :, :] + self.norm(x) * (1 + scale)[None, :, :]


@look_alike(FactorIndexed, "the channels are reversed")
class FactorFlipped(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return shift[:, None, :] + self.norm(x) * (1 + scale).flip(1)[:, None, :]


@spelling(BOTH)
class ScaleOnly(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * (1 + scale.unsqueeze(1))


@look_alike(ScaleOnly, "nothing is added to the scale")
class ScaleOnlyWithoutOne(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * scale.unsqueeze(1)


@spelling(BOTH)
class OfTokens(Layer):
    """A condition of each token."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        a, b = x * scale[:, None], x + shift[:, None]
        return self.norm(x) * (1 + a) + b


@look_alike(OfTokens, "a condition of each token and sample, exchanged")
class OfTokensTransposed(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        a, b = x * scale[:, None], x + shift[:, None]
        return self.norm(x.transpose(0, 1)) * (1 + a) + b


@spelling(BOTH)
class OfAll(Layer):
    """One condition for all samples."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * (1 + scale[0]) + shift[0]


@look_alike(OfAll, "one number for all channels")
class OfAllChannels(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * (1 + scale[0, 0]) + shift[0, 0]


@spelling(RMS)
class WithRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH, eps=1e-6)])

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norms[0](x) * (1 + scale[:, None]) + shift[:, None]


@look_alike(WithRMSNorm, "no norm")
class WithLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norms[0](x) * (1 + scale[:, None]) + shift[:, None]


class NullableNorm(nn.Module):
    """The weight may be None: the result is then rounded, and else the product."""

    def __init__(self, weight: bool, bias: bool = False) -> None:
        super().__init__()
        self.eps = 1e-6
        self.weight, self.bias = None, None
        if weight:
            self.weight = nn.Parameter(torch.ones(WIDTH))
            self.bias = nn.Parameter(torch.zeros(WIDTH)) if bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            if self.weight.dtype in [torch.float16, torch.bfloat16]:
                hidden_states = hidden_states.to(self.weight.dtype)
            hidden_states = hidden_states * self.weight
            if self.bias is not None:
                hidden_states = hidden_states + self.bias
        else:
            hidden_states = hidden_states.to(input_dtype)
        return hidden_states


@spelling("rms_norm_diffusers")
class WithNullableNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = NullableNorm(False)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm1(x) * (1 + scale[:, None]) + shift[:, None]


@look_alike(WithNullableNorm, "the norm has a bias")
class WithBiasedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = NullableNorm(True, True)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm1(x) * (1 + scale[:, None]) + shift[:, None]


@look_alike(WithNullableNorm, "the weight is no parameter")
class WithBufferedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = NullableNorm(False)
        del self.norm1.weight
        self.norm1.register_buffer("weight", torch.arange(WIDTH) + 1.0)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm1(x) * (1 + scale[:, None]) + shift[:, None]


@spelling("rms_norm_diffusers")
class WithNullableNormAndWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm2 = NullableNorm(True)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = x + shift[:, None]
        h = self.norm2(x)
        h = h * (1 + scale[:, None])
        return h + x


@look_alike(WithNullableNormAndWeight, "the weight is scaled as well")
class WithNullableNormAfterwards(WithNullableNormAndWeight):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = x + shift[:, None]
        h = self.norm2(x)
        h = h * (1 + scale[:, None] * self.norm2.weight)
        return h + x


# -- in float32 -----------------------------------------------------------------------------------


class Float32(nn.LayerNorm):
    """In float32, and back."""

    def __init__(self) -> None:
        super().__init__(WIDTH, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, None, None, self.eps).to(x.dtype)


class InFloat32(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Float32()


@spelling("layer_norm_fused_float32_unweighted_upcast")
class Upcast(InFloat32):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = (self.norm(x.float()) * (1 + scale[:, None]) + shift[:, None]).type_as(x)
        return y


@look_alike(Upcast, "the input is cast to half precision")
class Downcast(InFloat32):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (self.norm(x.half()) * (1 + scale[:, None]) + shift[:, None]).type_as(x)


@spelling("layer_norm_fused_float32_unweighted_widened")
class Widened(InFloat32):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x).float() * (1 + scale.float().unsqueeze(1)) + shift.float().unsqueeze(1)


@look_alike(Widened, "the factor is rounded before it is widened")
class WidenedAfter(InFloat32):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x).float() * (1 + scale.unsqueeze(1)).float() + shift.float().unsqueeze(1)


@spelling("layer_norm_fused_float32_unweighted")
class CastAfter(InFloat32):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        a, b = scale.float()[:, None], shift.float()[:, None]
        return (self.norm(x) * (1 + a) + b).to(x.dtype)


@look_alike(CastAfter, "it is cast before the shift")
class CastBeforeShift(InFloat32):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        a, b = scale.float()[:, None], shift.float()[:, None]
        return (self.norm(x) * (1 + a)).to(x.dtype) + b


# -- in two statements ----------------------------------------------------------------------------


@spelling(BOTH)
class NamedAgain(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.norm(x)
        h = h * (1 + scale[:, None]) + shift[:, None]
        return h + x


@look_alike(NamedAgain, "the modulated tokens are modulated")
class NamedTwice(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.norm(x)
        h = h * (1 + scale[:, None]) + shift[:, None]
        h = h * (1 + scale[:, None]) + shift[:, None]
        return h + x


@look_alike(NamedAgain, "the normed tokens are read as well")
class ReadTwice(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.norm(x)
        y = h * (1 + scale[:, None]) + shift[:, None]
        return y + h


@look_alike(NamedAgain, "the normed tokens are the shift as well")
class ReadAsShift(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.norm(x)
        h = h * (1 + scale[:, None]) + h
        return h + x


@look_alike(NamedAgain, "the input is another in between")
class InputChanges(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.norm(x)
        x = x * 2 + 1
        h = h * (1 + scale[:, None]) + shift[:, None]
        return h + x


@look_alike(NamedAgain, "the input is written to in between")
class InputIsWritten(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = x * 1
        h = self.norm(x)
        x.data.mul_(2)
        h = h * (1 + scale[:, None]) + shift[:, None]
        return h + x


@look_alike(NamedAgain, "something is done to the normed tokens in between")
class NamedBetween(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.norm(x)
        h = h.tanh()
        h = h * (1 + scale[:, None]) + shift[:, None]
        return h + x


@look_alike(NamedAgain, "only sometimes")
class Sometimes(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.norm(x)
        if x.sum() > 1e9:
            h = h * (1 + scale[:, None]) + shift[:, None]
        return h + x


@spelling(BOTH)
class ArithmeticBetween(Layer):
    """What makes the condition stands between the norm and its modulation."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.norm(x)
        both = torch.stack([scale, shift], 1)
        a, b = both.chunk(2, dim=1)
        return (1 + a) * h + b


@spelling(BOTH)
class OfAPart(Layer):
    """Scale and shift are attributes."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        made = SimpleNamespace(scale=scale[:, None], shift=shift[:, None])
        h = self.norm(x)
        return (1 + made.scale) * h + made.shift


@look_alike(ArithmeticBetween, "the parts are exchanged")
class PartsExchanged(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.norm(x)
        both = torch.stack([scale, shift], 1)
        b, a = both.chunk(2, dim=1)
        return (1 + a) * h + b


@look_alike(OfAPart, "the parts are exchanged")
class AttributesExchanged(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        made = SimpleNamespace(scale=shift[:, None], shift=scale[:, None])
        h = self.norm(x)
        return (1 + made.scale) * h + made.shift


# -- by a function --------------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulate_by_steps(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """With a docstring."""
    shift = shift[:, None]
    scale = scale[:, None]
    x = x * (1 + scale)
    return x + shift


def modulate_unless_none(x: Any, shift: Any = None, scale: Any = None) -> Any:
    if scale is None and shift is None:
        return x
    elif shift is None:
        return x * (1 + scale.unsqueeze(1))
    elif scale is None:
        return x + shift.unsqueeze(1)
    else:
        return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulate_or_zero(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    if shift is None:
        shift = torch.zeros_like(scale)
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulate_tokens(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(0)) + shift.unsqueeze(0)


def modulate_without_one(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * scale.unsqueeze(1) + shift.unsqueeze(1)


def modulate_before(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (x + shift.unsqueeze(1)) * (1 + scale.unsqueeze(1))


def modulate_doubled(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    x = x * 2
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulate_by_itself(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    scale = x
    return x * (1 + scale) + shift.unsqueeze(1)


OFFSET = torch.ones(1)


def modulate_by_a_global(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + OFFSET) + shift.unsqueeze(1)


def modulate_or_not(x: Any, shift: Any, scale: Any) -> Any:
    if shift is not None:
        return x - shift.unsqueeze(1)
    return x * (1 + scale.unsqueeze(1))


@spelling(BOTH)
class Called(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulate(self.norm(x), shift, scale)


@look_alike(Called, "scale and shift are exchanged")
class CalledExchanged(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulate(self.norm(x), scale, shift)


@look_alike(Called, "the condition is one of tokens")
class CalledTokens(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulate_tokens(self.norm(x), shift, scale)


@look_alike(Called, "nothing is added to the scale")
class CalledWithoutOne(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulate_without_one(self.norm(x), shift, scale)


@look_alike(Called, "the shift comes first")
class CalledBefore(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulate_before(self.norm(x), shift, scale)


@look_alike(Called, "the tokens are doubled first")
class CalledDoubled(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulate_doubled(self.norm(x), shift, scale)


@look_alike(Called, "the tokens are the scale")
class CalledByItself(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulate_by_itself(self.norm(x), shift, scale)


@look_alike(Called, "the scale is no argument")
class CalledByAGlobal(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulate_by_a_global(self.norm(x), shift, scale)


@look_alike(Called, "the function modulates where there is no shift")
class CalledOrNot(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulate_or_not(self.norm(x), shift, scale)


@spelling(BOTH)
class CalledByKeywords(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.norm(x)
        h = modulate_unless_none(h, scale=scale, shift=shift)
        return h


@look_alike(CalledByKeywords, "only the shift is given")
class CalledWithShift(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.norm(x)
        h = modulate_unless_none(h, shift=shift)
        return h


@spelling(BOTH)
class CalledWithScale(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulate_unless_none(self.norm(x), scale=scale)


@look_alike(CalledWithScale, "the scale is given as the shift")
class CalledWithScaleAsShift(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulate_unless_none(self.norm(x), scale)


@spelling(BOTH)
class CalledBySteps(Weighted):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulate_by_steps(self.norm(x), shift, scale)


@look_alike(CalledBySteps, "the function is given what another layer made")
class CalledOfMore(Weighted):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulate_by_steps(self.norm(x) + x, shift, scale)


@spelling(BOTH)
class CalledOrZero(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulate_or_zero(self.norm(x), shift, scale)


@look_alike(CalledOrZero, "a function of the same name that is an argument")
class CalledLocal(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        modulate_or_zero = modulate_before
        return modulate_or_zero(self.norm(x), shift, scale)


# -- as a module ----------------------------------------------------------------------------------


@spelling(BOTH)
class NormZero(Layer):
    """A module that holds the norm and the linear layer which makes the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.silu, self.linear = nn.SiLU(), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        emb = self.linear(self.silu(scale))
        shift_msa, scale_msa, gate = emb.chunk(3, dim=1)
        x = self.norm(x) * (1 + scale_msa[:, None]) + shift_msa[:, None]
        return x * gate[:, None] + shift[:, None]


@look_alike(NormZero, "scale and shift are exchanged")
class NormZeroExchanged(NormZero):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        emb = self.linear(self.silu(scale))
        scale_msa, shift_msa, gate = emb.chunk(3, dim=1)
        x = self.norm(x) * (1 + scale_msa[:, None]) + shift_msa[:, None]
        return x * gate[:, None] + shift[:, None]


@spelling(BOTH)
class NormContinuous(Weighted):
    """The same with an order of its own, and a norm with weight."""

    def __init__(self) -> None:
        super().__init__()
        self.silu, self.linear = nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        emb = self.linear(self.silu(scale).to(x.dtype))
        scale, shift = torch.chunk(emb, 2, dim=1)
        x = self.norm(x) * (1 + scale)[:, None, :] + shift[:, None, :]
        return x


@look_alike(NormContinuous, "the norm is that of the condition")
class NormOfCondition(NormContinuous):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        emb = self.linear(self.silu(scale).to(x.dtype))
        scale, shift = torch.chunk(emb, 2, dim=1)
        return x * (1 + self.norm(scale))[:, None, :] + shift[:, None, :]


@spelling(BOTH)
class AfterASum(Layer):
    """The sum before the norm goes on."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = x + shift[:, None]
        h = self.norm(x)
        h = h * (1 + scale[:, None]) + shift[:, None]
        return x + h


@look_alike(AfterASum, "the sum is read before the norm")
class OfTheSumBefore(Layer):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = x + shift[:, None]
        h = self.norm(x)
        h = h * (1 + scale[:, None]) + shift[:, None]
        return y + h
