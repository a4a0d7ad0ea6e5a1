"""The loss without logits is compared with the loss with them before it is first used for a head.

A head is verified once for its shape, device and dtype, and again for calls that record gradients. Where
logits are soft-capped (``softcap * tanh(logits / softcap)``) between head and loss, by the model or by the
program around it, another branch of the kernel computes the loss, so that is verified separately, when the
first such loss is asked for. Where the comparison fails the logits are computed.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch

from twinkle.deferred import proof
from twinkle.ops.failures import is_failure
from twinkle.runtime import runtime
from twinkle.swap.candidate import explain
from twinkle.swap.dtype_keys import ANY
from twinkle.swap.layers import candidates_of
from twinkle.swap.tensors import constant

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor, nn

    from twinkle.swap.candidate import Candidate

__all__ = ["HeadType", "Verifications", "biased_verified", "loss_failed", "loss_verified", "softcap_verified"]


class HeadType(NamedTuple):
    """The dtype, device and shape of a head: one comparison holds for all heads of a type.

    Attributes:
        dtype: What their logits are computed in.
        device: Where.
        shape: ``[vocab, hidden]``.
        has_bias: Whether they have a bias.
    """

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    has_bias: bool

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> HeadType:
        """The type of a head with these parameters, in a call now."""
        device = weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        return cls(dtype, device, weight.shape, bias is not None)


class Verifications:
    """The comparisons of the loss that were made in this process.

    Attributes:
        outcomes: Whether the loss was right, by type of head, whether logits were soft-capped, and whether
            gradients were compared.
        reporters: The candidate whose record gets the verdicts for a type of head.
    """

    def __init__(self) -> None:
        self.outcomes: dict[tuple[HeadType, bool, bool], bool] = {}
        self.reporters: dict[HeadType, weakref.ref[Candidate]] = {}

    def known(self, head: HeadType, *, softcapped: bool) -> bool | None:
        """The outcome of the comparison that a call now depends on, or None before there is one."""
        with_grad = self.outcomes.get((head, softcapped, True))
        if with_grad or torch.is_grad_enabled():
            return with_grad
        return self.outcomes.get((head, softcapped, False))

    def reporter(self, head: HeadType) -> Candidate | None:
        """The candidate whose record gets the verdicts, while there is one."""
        ref = self.reporters.get(head)
        return None if ref is None else ref()

    def verify(
        self,
        head: HeadType,
        candidate: Candidate,
        weight: Tensor,
        bias: Tensor | None,
        tokens: int,
        *,
        softcapped: bool,
    ) -> bool:
        """Whether the loss is known to be right for a type of head; compared at the first question.

        Where no comparison can be made now the answer is no, and the next question asks again.

        Args:
            head: The type.
            candidate: Its record gets the verdict.
            weight: ``[vocab, hidden]``.
            bias: ``[vocab]`` or None.
            tokens: Of the call at hand.
            softcapped: Whether the logits are.

        Raises:
            KernelError: It is not right, and the settings are strict.
        """
        known = self.known(head, softcapped=softcapped)
        if known is not None:
            return known
        grad = torch.is_grad_enabled()
        ok = True
        if runtime.options.proofs(candidate.kernel.verify, bound_by_name=False):
            verdict = proof.prove_loss(
                weight,
                bias,
                tokens=tokens,
                backward=grad,
                dtype=head.dtype,
                softcapped=softcapped,
                recall=runtime.options.recalls(candidate.kernel.verify),
                traced=torch.compiler.is_compiling(),
            )
            candidate.record_verdict(verdict, grad=grad)
            ok = verdict.ok
            if verdict.pending and not candidate.proofs.given_up(ANY):
                return False
        self.outcomes[head, softcapped, grad] = ok
        return ok


def loss_verified(model: nn.Module, head: Any, tokens: int, *, softcapped: bool = False) -> bool:
    """Whether the loss of a model may be computed from its hidden states; compared once a type of head.

    Args:
        model: With the forward that defers; its record gets the verdict.
        head: An ``nn.Linear``.
        tokens: Of the call at hand, as far as is known.
        softcapped: The model soft-caps its logits, so that branch is verified as well.

    Raises:
        KernelError: It is not right, and the settings are strict.
    """
    verifications = runtime.of(Verifications)
    head_type = HeadType.of(head.weight, head.bias)
    branches = [False, True] if softcapped else [False]
    known = [verifications.known(head_type, softcapped=branch) for branch in branches]
    if None not in known:
        return all(known)
    candidate = next((c for c in candidates_of(model) if c.kernel.name == "causal_lm_loss"), None)
    if candidate is None:
        return True
    verifications.reporters[head_type] = weakref.ref(candidate)
    return all(
        verifications.verify(head_type, candidate, head.weight, head.bias, tokens, softcapped=branch)
        for branch in branches
    )


def loss_failed(head: HeadType, error: Exception) -> None:
    """Take the loss out, which raised after it was compared; the logits are to be computed.

    Args:
        head: The type of the head.
        error: What the loss raised.

    Raises:
        Exception: ``error``, where the settings are strict, or where it is no failure of the loss.
    """
    candidate = runtime.of(Verifications).reporter(head)
    if candidate is None or candidate.strict or not is_failure(error):
        raise error
    candidate.reject("quarantined", f"raised: {explain(error)}")


def biased_verified(weight: Tensor, bias: Tensor | None, tokens: int) -> bool:
    """Whether the loss of logits that a bias was added to may be computed without them.

    Inside a graph nothing can be compared: there logits with such a bias are computed.

    Args:
        weight: ``[vocab, hidden]`` of a head for which :func:`loss_verified` is true.
        bias: Its own, ``[vocab]`` or None: with one the branch of the kernel is known to be right.
        tokens: Of the call at hand.
    """
    if bias is not None:
        return True
    if torch.compiler.is_compiling():
        return False
    verifications = runtime.of(Verifications)
    head_type = HeadType.of(weight, None)
    candidate = verifications.reporter(head_type)
    if candidate is None:
        return True
    biased = head_type._replace(has_bias=True)
    made = torch.linspace(-1, 1, weight.shape[0], device=weight.device).to(weight.dtype)
    return verifications.verify(biased, candidate, weight, made, tokens, softcapped=False)


def softcap_verified(weight: Tensor, bias: Tensor | None, tokens: int) -> bool:
    """Whether the loss of soft-capped logits may be computed without them.

    Inside a graph nothing can be compared: there the comparisons made before decide.

    Args:
        weight: ``[vocab, hidden]`` of a head for which :func:`loss_verified` is true.
        bias: ``[vocab]`` or None.
        tokens: Of the call at hand.
    """
    if torch.compiler.is_compiling():
        return _every_softcap_verified()
    verifications = runtime.of(Verifications)
    head_type = HeadType.of(weight, bias)
    candidate = verifications.reporter(head_type)
    if candidate is None:
        return True
    return verifications.verify(head_type, candidate, weight, bias, tokens, softcapped=True)


@constant
def _every_softcap_verified() -> bool:
    outcomes = runtime.of(Verifications).outcomes
    found = [ok for (_, softcapped, _), ok in outcomes.items() if softcapped]
    return bool(found) and all(found)
