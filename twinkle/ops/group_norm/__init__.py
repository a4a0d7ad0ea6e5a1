"""GroupNorm and SiLU: ``silu((x - mean) / sqrt(var + eps) · w + b)``, the statistics of groups of channels.

Formula: Wu and He, "Group Normalization", 2018. Statistics and arithmetic in float32; the normed value is
rounded before the activation, as torch rounds it; gradients are rounded once.
"""

from twinkle.ops.catalog import Op

OP = Op(
    "group_norm",
    kind="inside",
    summary="a GroupNorm and the SiLU that is its next step, to be called by hand: nothing binds it yet",
    rank=10,
    words=("group_norm", "native_group_norm"),
    functions={"group_norm": "triton_backend"},
    backends=("triton_backend",),
)
