"""The ops that code is recognised as, and what others call them.

Standard library only: this module is imported at interpreter start when a configuration names an op.
"""

from __future__ import annotations

from twinkle.errors import suggest

__all__ = ["FUNCTION_OPS", "LAYER_OPS", "OPS", "hint", "slip"]

# What a whole layer can be: these may stand behind `match =`.
LAYER_OPS = (
    "rms_norm",
    "layer_norm",
    "gated_mlp",
    "causal_lm_loss",
    "experts",
)
FUNCTION_OPS = ("rotary",)
OPS = (*LAYER_OPS, *FUNCTION_OPS, "residual_norm", "qk_norm_rotary")

# What others call an op, where no spelling leads to our name.
_OTHER_NAMES = {
    "cross_entropy": "causal_lm_loss",
    "fused_linear_cross_entropy": "causal_lm_loss",
    "geglu": "gated_mlp",
    "mlp": "gated_mlp",
    "moe": "experts",
    "rope": "rotary",
    "swiglu": "gated_mlp",
}


def hint(name: str) -> str | None:
    """``did you mean …`` for a name that should be an op and is none."""
    meant = _OTHER_NAMES.get(name.lower())
    return f"did you mean {meant!r}?" if meant else suggest(name[:40].lower(), OPS)


def slip(name: str) -> str | None:
    """The op that a name is one letter or two from, if it is none itself."""
    import difflib

    if name in OPS:
        return None
    near = difflib.get_close_matches(name[:40], OPS, n=1, cutoff=0.8)
    return near[0] if near else None
