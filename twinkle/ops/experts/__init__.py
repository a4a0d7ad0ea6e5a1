"""Mixture of experts: ``y_t = Σ_j weights[t, j] · MLP_{indices[t, j]}(x_t)``, each a gated MLP.

Formula: Shazeer et al., "Outrageously Large Neural Networks", 2017, with experts as in Mixtral (Jiang et al.,
2024). The result of each expert is rounded where the definition rounds it; their weighted sum is computed in
float32 in the order of ``indices`` and rounded once.
"""

from twinkle.ops.catalog import Op

OP = Op(
    "experts",
    kind="layer",
    summary="mixtures of experts with 3-D parameters, whatever transformers would run for them",
    rank=8,
    words=("baddbmm", "bmm", "einsum", "grouped_mm", "index_add", "index_add_", "one_hot"),
    aliases=("moe",),
    roles={
        "x": "input",
        "indices": "input",
        "weights": "input",
        "gate_up": "tensor",
        "down": "tensor",
        "gate_up_bias": "tensor",
        "down_bias": "tensor",
        "num_experts": "number",
        "activation": "activation",
        "norm": "layer",
        "limit": "number",
        "alpha": "number",
    },
    layers={"Experts": "layer"},
    backends=("triton_backend", "cpu_backend"),
)
