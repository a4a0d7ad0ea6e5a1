"""Adaptive norms inside the forward of a user's own module, and of diffusion transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from rounding import assert_near
from torch import nn

from twinkle.apply.layers import kernelize_layers
from twinkle.fuse import modulated_norm
from twinkle.ops.modulated_norm import triton_backend

if TYPE_CHECKING:
    from twinkle.registry import Registry

D = 8


@pytest.fixture
def at_any_size(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device, with a kernel for small inputs as well."""
    monkeypatch.setattr(triton_backend, "LEAST", 0)
    monkeypatch.setattr(modulated_norm, "LEAST", 0)
    return device


def states(registry: Registry) -> dict[str, tuple[str, str]]:
    return {b.kernel: (b.state, b.proof.partition(":")[0]) for b in registry.bindings}


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulate_some(x: Any, shift: Any = None, scale: Any = None) -> Any:
    if scale is None and shift is None:
        return x
    elif shift is None:
        return x * (1 + scale.unsqueeze(1))
    elif scale is None:
        return x + shift.unsqueeze(1)
    else:
        return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class WideLayerNorm(nn.LayerNorm):
    """As Wan writes it: in float32, and back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).type_as(x)


class Float32LayerNorm(nn.LayerNorm):
    """As diffusers writes it."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        origin_dtype = inputs.dtype
        return nn.functional.layer_norm(
            inputs.float(),
            self.normalized_shape,
            self.weight.float() if self.weight is not None else None,
            self.bias.float() if self.bias is not None else None,
            self.eps,
        ).to(origin_dtype)


class Block(nn.Module):
    """What the blocks below share: two norms and three projections, one for six conditions."""

    def __init__(self, norm: Any = nn.LayerNorm, **options: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(D, **options), norm(D, **options)
        self.mix, self.grow, self.make = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 6 * D)


class DiT(Block):
    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.make(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.mix(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.grow(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class Flux(Block):
    """A name for the normed tokens, which is given again; a sum before the second norm."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.make(c).chunk(6, dim=1)
        normed = self.norm1(x) * (1 + scale_msa[:, None]) + shift_msa[:, None]
        x = x + gate_msa.unsqueeze(1) * self.mix(normed)
        normed = self.norm2(x)
        normed = normed * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        return x + gate_mlp.unsqueeze(1) * self.grow(normed)


class Flux2(Block):
    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, *other = self.make(c)[:, None, :].chunk(6, dim=-1)
        h = self.norm1(x)
        h = (1 + scale) * h + shift
        x = x + gate * self.mix(h)
        return x + other[0] * self.grow((1.0 + other[2]) * self.norm2(x) + other[1])


class Wan(Block):
    """Float32 inside, and the sum that arrives at the second norm is of the dtype of the tokens."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        e = self.make(c).float().unflatten(1, (6, -1)).chunk(6, dim=1)
        h = (self.norm1(x.float()) * (1 + e[1]) + e[0]).type_as(x)
        x = (x.float() + self.mix(h) * e[2]).type_as(x)
        h = (self.norm2(x.float()) * (1 + e[4]) + e[3]).type_as(x)
        return (x.float() + self.grow(h).float() * e[5]).type_as(x)


class WanTokens(Block):
    """A condition of each token, and a norm that casts by itself."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        e = (self.make(x) + self.make(c)[:, None]).float().unflatten(2, (6, -1)).chunk(6, dim=2)
        y = self.mix((self.norm1(x).float() * (1 + e[1].squeeze(2)) + e[0].squeeze(2)).type_as(x))
        x = (x + y * e[2].squeeze(2)).type_as(x)
        return self.grow((self.norm2(x).float() * (1 + e[4].squeeze(2)) + e[3].squeeze(2)).type_as(x))


class Hunyuan(Block):
    """Keywords, and a function whose arguments may be None."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        a, b, *_ = self.make(c).chunk(6, dim=1)
        h = self.norm1(x)
        h = modulate_some(h, shift=a, scale=b)
        return x + self.grow(modulate_some(self.norm2(x + self.mix(h)), scale=b))


class Lumina(Block):
    """No shift."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        a, b, *_ = self.make(c).chunk(6, dim=1)
        x = x + self.mix(self.norm1(x) * (1 + a.unsqueeze(1)))
        return x + self.grow((b[:, None] + 1) * self.norm2(x))


class Continuous(Block):
    """As the last layer of diffusers' models; what stands between two steps is arithmetic."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        scale, shift, *_ = torch.chunk(self.make(c), 6, dim=1)
        e = self.make(c)[:, None]
        x = self.norm1(x) * (1 + scale)[:, None, :] + shift[:, None, :]
        h = self.norm2(x)
        values = e + e
        a, b, *_ = values.chunk(6, dim=-1)
        h = h * (1 + a) + b
        return self.grow(h)


BARE = {"elementwise_affine": False, "eps": 1e-6}
BLOCKS: list[tuple[type[Block], dict[str, Any]]] = [
    (DiT, BARE),
    (DiT, {}),
    (DiT, {"norm": RMSNorm}),
    (Flux, BARE),
    (Flux, {"bias": False}),
    (Flux2, BARE),
    (Flux2, {"norm": RMSNorm}),
    (Wan, {"norm": Float32LayerNorm, **BARE}),
    (Wan, {"norm": Float32LayerNorm}),
    (Wan, BARE),
    (WanTokens, {"norm": WideLayerNorm, **BARE}),
    (WanTokens, {"norm": Float32LayerNorm}),
    (Hunyuan, BARE),
    (Lumina, {"norm": RMSNorm}),
    (Lumina, BARE),
    (Continuous, BARE),
    (Continuous, {}),
]
each = pytest.mark.parametrize(
    ("cls", "options"), BLOCKS, ids=[f"{c.__name__}-{'-'.join(map(str, o))}" for c, o in BLOCKS]
)


def made(
    cls: type[Block], options: dict[str, Any], device: torch.device
) -> tuple[Block, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return cls(**options).to(device), torch.randn(2, 5, D, device=device), torch.randn(2, D, device=device)


def step(module: nn.Module, x: torch.Tensor, c: torch.Tensor) -> list[torch.Tensor]:
    x, c = (t.clone().requires_grad_() for t in (x, c))
    y = module(x, c)
    wanted = [x, c, *module.parameters()]
    found = torch.autograd.grad(y.float().sin().sum(), wanted, allow_unused=True)
    return [y, *(g for g in found if g is not None)]


@each
def test_outputs_and_gradients_are_those_of_the_original(
    at_any_size: torch.device,
    counted: dict[str, int],
    clean_registry: Registry,
    cls: type[Block],
    options: dict[str, Any],
) -> None:
    module, x, c = made(cls, options, at_any_size)
    expected = step(module, x, c)
    kernelize_layers(module)
    found = step(module, x, c)
    assert states(clean_registry) == {"modulated_norm": ("active", "proven")}
    before = counted["modulated_norm"]
    again = step(module, x, c)
    assert counted["modulated_norm"] == before + 2
    for ours, once_more, theirs in zip(found, again, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert_near(ours, theirs, 400)
        assert torch.equal(ours, once_more)
