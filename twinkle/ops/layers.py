"""The layers of the pack, as any kernel repository has them: ``package_name = "twinkle.ops"``.

Each replaces the layers of one family as they stand: Llama's norms and MLPs, Gemma's norms, torch's own
``LayerNorm``, Mixtral's experts. Bound with ``match``, as ``twinkle.toml`` beside this file does,
``for_form`` cuts them to the form and the attribute names of whatever layer was recognised.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from twinkle.ops.experts.layer import Experts
    from twinkle.ops.gated_mlp.layer import GatedMLP
    from twinkle.ops.layer_norm.layer import LayerNorm
    from twinkle.ops.rms_norm.layer import GemmaRMSNorm, RMSNorm

__all__ = ["Experts", "GatedMLP", "GemmaRMSNorm", "LayerNorm", "RMSNorm"]

_HOMES = {
    "Experts": "twinkle.ops.experts.layer",
    "GatedMLP": "twinkle.ops.gated_mlp.layer",
    "GemmaRMSNorm": "twinkle.ops.rms_norm.layer",
    "LayerNorm": "twinkle.ops.layer_norm.layer",
    "RMSNorm": "twinkle.ops.rms_norm.layer",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: registering the kernels of an op with torch takes 15 to 40 ms.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
