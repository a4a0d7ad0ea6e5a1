"""What the loss of one row is, for the kernels that compute it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RowLoss"]


@dataclass(frozen=True)
class RowLoss:
    """The loss of one row: ``z = post * tanh(pre * x)`` or ``z = pre * x``, then cross entropy.

    Attributes:
        pre: Factor on the logits.
        post: Factor on the tanh; not used without one.
        tanh: Whether there is a tanh.
        ignore_index: Rows with this label have no loss and no gradient.
        label_smoothing: Share of the target that is spread over the whole vocabulary.
    """

    pre: float = 1.0
    post: float = 1.0
    tanh: bool = False
    ignore_index: int = -100
    label_smoothing: float = 0.0
