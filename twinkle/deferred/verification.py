"""The loss is proven before it is first used for a head: plainly at the labels, bent where logits were bent.

Logits may be bounded (``softcap * tanh(logits / softcap)``) between head and loss, by the model or by the
program around it. That is another branch of the kernel, so it is proven by itself, when the first such loss
is asked for. Where it is not right the logits are computed after all.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from twinkle.swap.tensors import constant

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor, nn

    from twinkle.swap.candidate import Candidate

__all__ = ["is_trusted", "may_bend"]

# What was found in this process: for a kind of head, with a softcap or not, with gradients or not.
_found: dict[Any, bool] = {}
# Who tells the report of a kind of head.
_tellers: dict[Any, weakref.ref[Candidate]] = {}


def is_trusted(model: nn.Module, head: Any, tokens: int, *, bends: bool = False) -> bool:
    """Whether the loss of a model may be computed from its hidden states; proven once a kind of head.

    Args:
        model: With the forward that defers; its record gets the verdict.
        head: An ``nn.Linear``.
        tokens: Of the call at hand, as far as is known.
        bends: The model bounds its logits, so that is to be proven as well.

    Raises:
        KernelError: It is not right, and the settings are strict.
    """
    kind = _kind(head.weight, head.bias)
    asked = [False, True] if bends else [False]
    found = [_known(kind, bent=bent) for bent in asked]
    if None not in found:
        return all(found)
    from twinkle.swap.layers import candidates_of

    candidate = next((c for c in candidates_of(model) if c.kernel.name == "causal_lm_loss"), None)
    if candidate is None:
        return True
    _tellers[kind] = weakref.ref(candidate)
    return all(_prove(kind, candidate, head.weight, head.bias, tokens, bent=bent) for bent in asked)


def may_bend(weight: Tensor, bias: Tensor | None, tokens: int) -> bool:
    """Whether a loss of bounded logits may be computed without them.

    Args:
        weight: ``[vocab, hidden]`` of a head that is trusted otherwise.
        bias: ``[vocab]`` or None.
        tokens: Of the call at hand.

    Inside a graph nothing can be compared: what was found before is all there is.
    """
    if torch.compiler.is_compiling():
        return _bends_so_far()
    kind = _kind(weight, bias)
    candidate = _tellers[kind]() if kind in _tellers else None
    return candidate is None or _prove(kind, candidate, weight, bias, tokens, bent=True)


@constant
def _bends_so_far() -> bool:
    found = [ok for (_, bent, _), ok in _found.items() if bent]
    return bool(found) and all(found)


def _kind(weight: Tensor, bias: Tensor | None) -> Any:
    device = weight.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
    return dtype, device, weight.shape, bias is None


def _known(kind: Any, *, bent: bool) -> bool | None:
    graded = _found.get((kind, bent, True))
    return graded if graded or torch.is_grad_enabled() else _found.get((kind, bent, False))


def _prove(
    kind: Any, candidate: Candidate, weight: Tensor, bias: Tensor | None, tokens: int, *, bent: bool
) -> bool:
    from twinkle.runtime import runtime

    known = _known(kind, bent=bent)
    if known is not None:
        return known
    grad = torch.is_grad_enabled()
    ok = True
    if runtime.options.proofs(candidate.kernel.verify, kind="embedded"):
        from twinkle.deferred.proof import prove_loss

        verdict = prove_loss(
            weight.to(kind[0]),
            None if bias is None else bias.to(kind[0]),
            tokens=tokens,
            backward=grad,
            bent=bent,
            recall=runtime.options.recalls(candidate.kernel.verify),
        )
        candidate.record_verdict(verdict, grad=grad)
        ok = verdict.ok
    _found[kind, bent, grad] = ok
    return ok
