"""The loss is proven before the first labels it is used for, on the head at hand."""

from __future__ import annotations

import torch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from torch import nn

__all__ = ["is_trusted"]

# What was proven in this process: dtype, device, shape and whether there is a bias, with gradients or not.
_proven: set[Any] = set()


def is_trusted(model: nn.Module, head: Any, labels: Any) -> bool:
    """Whether the loss of a model may be computed from its hidden states; proven once a kind of head.

    Args:
        model: With the forward that defers; its record gets the verdict.
        head: An ``nn.Linear``.
        labels: Of the call at hand.

    Raises:
        KernelError: It is not right, and the settings are strict.
    """
    weight, bias = head.weight, head.bias
    kind = (weight.dtype, weight.device, weight.shape, bias is None)
    grad = torch.is_grad_enabled()
    if (kind, True) in _proven or (kind, grad) in _proven:
        return True
    from twinkle.apply.options import options
    from twinkle.swap.layers import candidates_of

    candidate = next((c for c in candidates_of(model) if c.kernel.name == "causal_lm_loss"), None)
    if candidate is None:
        return True
    if not options.proofs(candidate.kernel.verify, kind="embedded"):
        _proven.add((kind, grad))
        return True
    from twinkle.proof.loss import prove_loss

    tokens = labels.numel() if isinstance(labels, torch.Tensor) else 0
    verdict = prove_loss(
        weight, bias, tokens=tokens, backward=grad, recall=options.recalls(candidate.kernel.verify)
    )
    candidate.judged(verdict, grad=grad)
    if candidate.dead is not None:
        return False
    _proven.add((kind, grad))
    return True
