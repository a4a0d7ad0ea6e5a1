"""Residual and norm: ``h = residual + x`` (or ``residual + scale · x``) and ``norm(h)``, in one pass.

The sum is rounded to its dtype as the definition rounds it, the norm as its own variant says
(:mod:`twinkle.ops.rms_norm`); the gradient of the sum is rounded once, where autograd rounds the norm's part
before it adds.
"""

from twinkle.ops.catalog import Op

OP = Op(
    "residual_norm",
    kind="inside",
    summary="inside a layer: a sum and the norm that is its next step",
    rank=5,
    words=("+", "add", "add_"),
    functions={"residual_norm": "triton_backend"},
    backends=("triton_backend",),
)
