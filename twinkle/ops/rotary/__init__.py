"""Rotary position embedding: ``y = x · cos + rotate(x) · sin``.

Formula: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021; the variants differ
in which channels make a pair, in the layout of the tables, and in where they round. A pair may be a complex
number times another one, or a vector times a matrix. Triton's kernel equals the definition bit for bit,
gradients too; a complex product is fused as compilers for GPUs fuse it.
"""

from twinkle.ops.catalog import Op

OP = Op(
    "rotary",
    kind="function",
    summary="`apply_rotary_pos_emb` and its relatives",
    rank=4,
    words=(
        "cat",
        "clone",
        "concat",
        "concatenate",
        "empty_like",
        "roll",
        "stack",
        "type_as",
        "view_as_real",
        "zeros_like",
    ),
    aliases=("rope",),
    roles={
        "q": "input",
        "k": "input",
        "v": "input",
        "cos": "table",
        "sin": "table",
        "rotary_dim": "size",
        "scale": "table",
        "position_ids": "input",
        "mrope_section": "input",
        "unsqueeze_dim": "number",
    },
    functions={"ApplyRotaryPosEmb": "layer", "apply_rotary_pos_emb": "layer"},
    backends=("triton_backend", "cpu_backend"),
)
