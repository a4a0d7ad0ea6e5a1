"""The functions that a rewritten forward calls: a fused kernel where it fits, else the original steps.

Whether it fits is asked at every call, since a program may hook, replace or wrap a layer at any time. What
the kernel computes is compared with the layers' own code at its first call, on the inputs of that call: the
forward around it may not run twice (it may write to a cache of keys and values, or draw random numbers).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from twinkle.fuse.norms import hooked, norm_of, numbers_of, unswapped
from twinkle.swap.candidate import explain
from twinkle.swap.layers import candidates_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from twinkle.swap.candidate import Candidate

__all__ = ["Step", "shown", "stand_in", "why_not"]

_recording = torch.is_grad_enabled


class Step:
    """One place of a forward and what is known of it.

    Args:
        source: What the forward comes from; its candidate tells the report.
        op: The op of the place.
        proofs: How many calls are compared with the original before the kernel is trusted.
        recall: A comparison from an earlier process will do.
    """

    def __init__(self, source: Any, op: str, *, proofs: int, recall: bool) -> None:
        self.source = source
        self.op = op
        self.proofs = proofs
        self.recall = recall
        # What may run without further questions, by whether gradients are recorded.
        self.plain: dict[Any, Any] = {}
        self.graded: dict[Any, Any] = {}
        self._counted: dict[Any, int] = {}

    def candidate(self, layer: nn.Module) -> Candidate | None:
        """The candidate that put the rewritten forward into ``layer``, while it is in the running."""
        for candidate in candidates_of(layer):
            if candidate.kernel.source is self.source and candidate.rejected is None:
                return candidate
        return None

    def first(
        self,
        layer: nn.Module,
        key: Any,
        what: Any,
        kernel: Callable[[], Any],
        proof: Callable[[], tuple[Any, ...]],
    ) -> Any:
        """Run a kernel that is not trusted yet.

        Args:
            layer: Whose forward it is.
            key: What the kernel depends on, but for the tensors.
            what: Kept under the key once it is proven.
            kernel: The call.
            proof: Gives the source that the verdict is about, the original and the kernel as functions of
                a stand-in and tensors, these, and the stand-in.

        Returns:
            The kernel's result, or None when the original steps are to run.
        """
        candidate = self.candidate(layer)
        if candidate is None or _capturing():
            return None
        graded = _recording()
        if self.proofs:
            verdict = self._verdict(proof, graded)
            candidate.record_verdict(verdict, grad=graded)
            if candidate.rejected is not None:
                return None
        try:
            result = kernel()
        except Exception as error:
            if candidate.strict or isinstance(error, MemoryError | torch.OutOfMemoryError):
                raise
            failure = error
        else:
            self._counted[key, graded] = self._counted.get((key, graded), 0) + 1
            if self._counted[key, graded] >= self.proofs:
                self.plain[key] = what
                if graded:
                    self.graded[key] = what
            return result
        candidate.reject("quarantined", f"raised at its first call: {explain(failure)}")
        return None

    def _verdict(self, proof: Callable[[], tuple[Any, ...]], graded: bool) -> Any:
        from twinkle.proof.first_use import prove

        subject, original, kernel, tensors, module = proof()
        return prove(
            subject,
            original,
            kernel,
            tensors,
            {},
            module=module,
            plain_class=nn.Module,
            backward=graded,
            recall=self.recall,
        )

    def note(self, layer: nn.Module, reason: str) -> None:
        """Say in the report why the original steps ran."""
        candidate = self.candidate(layer)
        if candidate is not None:
            candidate.binding.note(f"{self.op}: {reason}")


def stand_in(layers: Iterable[nn.Module]) -> nn.Module:
    """A module that holds copies of layers with their own parameters, without hooks and without kernels."""
    holder = nn.Module()
    for at, layer in enumerate(layers):
        plain: Any = unswapped(type(layer))
        bare: nn.Module = plain.__new__(plain)
        bare.__dict__.update(layer.__dict__)
        holder.add_module(str(at), bare)
    return holder


def why_not(layers: Sequence[nn.Module]) -> str | None:
    """Why the layers cannot be computed elsewhere, or None."""
    for layer in layers:
        found = norm_of(type(layer))
        if isinstance(found, str):
            return found
        if hooked(layer):
            return f"{type(layer).__name__} has hooks or a forward of its own"
        if numbers_of(found, layer) is None:
            return f"{type(layer).__name__} has no weight or eps where its class promises them"
    return None


def shown(tensor: Any) -> str:
    """The device, dtype and shape of a tensor, for a message."""
    return f"{tensor.device.type} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _capturing() -> bool:
    return bool(torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
