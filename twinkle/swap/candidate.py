"""Candidates: kernels in the running for a target, loaded and checked once for all threads."""

from __future__ import annotations

import contextlib
import math
import time
import traceback
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from twinkle import forks
from twinkle.errors import KernelError, TwinkleError, warn
from twinkle.fit.layer import LayerCompatibility, check_layer
from twinkle.ops.failures import Failures
from twinkle.proof.clocks import NOT_SLOWER
from twinkle.proof.speed import ORIGINAL
from twinkle.runtime import runtime
from twinkle.swap.code import fitted
from twinkle.swap.dtype_keys import ANY, MOST_TRIES, Proofs, describe
from twinkle.swap.reentry import names_forward, reaches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from twinkle.modes import Mode
    from twinkle.proof.compare import Verdict
    from twinkle.proof.speed import Speed
    from twinkle.records import Binding, FunctionKernel, LayerKernel
    from twinkle.swap.dispatch import Dispatch
    from twinkle.swap.dtype_keys import DtypeKey
    from twinkle.swap.reentry import Own

__all__ = ["BaseCandidate", "Candidate", "FunctionCandidate", "explain"]

_UNLOADED: Any = object()


class BaseCandidate:
    """A kernel in the running for a target: one load, one verdict, one warning.

    Two candidates are the same when kernel and binding are the same objects, so that asking for a
    swap again is recognised.

    Attributes:
        kernel: The registration.
        binding: Its record in the report.
        strict: Raise what goes wrong instead of going on with the original.
        rejected: Why its originals run instead, or ``None``.
        proofs: The comparisons with the original that it has passed, and those that are pending.
        recall: A kept verdict will do in the place of a comparison.
        watch: Of so many calls one is looked at for NaN; 0 for none.
        slower: It was not faster at any size that was met, and runs at none.
    """

    def __init__(
        self,
        kernel: LayerKernel | FunctionKernel,
        binding: Binding,
        *,
        strict: bool = False,
        proofs: int = 0,
        recall: bool = False,
        watch: int = 0,
    ) -> None:
        self.proofs = Proofs(proofs)
        self.watch = watch
        self.recall = recall
        self.kernel = kernel
        self.binding = binding
        self.strict = strict
        self.rejected: str | None = None
        self.slower = False
        self.device: str | None = kernel.device
        self.mode: Mode | None = kernel.mode
        self._loaded: Any = _UNLOADED
        self._lock = forks.lock()
        self._loading = False
        self._users: weakref.WeakSet[Dispatch] = weakref.WeakSet()
        if getattr(kernel.source, "kind", None) == "embedded":
            runtime.of(Failures).listeners.add(self)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BaseCandidate) and other.kernel is self.kernel and other.binding is self.binding
        )

    def __hash__(self) -> int:
        return hash((id(self.kernel), id(self.binding)))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.binding.kernel} [{self.binding.device}/{self.binding.mode}]>"

    @property
    def loaded(self) -> bool:
        """Whether its source has given the kernel."""
        return self._loaded is not _UNLOADED

    @property
    def can_torch_compile(self) -> bool | None:
        """The flag of that name on the loaded kernel; ``None`` where it has none."""
        return _flag(self._loaded, "can_torch_compile")

    @property
    def has_backward(self) -> bool | None:
        """The flag of that name on the loaded kernel; ``None`` where it has none."""
        return _flag(self._loaded, "has_backward")

    def used_by(self, dispatch: Dispatch) -> None:
        """Remember a dispatch that has to be rebuilt when the candidate is rejected."""
        self._users.add(dispatch)
        self.binding.ran = bool(self.binding.ran)  # it sees the first call

    def load(self) -> Any:
        """Ask the source for the kernel, once; ``None`` when that failed or goes on further up the stack."""
        if self._loaded is not _UNLOADED:
            return self._loaded
        failure: BaseException
        with self._lock:
            if self._loaded is not _UNLOADED:
                return self._loaded
            if self._loading or self.rejected is not None:
                return None
            self._loading = True
            try:
                started = time.perf_counter()
                with _plain_torch():
                    loaded = self.kernel.source.load()
                self.binding.load_seconds = time.perf_counter() - started
                for note in getattr(self.kernel.source, "notes", ()):
                    self.binding.note(note)
                self._loaded = loaded
                return loaded
            except (Exception, SystemExit) as error:
                # A module that calls sys.exit() when imported must not end the program.
                failure = error
            finally:
                self._loading = False
        # Not under the lock: it rewrites the functions of others, which have locks of their own.
        self.fail(failure)
        return None

    def fail(self, error: BaseException) -> None:
        """Reject a kernel that cannot be loaded or is not compatible; raises ``error`` when ``strict``."""
        self.reject("failed", explain(error))
        if self.strict:
            raise error

    def reject(self, state: str, reason: str) -> None:
        """Take the kernel out everywhere: originals (or the next candidates) run from the next call on."""
        with self._lock:
            if self.rejected is not None:
                return
            self.rejected = reason
        self.binding.set(state, reason)
        for dispatch in list(self._users):
            dispatch.rebuild()
        if not self.strict:
            what = f"{self.binding.target} keeps its original: kernel {self.binding.kernel!r}"
            where = f"\n  where:    {self.binding.origin}" if self.binding.origin else ""
            warn(f"{what} {state}: {reason}{where}")

    def backward_failed(self, op: str, error: Exception) -> None:
        """Reject an embedded kernel whose backward raised, while the definition gives the gradients.

        Args:
            op: The op it was of.
            error: What it raised; it is raised again where the candidate is ``strict``.
        """
        ops = (getattr(self.kernel.source, "op", None), *self.kernel.name.split("+"))
        if op not in ops or self.rejected is not None:
            return
        if self.strict:
            raise error
        self.reject("quarantined", f"{op} raised in its backward: {explain(error)}")

    def mark_pending(self) -> None:
        """Record that the kernel is in place and not loaded yet."""
        if self.rejected is None and self.binding.state != "active" and not self.slower:
            where = f" on a {self.device} tensor" if self.device else ""
            self.binding.set("pending", f"in place; loads at the first forward{where}")

    def record_verdict(self, verdict: Verdict, *, grad: bool, key: DtypeKey = ANY) -> None:
        """Count a comparison that was passed, or reject the kernel; one that was not made changes nothing.

        A kernel that could not be compared in several calls, for reasons that lie in comparison or
        original, is given up for calls of the key; where it passed no comparison at all, it is rejected.

        Args:
            verdict: What the comparison gave.
            grad: The call was one with gradients.
            key: The dtype key of the call.

        Raises:
            KernelError: The kernel is rejected, and the candidate is ``strict``.
        """
        if not (verdict.pending and self.proofs.any_passed):
            self.binding.proof = str(verdict)
        if verdict.ok:
            self.proofs.record_pass(key, grad=grad)
            return
        if verdict.pending:
            if verdict.tried and self.proofs.record_failure(key) == MOST_TRIES:
                self._give_up(verdict, key)
            return
        trusted = self.binding.state == "active" and self.proofs.any_passed
        since = f" (cached, {verdict.date})" if verdict.date else ""
        self.reject(
            "quarantined" if trusted else "failed", f"does not compute the same{since}: {verdict.text}"
        )
        if self.strict:
            raise KernelError(f"kernel {self.binding.kernel!r} does not compute the same", found=verdict.text)

    def _give_up(self, verdict: Verdict, key: DtypeKey) -> None:
        reason = f"could not be compared with the original in {MOST_TRIES} calls: {verdict.text}"
        if self.proofs.any_passed:
            self.binding.note(f"{reason}; the original runs for calls in {describe(key)}")
            return
        self.reject("failed", reason)
        if self.strict:
            raise KernelError(f"kernel {self.binding.kernel!r} {reason}")

    def record_speed(self, speed: Speed) -> None:
        """Put what was measured at a size in the report, and what follows from it for the state.

        A user's own kernel runs whatever it gave.
        """
        runs = speed.way != ORIGINAL or self.kernel.chosen_by != "twinkle"
        self.binding.measured(speed.at, _told(speed, runs=runs))
        if runs:
            self.record_unmeasured()
        elif self.rejected is None and (self.slower or not self.binding.ran):
            self.slower = True
            slow = [f"{one['ratio']:.2f}x{_doubt(one)} at {at}" for at, one in self.binding.speeds.items()]
            more = f" and {len(slow) - 3} sizes more" if len(slow) > 3 else ""
            self.binding.set("skipped", f"not faster here ({', '.join(slow[:3])}{more})")

    def record_unmeasured(self) -> None:
        """Record that the kernel takes a call, whether it was measured or could not be."""
        self.slower = False
        self.mark_active()
        self.binding.has_run()

    def mark_active(self) -> None:
        """Record that the kernel is in place, loaded and compatible."""
        if self.rejected is None and self.binding.state != "active" and not self.slower:
            self.binding.set("active")


class Candidate(BaseCandidate):
    """A layer kernel bound to a target class."""

    kernel: LayerKernel

    def __init__(self, kernel: LayerKernel, binding: Binding, **options: Any) -> None:
        super().__init__(kernel, binding, **options)
        self._known: weakref.WeakKeyDictionary[type, LayerCompatibility] = weakref.WeakKeyDictionary()

    def compatibility(
        self, target_class: type[nn.Module], instances: Sequence[nn.Module] = ()
    ) -> LayerCompatibility | None:
        """The kernel for ``target_class``, loaded and checked at most once; ``None`` if not compatible.

        Raises:
            TwinkleError: It cannot be loaded or is not compatible, and the candidate is ``strict``.
        """
        if self.rejected is not None:
            return None
        known = self._known.get(target_class)
        if known is not None:
            return known
        loaded = self.load()
        if loaded is None:
            return None
        try:
            with self._lock:
                if self.rejected is None and target_class not in self._known:
                    found = check_layer(
                        loaded,
                        target_class,
                        attributes=self.kernel.attributes,
                        instances=instances,
                        guarded=getattr(self.kernel.source, "guarded", False),
                    )
                    found.comes_back = self.kernel.chosen_by == "user" and names_forward(found.forward)
                    self._known[target_class] = found
                return self._known.get(target_class)
        except Exception as error:
            self.fail(error)
            return None

    def known_compatibility(self, target_class: type[nn.Module]) -> LayerCompatibility | None:
        """The result of :meth:`compatibility`, where that was called before; loads nothing."""
        return self._known.get(target_class)


class FunctionCandidate(BaseCandidate):
    """A function kernel bound to a function.

    Attributes:
        standing: What stands under the name of the function, with its decorators.
        own: Names of the kernel's own modules that hold the original for good.
    """

    kernel: FunctionKernel
    standing: Any = None
    own: Sequence[Own] = ()
    _function: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def function(self, original: Callable[..., Any]) -> Callable[..., Any] | None:
        """The kernel as a function in the place of ``original``, loaded and checked once.

        Returns:
            ``None`` if it cannot be loaded or is not compatible.

        Raises:
            TwinkleError: The same, and the candidate is ``strict``.
        """
        if self.rejected is not None:
            return None
        if self._function is not None and self._function[0] is original:
            return self._function[1]
        loaded = self.load()
        if loaded is None:
            return None
        try:
            with self._lock:
                if self._function is None or self._function[0] is not original:
                    marked = self.kernel.chosen_by == "user" and self._comes_back(loaded, original)
                    called = self.binding.target
                    self._function = (original, fitted(loaded, original, called=called, marked=marked))
                return self._function[1]
        except Exception as error:
            self.fail(error)
            return None

    def _comes_back(self, loaded: Any, original: Callable[..., Any]) -> bool:
        """Whether the kernel calls its target by name, but for names of its own, which get the original."""
        standing = original if self.standing is None else self.standing
        others = {kernel.target.text for kernel in runtime.registry.function_kernels}
        found, self.own = reaches(loaded, original, standing, self.binding.target, others)
        for names, name in self.own:
            names[name] = standing  # It may have been imported when the kernel was in place already.
        return found


def _told(speed: Speed, *, runs: bool) -> dict[str, Any]:
    """A measurement as the report has it: ratios rounded down, times in microseconds."""
    return {
        "ratio": math.floor(speed.ratio * 100) / 100,
        "low": math.floor(speed.low * 100) / 100,
        "runs": runs,
        "original_us": [round(part * 1e6, 1) for part in speed.original],
        "kernel_us": [round(part * 1e6, 1) for part in speed.kernel],
        "date": speed.date,
    }


def _doubt(figures: Mapping[str, Any]) -> str:
    """What is said of a kernel that is left out though the middle round was one in which it is as fast."""
    return " in doubt" if figures["ratio"] >= NOT_SLOWER else ""


def _flag(thing: Any, name: str) -> bool | None:
    value = getattr(thing, name, None)
    return value if isinstance(value, bool) else None


def explain(error: BaseException) -> str:
    """An exception in one line, with the place it was raised at and what to do about it."""
    if isinstance(error, TwinkleError):
        return f"{error.reason}; {error.fix}" if error.fix else error.reason
    text = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if frames:
        reason += f" ({frames[-1].filename}:{frames[-1].lineno})"
    return reason


@contextlib.contextmanager
def _plain_torch() -> Iterator[None]:
    """Torch as at the top of a program: a kernel's constants must not become inference or fake tensors."""
    with torch.inference_mode(False), torch.enable_grad(), _disable_current_modes():
        yield
