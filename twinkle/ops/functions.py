"""The functions of the pack, as any kernel repository has them: ``package_name = "twinkle.ops"``."""

from __future__ import annotations

from twinkle.ops.causal_lm_loss.linear_cross_entropy import linear_cross_entropy
from twinkle.ops.qk_norm_rotary.layer import qk_norm_rotary
from twinkle.ops.residual_norm.layer import residual_norm
from twinkle.ops.rotary.layer import apply_rotary_pos_emb

__all__ = ["apply_rotary_pos_emb", "linear_cross_entropy", "qk_norm_rotary", "residual_norm"]
