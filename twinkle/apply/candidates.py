"""The candidates for layers: one for each kernel and class, so that models share what was loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from twinkle.apply.bindings import layer_binding
from twinkle.devices import absent_reason
from twinkle.modes import rank
from twinkle.runtime import runtime
from twinkle.swap.candidate import Candidate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from twinkle.records import LayerKernel

__all__ = ["can_run", "candidate_of", "ranked", "usable"]


class _Candidates:
    """The candidates of this process, by class and kernel; they go with the class."""

    def __init__(self) -> None:
        self.of: WeakKeyDictionary[type, dict[int, Candidate]] = WeakKeyDictionary()


def ranked(
    candidates: tuple[Candidate, ...], device: str, *, training: bool, compiling: bool
) -> list[Candidate]:
    """The candidates that may run now, best first."""
    order: list[tuple[int, int, int, Candidate]] = []
    for at, candidate in enumerate(candidates):
        if candidate.kernel.device not in (None, device):
            continue
        place = rank(candidate.kernel.mode, training=training, compiling=compiling)
        if place is not None:
            order.append((candidate.kernel.device is None, place, at, candidate))
    return [candidate for *_, candidate in sorted(order, key=lambda entry: entry[:3])]


def can_run(kernels: Iterable[LayerKernel]) -> bool:
    """Whether one of the kernels may run on this machine; nothing is recorded."""
    disabled = runtime.options.disabled
    return any(kernel.name not in disabled and absent_reason(kernel.device) is None for kernel in kernels)


def usable(kernel: LayerKernel, target: type) -> bool:
    """Whether a kernel may run on this machine; why not is in its record."""
    binding = layer_binding(kernel, target)
    if kernel.name in runtime.options.disabled:
        binding.set("skipped", "switched off by TWINKLE_DISABLE")
        return False
    absent = absent_reason(kernel.device)
    if absent is not None:
        binding.set("skipped", absent)
        return False
    return True


def candidate_of(kernel: LayerKernel, target: type) -> Candidate:
    """The one candidate of a kernel and a class, so that models share what was loaded."""
    candidates = runtime.of(_Candidates).of.setdefault(target, {})
    known = candidates.get(id(kernel))
    if known is None or known.kernel is not kernel:
        proofs = runtime.options.proofs(kernel.verify, bound_by_name=kernel.bound_by_name)
        known = candidates[id(kernel)] = Candidate(
            kernel,
            layer_binding(kernel, target),
            strict=runtime.options.raises,
            proofs=proofs,
            recall=runtime.options.recalls(kernel.verify),
            watch=runtime.options.watched(kernel.watch),
        )
    return known
