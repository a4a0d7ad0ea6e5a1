"""Sample calls of the kernels that norm and turn queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.ops.cases import Case, implementation, random, seeded
from twinkle.ops.qk_norm_rotary import reference, triton_backend
from twinkle.ops.qk_norm_rotary.reference import QKNormRotaryVariant
from twinkle.ops.rms_norm.reference import VARIANTS as NORMS
from twinkle.ops.rotary.reference import VARIANTS as ROTATIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from torch import Tensor

__all__ = ["cases", "variants"]

# Batch, tokens, heads of the queries and of the keys, channels of a head.
_SHAPES = {
    "plain": (2, 48, 4, 2, 64),
    "one row": (1, 1, 2, 1, 32),
    "ragged": (3, 7, 3, 1, 40),
    "wide": (1, 3, 16, 2, 128),
}


def variants() -> tuple[QKNormRotaryVariant, ...]:
    """Every norm with the plainest rotation, every rotation with the plainest norm, one over all heads."""
    norm, rotation = NORMS[0], ROTATIONS[0]
    pairs = [(n, rotation) for n in NORMS] + [(norm, r) for r in ROTATIONS[1:]]
    made = [QKNormRotaryVariant(f"{n.name}_{r.name}_head", n, r) for n, r in pairs]
    made.append(QKNormRotaryVariant(f"{norm.name}_{rotation.name}_all", norm, rotation, "all"))
    return tuple(variant for variant in made if triton_backend.supports(variant) is None)


def _bound(function: Callable[..., Any], variant: QKNormRotaryVariant, head_dim: int) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor, qw: Tensor | None, kw: Tensor | None, cos: Tensor, sin: Tensor) -> Any:
        # The tables carry no gradient, as in a model.
        return function(
            q, k, qw, kw, 1e-6, 1e-6, cos.detach(), sin.detach(), head_dim=head_dim, variant=variant
        )

    return call


def cases(
    variant: QKNormRotaryVariant, dtype: torch.dtype, device: torch.device, backend: str = "triton_backend"
) -> Iterator[Case]:
    """A call of each shape, on random inputs."""
    generator = seeded(device)
    bare = variant.norm.weight == "none"
    for shape, (batch, tokens, heads, kv_heads, head_dim) in _SHAPES.items():
        q = random((batch, tokens, heads * head_dim), dtype, generator)
        k = random((batch, tokens, kv_heads * head_dim), dtype, generator)
        every = variant.over == "all"
        widths = (heads * head_dim, kv_heads * head_dim) if every else (head_dim, head_dim)
        qw, kw = (None if bare else random((n,), dtype, generator).abs() + 0.5 for n in widths)
        angle = random((batch, tokens, head_dim // 2), torch.float32, generator, scale=3)
        if variant.rotary.tables != "half":
            angle = torch.cat((angle, angle), -1)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        yield Case(
            shape,
            _bound(reference.qk_norm_rotary, variant, head_dim),
            _bound(implementation("qk_norm_rotary", backend).qk_norm_rotary, variant, head_dim),
            (q, k, qw, kw, cos, sin),
        )
