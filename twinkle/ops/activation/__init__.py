"""Activations as programs write them out, as ``x · sigmoid(1.702 · x)``: one kernel in the place of up to 8.

Formulas: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; So et al., "Primer", 2021, for the
squared ReLU. Every intermediate result is rounded where torch's operators round it; gradients are computed in
float32 from the input alone and rounded once.
"""

from twinkle.ops.catalog import Op

OP = Op(
    "activation",
    kind="layer",
    summary="elementwise activations that are written out: GELU by `tanh` or `erf`, `x * sigmoid(1.702 * x)`",
    rank=9,
    words=("erf", "sigmoid", "square", "tanh"),
    roles={"x": "input"},
    layers={"Activation": "layer"},
    functions={"ActivationFunction": "layer"},
    backends=("triton_backend",),
)
