"""GroupNorm and SiLU: ``silu((x - mean) / sqrt(var + eps) · w + b)``, the statistics of groups of channels.

Formula: Wu and He, "Group Normalization", 2018. Statistics and arithmetic in float32; the normed value is
rounded before the activation, as torch rounds it (and so is the sigmoid of one that is written out);
gradients are rounded once.
"""

from twinkle.ops.catalog import Op

OP = Op(
    "group_norm",
    kind="layer",
    summary="`torch.nn.GroupNorm`, layers that call `F.group_norm` and a SiLU of it, and both in a forward",
    rank=10,
    # A class that makes one may have a SiLU behind it in its forward.
    words=("GroupNorm", "group_norm", "native_group_norm"),
    roles={"x": "input", "groups": "number", "weight": "tensor", "bias": "tensor", "eps": "number"},
    layers={"GroupNorm": "layer"},
    backends=("triton_backend",),
)
