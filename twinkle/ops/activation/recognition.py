"""What tells the code of an activation that is written out."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from twinkle.ops.activation.reference import ActivationVariant

__all__ = ["core", "spellings"]

_ROOT = 0.7978845608028654  # math.sqrt(2 / math.pi), to the last bit


def core(code: Any) -> bool:
    """A few operators with a ``tanh``, ``erf`` or ``sigmoid`` among them, and no layer that is called."""
    bent = not code.ops.isdisjoint(("tanh", "sigmoid", "relu", "relu2", "call"))
    several = not code.ops.isdisjoint(("mul", "pow2", "relu2"))
    return bent and several and code.size < 40 and not code.layer_calls


def spellings(variant: ActivationVariant) -> tuple[dict[str, Any], ...]:
    """Arguments of the definition that change how it is written, not its result."""
    written = ({"root": None},)
    return (*written, {"root": _ROOT}) if variant.name == "gelu_tanh_cubed" else written
