"""The layers of the pack, as any kernel repository has them: ``package_name = "twinkle.ops"``.

``RMSNorm`` and ``GatedMLP`` replace Llama's layers as they stand, ``LayerNorm`` torch's. Bound with
``match``, ``for_form`` cuts them to the rounding and the attribute names of whatever layer was recognised.
"""

from __future__ import annotations

from twinkle.ops.gated_mlp.layer import GatedMLP
from twinkle.ops.layer_norm.layer import LayerNorm
from twinkle.ops.rms_norm.layer import GemmaRMSNorm, RMSNorm

__all__ = ["GatedMLP", "GemmaRMSNorm", "LayerNorm", "RMSNorm"]
