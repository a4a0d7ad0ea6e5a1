"""LayerNorm: ``y = (x - mean(x)) / sqrt(var(x) + eps) · w + b``.

Formula: Ba, Kiros and Hinton, "Layer Normalization", 2016. Statistics and arithmetic in float32, the result
rounded once to the dtype of ``x``; the variants differ in how they are written and in where they round.
"""

from twinkle.ops.catalog import Op

OP = Op(
    "layer_norm",
    kind="layer",
    summary="`torch.nn.LayerNorm`, layers that call `F.layer_norm`, and those that write it out in float32",
    rank=2,
    words=("layer_norm", "mean", "native_layer_norm", "std", "std_mean", "sum", "var", "var_mean"),
    roles={
        "x": "input",
        "weight": "tensor",
        "bias": "tensor",
        "eps": "number",
        "normalized_shape": "shape",
    },
    layers={"LayerNorm": "layer"},
    functions={"LayerNormFunction": "layer"},
    backends=("triton_backend", "torch_backend"),
)
