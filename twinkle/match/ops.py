"""The ops that code is recognised as.

Standard library only: this module is imported at interpreter start when a configuration names an op.
"""

from __future__ import annotations

__all__ = ["LAYER_OPS", "OPS"]

# What a whole layer can be: these may stand behind `match =`.
LAYER_OPS = (
    "rms_norm",
    "layer_norm",
    "gated_mlp",
    "causal_lm_loss",
    "experts",
)
OPS = (*LAYER_OPS, "rotary", "residual_norm", "qk_norm_rotary")
