"""The functions of the pack, as any kernel repository has them: ``package_name = "twinkle.ops"``.

``ApplyRotaryPosEmb`` is what ``twinkle.toml`` beside this file binds with ``match``: its ``for_form`` cuts
it to the form and the arguments of whatever function was recognised.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from twinkle.ops.causal_lm_loss.linear_cross_entropy import linear_cross_entropy
    from twinkle.ops.qk_norm_rotary.layer import qk_norm_rotary
    from twinkle.ops.residual_norm.layer import residual_norm
    from twinkle.ops.rotary.layer import ApplyRotaryPosEmb, apply_rotary_pos_emb

__all__ = [
    "ApplyRotaryPosEmb",
    "apply_rotary_pos_emb",
    "linear_cross_entropy",
    "qk_norm_rotary",
    "residual_norm",
]

_HOMES = {
    "ApplyRotaryPosEmb": "twinkle.ops.rotary.layer",
    "apply_rotary_pos_emb": "twinkle.ops.rotary.layer",
    "linear_cross_entropy": "twinkle.ops.causal_lm_loss.linear_cross_entropy",
    "qk_norm_rotary": "twinkle.ops.qk_norm_rotary.layer",
    "residual_norm": "twinkle.ops.residual_norm.layer",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for, as in layers.py.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
