"""Gated MLP: ``y = down(activation(gate(x)) · up(x))``.

Formula: Shazeer, "GLU Variants Improve Transformer", 2020. The activation and the product are one kernel; the
projections stay the layers they are. In half precision the activated gate is rounded before the product, as
the definition rounds it; gradients are rounded once, at the end.
"""

from twinkle.ops.catalog import Op

OP = Op(
    "gated_mlp",
    kind="layer",
    summary="the activation and product of a gated MLP; its projections stay the layers they are",
    rank=3,
    words=("*", "mul", "mul_", "multiply"),
    aliases=("geglu", "mlp", "swiglu"),
    roles={
        "x": "input",
        "gate": "linear",
        "up": "linear",
        "down": "linear",
        "gate_up": "linear",
        "activation": "activation",
        "dropout": "dropout",
        "norm": "norm",
        "limit": "number",
        "gate_scale": "number",
        "output_scale": "number",
        "factor": "factor",
        "last_dropout": "dropout",
        "gate_last": "flag",
        "chunk_dim": "number",
        "other": "input",
    },
    layers={"GatedMLP": "layer"},
    functions={"GatedProduct": "layer"},
    backends=("triton_backend",),
    calls=("gelu", "mul", "multiply", "relu", "sigmoid", "silu", "square", "tanh"),
)
