"""The gradient of a linear layer's bias: ``db = Σ_rows dy`` in two launches that read ``dy`` once.

The layer itself stays torch's matrix product with the bias in it. Sums are float32 throughout and rounded
once, to the dtype of the bias.
"""

from twinkle.ops.catalog import Op

OP = Op(
    "linear_bias",
    kind="inside",
    summary="inside what is captured: the gradient of a linear layer's bias",
    rank=12,
    words=("addmm",),
    functions={"linear": "triton_backend", "addmm": "triton_backend"},
    backends=("triton_backend",),
)
