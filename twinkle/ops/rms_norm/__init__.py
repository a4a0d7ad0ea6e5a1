"""RMSNorm: ``y = x / sqrt(mean(x²) + eps) · w``, in every rounding that models use.

Formula: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. The statistics are float32 wherever
the variant says so; its ``cast`` says where the result is rounded to the dtype of ``x``. Forward equals the
definition but for the order of the sum of squares; gradients are computed in float32 and rounded once.
"""

from twinkle.ops.catalog import Op

OP = Op(
    "rms_norm",
    kind="layer",
    summary="RMSNorm layers, in the rounding that their own code has",
    rank=1,
    words=("mean", "norm", "normalize", "rms_norm", "sum", "vector_norm"),
    roles={
        "x": "input",
        "gate": "input",
        "weight": "tensor",
        "eps": "number",
        "activation": "activation",
        "group_size": "number",
        "with_weight": "flag",
        "normalized_shape": "shape",
        "bias": "tensor",
        "scale": "constant",
        "width": "constant",
        "offset": "constant",
        "math_root": "spelling",
    },
    layers={"RMSNorm": "layer", "GemmaRMSNorm": "layer"},
    functions={"RMSNormFunction": "layer"},
    backends=("triton_backend", "cpu_backend"),
)
