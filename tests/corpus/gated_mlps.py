"""Spellings of gated MLPs, of the projections in front and behind them, and of their activation alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from spelling import Corpus
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CORPORA"]

WIDTH, INNER = 12, 20


def tokens(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """``x`` as ``[2, 5, 12]``."""
    return {"x": (torch.randn(2, 5, WIDTH, generator=generator) * 2).to(dtype)}


GATED = Corpus("gated_mlp", inputs=tokens)
CORPORA = (GATED,)


def swish(x):
    return x * torch.sigmoid(x)


class Separate(nn.Module):
    """Two projections in front, and one behind."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, INNER, bias=False)
        self.w2 = nn.Linear(INNER, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, INNER, bias=False)
        self.act = nn.SiLU()
        self.dropout = nn.Dropout(0.1)


class Fused(nn.Module):
    """One projection in front, and one behind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = INNER
        self.w12 = nn.Linear(WIDTH, 2 * INNER)
        self.w3 = nn.Linear(INNER, WIDTH)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.1)


class Wide(nn.Module):
    """One projection in front, and none behind."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, 2 * INNER)
        self.activation = nn.SiLU()


@GATED.spelling("separate")
class OneLine(Separate):
    """The feed-forward of Llama in many copies."""

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


@GATED.look_alike(OneLine, "the sum of both")
class Summed(Separate):
    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) + self.w3(x))


@GATED.look_alike(OneLine, "the activation of the product")
class ActivatedProduct(Separate):
    def forward(self, x):
        return self.w2(F.silu(self.w1(x) * self.w3(x)))


@GATED.spelling("separate_last_dropout")
class WithDropout(Separate):
    def forward(self, x):
        gate = self.act(self.w1(x))
        return self.dropout(self.w2(gate * self.w3(x)))


@GATED.look_alike(WithDropout, "the dropout stands before the projection, and doubles")
class WithDropoutBefore(Separate):
    def forward(self, x):
        gate = self.act(self.w1(x))
        return self.w2(self.dropout(gate * self.w3(x)) * 2)


@GATED.spelling("separate")
class WrittenOut(Separate):
    """``g * sigmoid(g)``, which rounds the sigmoid where ``silu`` rounds once."""

    def forward(self, x):
        gate = self.w1(x)
        return self.w2(gate * torch.sigmoid(gate) * self.w3(x))


@GATED.look_alike(WrittenOut, "grouped the other way")
class GroupedOtherwise(Separate):
    def forward(self, x):
        gate = self.w1(x)
        return self.w2(gate * (torch.sigmoid(gate) * self.w3(x)))


@GATED.look_alike(WrittenOut, "the sigmoid of the other projection")
class OtherSigmoid(Separate):
    def forward(self, x):
        gate, up = self.w1(x), self.w3(x)
        return self.w2(gate * torch.sigmoid(up) * up)


@GATED.spelling("separate")
class ByHelper(Separate):
    def forward(self, x):
        hidden = swish(self.w1(x))
        hidden = hidden * self.w3(x)
        return self.w2(hidden)


@GATED.look_alike(ByHelper, "gates itself")
class GatesItself(Separate):
    def forward(self, x):
        hidden = swish(self.w1(x))
        hidden = hidden * hidden
        return self.w2(hidden)


@GATED.spelling("separate")
class Squared(Separate):
    """A squared relu as the gate's activation."""

    def forward(self, x):
        return self.w2(self.w3(x) * F.relu(self.w1(x)).square())


@GATED.look_alike(Squared, "the square of the product")
class SquareOfProduct(Separate):
    def forward(self, x):
        return self.w2((self.w3(x) * F.relu(self.w1(x))).square())


@GATED.spelling("separate")
class Bilinear(Separate):
    """ReGLU: the gate passes a relu."""

    def forward(self, x):
        return self.w2(torch.relu(self.w1(x)) * self.w3(x))


@GATED.look_alike(Bilinear, "both pass a relu")
class BothActivated(Separate):
    def forward(self, x):
        return self.w2(torch.relu(self.w1(x)) * torch.relu(self.w3(x)))


@GATED.spelling("separate")
class WithTanh(Separate):
    def forward(self, x):
        return self.w2(self.w3(x) * F.gelu(self.w1(x), approximate="tanh"))


@GATED.look_alike(WithTanh, "scaled before the projection")
class ScaledBefore(Separate):
    def forward(self, x):
        return self.w2(self.w3(x) * F.gelu(self.w1(x), approximate="tanh") * 0.5)


@GATED.spelling("optional")
class Optional(Separate):
    """As in torchtune: there may be no third projection."""

    def forward(self, x):
        h = self.act(self.w1(x))
        if self.w3 is not None:
            h = h * self.w3(x)
        h = self.w2(h)
        return h


@GATED.look_alike(Optional, "the third projection of the activated one")
class InARow(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.w3 = nn.Linear(INNER, INNER, bias=False)

    def forward(self, x):
        h = self.act(self.w1(x))
        if self.w3 is not None:
            h = h * self.w3(h)
        return self.w2(h)


@GATED.spelling("separate_dropouts_norm")
class Packed(Separate):
    """The separate form of timm: two dropouts and a place for a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.drop1, self.norm, self.drop2 = nn.Dropout(0.1), nn.Identity(), nn.Dropout(0.1)

    def forward(self, x):
        gate, x = self.w1(x), self.w3(x)
        x = self.act(gate) * x
        x = self.drop1(x)
        x = self.norm(x)
        x = self.w2(x)
        x = self.drop2(x)
        return x


@GATED.look_alike(Packed, "the gate is added")
class PackedSum(Packed):
    def forward(self, x):
        gate, x = self.w1(x), self.w3(x)
        x = self.act(gate) + x
        return self.drop2(self.w2(self.norm(self.drop1(x))))


@GATED.spelling("flag_dropouts_norm")
class GatedLast(Fused):
    """The fused form of timm: a flag says which half is the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.chunk_dim, self.gate_last = -1, True
        self.drop1, self.norm, self.drop2 = nn.Dropout(0.1), nn.LayerNorm(INNER), nn.Dropout(0.1)

    def forward(self, x):
        x = self.w12(x)
        x1, x2 = x.chunk(2, dim=self.chunk_dim)
        x = x1 * self.act(x2) if self.gate_last else self.act(x1) * x2
        x = self.drop1(x)
        x = self.norm(x)
        x = self.w3(x)
        x = self.drop2(x)
        return x


@GATED.look_alike(GatedLast, "the flag the other way round")
class GatedFirst(GatedLast):
    def forward(self, x):
        x1, x2 = self.w12(x).chunk(2, dim=self.chunk_dim)
        x = self.act(x1) * x2 if self.gate_last else x1 * self.act(x2)
        return self.drop2(self.w3(self.norm(self.drop1(x))))


@GATED.spelling("fused")
class ByChunk(Fused):
    def forward(self, x):
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.act(gate) * up)


@GATED.look_alike(ByChunk, "the other half is activated")
class OtherHalf(Fused):
    def forward(self, x):
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(gate * self.act(up))


@GATED.look_alike(ByChunk, "along the tokens, and back")
class OtherAxis(Fused):
    def forward(self, x):
        first, second = self.w12(torch.cat((x, x), 1)).chunk(2, dim=1)
        return self.w3((self.act(first) * second)[..., : self.inner])


@GATED.spelling("fused")
class BySplit(Fused):
    """DINOv2's and others: halves by ``split``."""

    def forward(self, x):
        both = self.w12(x)
        gate, up = both.split(both.shape[-1] // 2, dim=-1)
        return self.w3(F.silu(gate) * up)


@GATED.look_alike(BySplit, "split in halves of another width")
class OtherWidth(Fused):
    def forward(self, x):
        both = self.w12(x)
        gate, up = both.split((both.shape[-1] // 4, both.shape[-1] - both.shape[-1] // 4), dim=-1)
        return self.w3(F.silu(torch.cat((gate, gate), -1)) * up[..., : self.inner])


@GATED.spelling("fused")
class BySizes(Fused):
    def forward(self, x):
        gate, up = torch.split(self.w12(x), [self.inner, self.inner], dim=-1)
        return self.w3(F.gelu(gate) * up)


@GATED.look_alike(BySizes, "the gate is not activated")
class NotActivated(Fused):
    def forward(self, x):
        gate, up = torch.split(self.w12(x), [self.inner, self.inner], dim=-1)
        return self.w3(gate * up)


@GATED.spelling("fused")
class BySlices(Fused):
    def forward(self, x):
        both = self.w12(x)
        gate, up = both[..., : self.inner], both[..., self.inner :]
        return self.w3(torch.sigmoid(gate) * gate * up)


@GATED.look_alike(BySlices, "slices exchanged")
class SlicesExchanged(Fused):
    def forward(self, x):
        both = self.w12(x)
        up, gate = both[..., : self.inner], both[..., self.inner :]
        return self.w3(torch.sigmoid(gate) * gate * up)


@GATED.spelling("fused_up_first")
class ByTensorSplit(Fused):
    def forward(self, x):
        up, gate = torch.tensor_split(self.w12(x), 2, dim=-1)
        return self.w3(up * self.act(gate))


@GATED.look_alike(ByTensorSplit, "interleaved halves")
class Interleaved(Fused):
    def forward(self, x):
        both = self.w12(x)
        return self.w3(both[..., 0::2] * self.act(both[..., 1::2]))


@GATED.spelling("fused")
class ByUnflatten(Fused):
    def forward(self, x):
        gate, up = self.w12(x).unflatten(-1, (2, -1)).unbind(-2)
        return self.w3(self.act(gate) * up)


@GATED.look_alike(ByUnflatten, "pairs")
class ByPairs(Fused):
    def forward(self, x):
        gate, up = self.w12(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.w3(self.act(gate) * up)


@GATED.spelling("fused_up_first_dropout")
class DropoutBetween(Fused):
    def forward(self, x):
        x, gate = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.drop(F.gelu(gate) * x))


@GATED.look_alike(DropoutBetween, "the dropout of the gate alone, halved")
class DropoutOfGate(Fused):
    def forward(self, x):
        x, gate = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.drop(F.gelu(gate)) * (x / 2))


@GATED.spelling("fused_dropouts")
class TwoDropouts(Fused):
    def forward(self, x):
        gate, x = self.w12(x).chunk(2, dim=-1)
        x = self.drop(self.act(gate) * x)
        return self.drop(self.w3(x))


@GATED.look_alike(TwoDropouts, "a residual")
class WithResidual(Fused):
    def forward(self, x):
        gate, up = self.w12(x).chunk(2, dim=-1)
        return x + self.drop(self.w3(self.drop(self.act(gate) * up)))


@GATED.spelling("activation_up_first")
class HalvesOfInput(nn.Module):
    """lucidrains' GEGLU: no projection of its own."""

    def forward(self, x):
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)


@GATED.look_alike(HalvesOfInput, "the first half is the gate")
class FirstHalfIsGate(nn.Module):
    def forward(self, x):
        gate, x = x.chunk(2, dim=-1)
        return x * F.gelu(gate)


@GATED.look_alike(HalvesOfInput, "along another axis")
class HalvesOfTokens(nn.Module):
    def forward(self, x):
        x, gate = x[:, :4].chunk(2, dim=1)
        return x * F.gelu(gate)


@GATED.spelling("activation")
class SwiGLUOfInput(nn.Module):
    def forward(self, x):
        gate, up = torch.chunk(x, 2, -1)
        return F.silu(gate) * up


@GATED.look_alike(SwiGLUOfInput, "the sigmoid alone")
class SigmoidOfBoth(nn.Module):
    def forward(self, x):
        gate, up = torch.chunk(x, 2, -1)
        return F.silu(gate) * F.silu(up)


@GATED.spelling("fused_up_first_no_down")
class Projected(Wide):
    """diffusers' SwiGLU: what follows stands in another layer."""

    def forward(self, x):
        x = self.proj(x)
        x, gate = x.chunk(2, dim=-1)
        return x * self.activation(gate)


@GATED.look_alike(Projected, "the first half is activated")
class ProjectedGateFirst(Wide):
    def forward(self, x):
        gate, x = self.proj(x).chunk(2, dim=-1)
        return x * self.activation(gate)


@GATED.spelling("fused_up_first_factor")
class WithFactor(Wide):
    """x-transformers' GLU with its ``mult_bias``."""

    def __init__(self) -> None:
        super().__init__()
        self.mult_bias = nn.Parameter(torch.ones(INNER))

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * self.activation(gate) * self.mult_bias


@GATED.look_alike(WithFactor, "the factor is one of the gate")
class FactorOfGate(WithFactor):
    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * (self.activation(gate) * self.mult_bias)


@GATED.look_alike(WithFactor, "the factor is added")
class FactorAdded(WithFactor):
    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * self.activation(gate) + self.mult_bias
