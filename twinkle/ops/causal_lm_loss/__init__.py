"""The loss of a language model without its logits.

``cross_entropy(softcap(scale · (hidden @ weight.T + bias)), labels)``. The idea: Wijmans et al., "Cut Your
Losses in Large-Vocabulary Language Models", 2024; here in chunks of rows. Logits are rounded to the dtype of
``hidden``; all that follows, and the sum of the weight's gradient, is float32.
"""

from twinkle.ops.catalog import Op

OP = Op(
    "causal_lm_loss",
    kind="layer",
    summary="the head of a language model gives deferred logits",
    rank=7,
    words=("CrossEntropyLoss", "NLLLoss", "cross_entropy", "loss_function", "nll_loss"),
    aliases=("cross_entropy", "fused_linear_cross_entropy"),
    functions={"linear_cross_entropy": "linear_cross_entropy"},
    # One implementation, whose chunks look at the device themselves.
    backends={"triton_backend": "linear_cross_entropy", "torch_backend": "linear_cross_entropy"},
)
