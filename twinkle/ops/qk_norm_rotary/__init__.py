"""Norms of queries and keys and their rotation: ``rotary(norm(q), norm(k))``, head by head, in one pass.

Norm and rotation round as their own variants say (:mod:`twinkle.ops.rms_norm`, :mod:`twinkle.ops.rotary`);
the normed value is rounded to its dtype between the two.
"""

from twinkle.ops.catalog import Op

OP = Op(
    "qk_norm_rotary",
    kind="inside",
    summary="inside an attention: the RMSNorms of queries and keys and their rotation",
    rank=6,
    words=(
        "cat",
        "clone",
        "concat",
        "concatenate",
        "empty_like",
        "roll",
        "stack",
        "view_as_real",
        "zeros_like",
    ),
    functions={"qk_norm_rotary": "triton_backend"},
    backends=("triton_backend",),
)
