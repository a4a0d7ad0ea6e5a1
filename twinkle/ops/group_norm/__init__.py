"""GroupNorm and SiLU: ``silu((x - mean) / sqrt(var + eps) · w + b)``, the statistics of groups of channels.

Formula: Wu and He, "Group Normalization", 2018. Statistics and arithmetic in float32; the normed value is
rounded before the activation, as torch rounds it; gradients are rounded once.
"""

from twinkle.ops.catalog import Op

OP = Op(
    "group_norm",
    kind="inside",
    summary="inside a layer: a GroupNorm and the SiLU that is its next step",
    rank=10,
    functions={"group_norm": "triton_backend"},
    backends=("triton_backend",),
)
