"""What a rewritten forward calls at its places: a fused kernel where it fits, else the original steps.

Whether it fits is asked at every call, since a program may hook, replace or wrap a layer at any time. What
the kernel computes is compared with the layers' own code at its first call, on the inputs of that call: the
forward around it may not run twice (it may write to a cache of keys and values, or draw random numbers).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from twinkle.fuse.norms import hooked, norm_of, numbers_of, unswapped
from twinkle.fuse.rotations import plain_rotation
from twinkle.match.symbolic.source import function_of_callable
from twinkle.ops.cuda_graphs import is_capturing
from twinkle.ops.failures import is_failure
from twinkle.ops.plain import FORCED, at_measured_size, pays
from twinkle.proof import first_use
from twinkle.proof.room import comparing
from twinkle.proof.speed import ORIGINAL, Speed, size_of, speed_at_call
from twinkle.runtime import runtime
from twinkle.swap.candidate import explain
from twinkle.swap.dtype_keys import ANY
from twinkle.swap.front import MARK
from twinkle.swap.layers import candidates_of, original_class
from twinkle.swap.ways import measures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from twinkle.proof.compare import Verdict
    from twinkle.records import Binding
    from twinkle.sources.embedded import EmbeddedLayer
    from twinkle.swap.candidate import Candidate

__all__ = [
    "SLOWER",
    "Comparison",
    "FusedStep",
    "at_any_size",
    "check_norm",
    "layer_copies",
    "reason_against",
    "size_key",
    "tensor_text",
]

_recording = torch.is_grad_enabled
SLOWER: Any = object()
"""What :attr:`FusedStep.proven` has for a size at which the original steps are the faster ones."""


class Comparison(NamedTuple):
    """A fused kernel and the steps it replaces, to be compared on tensors.

    Attributes:
        subject: What the verdict is about.
        original: The original steps, as a function of ``layers`` and ``tensors``.
        kernel: The kernel, as a function of the same, with what each call of the place asks of its norm.
        tensors: The inputs.
        layers: Copies of the layers, as :func:`layer_copies` makes them.
        least: Elements of the first input from which the kernel runs where nothing is measured.
    """

    subject: EmbeddedLayer
    original: Callable[..., Any]
    kernel: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    layers: nn.Module
    least: int = 0


def check_norm(norm: Any, layer: nn.Module) -> None:
    """Ask of a norm's layer what each call of a place asks before its kernel runs.

    Args:
        norm: What the class of the layer computes, with the guard of that.
        layer: The layer.

    Raises:
        TypeError: It computes something else now, or has hooks.
    """
    if not norm.guard.holds(layer) or hooked(layer):
        raise TypeError("its norm is another")


def size_key(tensor: Tensor) -> int:
    """The number of a call's size, by the first tensor, under which what was decided for it is kept.

    Negative in calls that are about to be recorded, for which the host's time does not count.
    """
    return -size_of(tensor) if FORCED else size_of(tensor)


def at_any_size(path_for: Callable[..., Any]) -> Callable[..., Any]:
    """Make the function that chooses a kernel's path pass over its least size where speeds are measured."""
    anyway = at_measured_size(path_for)[0]

    def path(*args: Any) -> Any:
        return (anyway if runtime.options.sizes == "auto" else path_for)(*args)

    return path


class FusedStep:
    """One place of a rewritten forward, and the kernels that were proven there.

    Args:
        source: What the forward comes from; its candidate tells the report.
        proofs: How many calls are compared with the original steps before the kernel runs alone.
        recall: A verdict from an earlier process will do.

    Attributes:
        op: The op of the place.
        proven: What the kernel needs to run, by the classes and dtypes it was proven for, and the size that
            it was measured at; for calls that record no gradients.
        proven_with_grad: The same for calls that do.
    """

    op: ClassVar[str]

    def __init__(self, source: Any, *, proofs: int, recall: bool) -> None:
        self.source = source
        self.proofs = proofs
        self.recall = recall
        self.proven: dict[Any, Any] = {}
        self.proven_with_grad: dict[Any, Any] = {}
        self._counted: dict[Any, int] = {}

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """What the forward calls at the place, in the order :meth:`Draft.build` takes them."""
        raise NotImplementedError

    def may_pay(self, tensor: Tensor, least: int) -> bool:
        """Whether a tensor has ``least`` elements, or the kernel's speed is measured at every size."""
        return pays(tensor, least) or (
            self.proofs > 0 and runtime.options.sizes == "auto" and tensor.numel() > 0
        )

    def candidate(self, owner: nn.Module) -> Candidate | None:
        """The candidate that put the rewritten forward into a layer; None once it is rejected."""
        for candidate in candidates_of(owner):
            if candidate.kernel.source is self.source and candidate.rejected is None:
                return candidate
        return None

    def compare_and_run(
        self,
        owner: nn.Module,
        key: Any,
        needs: Any,
        kernel: Callable[[], Any],
        comparison: Callable[[bool], Comparison],
    ) -> Any:
        """Run a kernel that is not proven yet, after a comparison.

        Args:
            owner: The layer whose forward it is.
            key: What the kernel depends on; the last of it is the size of the call (:func:`size_key`).
            needs: Kept under ``key`` in :attr:`proven` once it is.
            kernel: The call.
            comparison: Makes what is compared, or measured of the whole call where its argument says so;
                called if that is due.

        Returns:
            The kernel's result, or None when the original steps are to run.
        """
        candidate = self.candidate(owner)
        if candidate is None or is_capturing() or comparing() or candidate.proofs.given_up(ANY):
            return None
        grad = _recording()
        if self._passed(key, grad) < self.proofs:
            verdict = self._verdict(comparison(False), grad)
            candidate.record_verdict(verdict, grad=grad)
            if not verdict.ok and not (verdict.pending and self._passed(key, grad)):
                return None
        if self._passed(key, grad) + 1 >= self.proofs and self._is_slower(candidate, comparison, grad):
            self._count(key, SLOWER, grad)
            return None
        try:
            result = kernel()
        except Exception as error:
            if candidate.strict or not is_failure(error):
                raise
            failure = error
        else:
            self._count(key, needs, grad)
            return result
        candidate.reject("quarantined", f"raised at its first call: {explain(failure)}")
        return None

    def _verdict(self, compared: Comparison, grad: bool) -> Verdict:
        return first_use.prove(
            compared.subject,
            compared.original,
            compared.kernel,
            compared.tensors,
            {},
            module=compared.layers,
            plain_class=nn.Module,
            backward=grad,
            recall=self.recall,
        )

    def _is_slower(self, candidate: Candidate, comparison: Callable[[bool], Comparison], grad: bool) -> bool:
        """Whether the original steps are faster at the size of a call, as far as that can be measured."""
        if not self.proofs or runtime.options.sizes != "auto" or FORCED:
            return False  # FORCED: such a call is about to be recorded, and issued no more
        compared = comparison(True)
        if not measures(compared.subject):
            return not pays(compared.tensors[0], compared.least)
        kernel = at_measured_size(compared.kernel)[0]
        subject = first_use.Subject(
            compared.subject, compared.original, kernel, nn.Module, recall=self.recall
        )
        speed = speed_at_call(subject, (compared.layers, *compared.tensors), {}, grad=grad)
        if not isinstance(speed, Speed):
            return not pays(compared.tensors[0], compared.least)
        candidate.record_speed(speed._replace(at=f"{self.op} {speed.at}"))
        return speed.way == ORIGINAL

    def _passed(self, key: Any, grad: bool) -> int:
        """How many comparisons the kernel passed at any size; one with gradients counts for calls without."""
        passed = self._counted.get((key[:-1], True), 0)
        return passed if grad else passed + self._counted.get((key[:-1], False), 0)

    def _count(self, key: Any, needs: Any, grad: bool) -> None:
        kind = key[:-1], grad
        self._counted[kind] = self._counted.get(kind, 0) + 1
        if self._passed(key, grad) < self.proofs:
            return
        if grad:
            self.proven_with_grad[key] = needs
        if not grad or runtime.options.sizes != "auto":  # else calls without gradients are to be measured
            self.proven[key] = needs

    def failed(self, owner: nn.Module, error: Exception) -> Callable[[], None]:
        """Excuse a proven kernel that raised: the original steps are to run, and then what this returns.

        Raises:
            Exception: ``error``, where the candidate is ``strict``, or where it is no failure.
        """
        candidate = self.candidate(owner)
        if not is_failure(error) or (candidate is not None and candidate.strict):
            raise error
        why = f"{self.op} raised: {explain(error)}"
        return partial(candidate.reject, "quarantined", why) if candidate is not None else _nothing

    def note(self, owner: nn.Module, reason: str) -> None:
        """Say in the report why the original steps ran."""
        candidate = self.candidate(owner)
        if candidate is not None:
            candidate.binding.note(f"{self.op}: {reason}")

    def note_taken_over(self, owner: nn.Module, layers: Sequence[nn.Module], function: Any = None) -> None:
        """Say in the report of pending kernels that this step computes their calls, so that they never load.

        Args:
            owner: The layer whose forward it is.
            layers: The layers that were not called.
            function: The function that was not called, if there is one.
        """
        bindings: list[Binding] = [
            candidate.binding for layer in layers for candidate in candidates_of(layer)
        ]
        plain = function_of_callable(plain_rotation(function))
        name = f"{getattr(plain, '__module__', None)}:{getattr(plain, '__qualname__', None)}"
        bindings += [
            binding
            for binding in runtime.registry.bindings
            if (binding.scope, binding.target) == ("function", name)
        ]
        for binding in bindings:
            if binding.state == "pending":
                binding.note(f"its calls in {original_class(owner).__qualname__} are computed by {self.op}")


def layer_copies(layers: Iterable[nn.Module]) -> nn.Module:
    """A module that holds the layers anew: the same parameters, the classes without Twinkle's kernels.

    Args:
        layers: Without hooks, see :func:`reason_against`.
    """
    holder = nn.Module()
    for at, layer in enumerate(layers):
        plain: Any = unswapped(type(layer))
        bare: nn.Module = plain.__new__(plain)
        bare.__dict__.update(layer.__dict__)
        bare.__dict__.pop(MARK, None)
        holder.add_module(str(at), bare)
    return holder


def reason_against(layers: Sequence[nn.Module]) -> str | None:
    """Why a fused kernel cannot compute what these norms compute, or None if it can."""
    for layer in layers:
        norm = norm_of(type(layer))
        if isinstance(norm, str):
            return norm
        if hooked(layer):
            return f"{type(layer).__name__} has hooks or a forward of its own"
        if numbers_of(norm, layer) is None:
            return f"{type(layer).__name__} has no weight or eps where its class promises them"
    return None


def tensor_text(tensor: Any) -> str:
    """The device, dtype and shape of a tensor, for a message."""
    return f"{tensor.device.type} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _nothing() -> None:
    """Nobody is to be told: the forward was taken out by another call."""
