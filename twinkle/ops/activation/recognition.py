"""What tells the code of an activation that is written out."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["core"]


def core(code: Any) -> bool:
    """A few operators with a ``tanh``, ``erf`` or ``sigmoid`` among them, and no layer that is called."""
    bent = not code.ops.isdisjoint(("tanh", "erf", "sigmoid", "relu"))
    return bent and "mul" in code.ops and code.size < 40 and not code.layer_calls
