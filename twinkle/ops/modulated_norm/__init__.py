"""Adaptive norm: ``norm(x) · (1 + scale) + shift`` with scale and shift from a condition, in one pass.

As in DiT (Peebles and Xie, "Scalable Diffusion Models with Transformers", 2022): scale and shift are those of
a sample, or of a token. Each intermediate result is rounded where torch's operators round it; gradients are
computed in float32 and rounded once.
"""

from twinkle.ops.catalog import Op

OP = Op(
    "modulated_norm",
    kind="inside",
    summary="inside a layer: a norm, then scale and shift from a condition",
    rank=11,
    words=("*", "mul"),
    functions={"modulated_norm": "triton_backend"},
    backends=("triton_backend",),
)
