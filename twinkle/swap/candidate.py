"""Kernels on their way into a target: loaded and checked once for all threads, at first use."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from twinkle.errors import KernelError, TwinkleError, warn
from twinkle.fit.layer import LayerFit, check_function, read_layer, settle_on
from twinkle.swap.call_kind import ANY, Proofs

if TYPE_CHECKING:
    from twinkle.modes import Mode
    from twinkle.proof.compare import Verdict
    from twinkle.records import Binding, FunctionKernel, LayerKernel
    from twinkle.swap.call_kind import DtypeKey
    from twinkle.swap.dispatch import Dispatch

__all__ = ["Candidate", "FunctionCandidate", "explain"]

_UNLOADED: Any = object()


class BaseCandidate:
    """What layer and function candidates share: one load, one verdict, one warning.

    Two candidates are the same when kernel and binding are the same objects, so that asking for a
    swap again is recognised.

    Attributes:
        kernel: The registration.
        binding: Its record in the report.
        strict: Raise what goes wrong instead of going on with the original.
        rejected: Why it is out of the running, or ``None``.
        proofs: How many calls of each kind are to be compared with the original before it is trusted there.
        recall: A comparison from before will do, where one was kept.
    """

    def __init__(
        self,
        kernel: LayerKernel | FunctionKernel,
        binding: Binding,
        *,
        strict: bool = False,
        proofs: int = 0,
        recall: bool = False,
    ) -> None:
        self.proofs = Proofs(proofs)
        self.recall = recall
        self.kernel = kernel
        self.binding = binding
        self.strict = strict
        self.rejected: str | None = None
        self.device: str | None = kernel.device
        self.mode: Mode | None = kernel.mode
        self._loaded: Any = _UNLOADED
        self._lock = threading.RLock()
        self._loading = False
        self._users: weakref.WeakSet[Dispatch] = weakref.WeakSet()

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
        """Whether its source has been asked yet."""
        return self._loaded is not _UNLOADED

    @property
    def can_torch_compile(self) -> bool | None:
        """What the kernel says of itself, once loaded; ``None`` when it does not."""
        return _flag(self._loaded, "can_torch_compile")

    @property
    def has_backward(self) -> bool | None:
        """What the kernel says of itself, once loaded; ``None`` when it does not."""
        return _flag(self._loaded, "has_backward")

    def used_by(self, dispatch: Dispatch) -> None:
        """Remember who has to be told when it retires."""
        self._users.add(dispatch)

    def load(self) -> Any:
        """What the source gives, or ``None`` when it failed (or is loading further up the stack)."""
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
        """It cannot be loaded or does not fit: out of the running, raised when ``strict``."""
        self.reject("failed", explain(error))
        if self.strict:
            raise error

    def reject(self, state: str, reason: str) -> None:
        """Take it out everywhere: the originals (or the next candidate) run from the next call on."""
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

    def mark_pending(self) -> None:
        """It is in place and not loaded yet."""
        if self.rejected is None and self.binding.state != "active":
            where = f" on a {self.device} tensor" if self.device else ""
            self.binding.set("pending", f"in place; loads at the first forward{where}")

    def judged(self, verdict: Verdict, *, grad: bool, kind: DtypeKey = ANY) -> None:
        """It was compared with the original: one proof less to go, or out of the running.

        Args:
            verdict: What came out.
            grad: The call was one with gradients.
            kind: Of the call.
        """
        self.binding.proof = str(verdict)
        if verdict.ok:
            self.proofs.passed(kind, grad=grad)
            return
        trusted = self.binding.state == "active" and self.proofs.any_passed
        since = f" (cached, {verdict.date})" if verdict.date else ""
        self.reject(
            "quarantined" if trusted else "failed", f"does not compute the same{since}: {verdict.text}"
        )
        if self.strict:
            raise KernelError(f"kernel {self.binding.kernel!r} does not compute the same", found=verdict.text)

    def mark_active(self) -> None:
        """It is in place, loaded and fits."""
        if self.rejected is None and self.binding.state != "active":
            self.binding.set("active")


class Candidate(BaseCandidate):
    """A layer kernel bound to a target class."""

    kernel: LayerKernel

    def __init__(
        self,
        kernel: LayerKernel,
        binding: Binding,
        *,
        strict: bool = False,
        proofs: int = 0,
        recall: bool = False,
    ) -> None:
        super().__init__(kernel, binding, strict=strict, proofs=proofs, recall=recall)
        self._fits: weakref.WeakKeyDictionary[type, LayerFit] = weakref.WeakKeyDictionary()

    def fit(self, target_class: type[nn.Module], instances: Sequence[nn.Module] = ()) -> LayerFit | None:
        """The kernel as it fits ``target_class``, loaded and checked at most once; ``None`` if it does not.

        Raises:
            TwinkleError: It cannot be loaded or does not fit, and the candidate is ``strict``.
        """
        if self.rejected is not None:
            return None
        known = self._fits.get(target_class)
        if known is not None:
            return known
        loaded = self.load()
        if loaded is None:
            return None
        try:
            with self._lock:
                if self.rejected is None and target_class not in self._fits:
                    fit = read_layer(loaded, target_class, attributes=self.kernel.attributes)
                    if getattr(self.kernel.source, "guarded", False):
                        # The target's own code: what an instance lacks it asks for on another path.
                        fit.needs = frozenset()
                    settle_on(fit, target_class, instances)
                    self._fits[target_class] = fit
                return self._fits.get(target_class)
        except Exception as error:
            self.fail(error)
            return None

    def known_fit(self, target_class: type[nn.Module]) -> LayerFit | None:
        """The answer of :meth:`fit` if it was asked before; loads nothing."""
        return self._fits.get(target_class)


class FunctionCandidate(BaseCandidate):
    """A function kernel bound to a function."""

    kernel: FunctionKernel

    def __init__(
        self,
        kernel: FunctionKernel,
        binding: Binding,
        *,
        strict: bool = False,
        proofs: int = 0,
        recall: bool = False,
    ) -> None:
        super().__init__(kernel, binding, strict=strict, proofs=proofs, recall=recall)
        self._function: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def function(self, original: Callable[..., Any]) -> Callable[..., Any] | None:
        """The kernel as a function in the place of ``original``, loaded and checked once; ``None`` if unfit.

        Raises:
            TwinkleError: It cannot be loaded or does not fit, and the candidate is ``strict``.
        """
        if self.rejected is not None:
            return None
        if self._function is not None and self._function[0] is original:
            return self._function[1]
        loaded = self.load()
        if loaded is None:
            return None
        from twinkle.swap.functions import adapt

        try:
            with self._lock:
                if self._function is None or self._function[0] is not original:
                    check_function(loaded, original, called=self.binding.target)
                    self._function = (original, adapt(loaded, original))
                return self._function[1]
        except Exception as error:
            self.fail(error)
            return None


def _flag(thing: Any, name: str) -> bool | None:
    value = getattr(thing, name, None)
    return value if isinstance(value, bool) else None


def explain(error: BaseException) -> str:
    """An exception in one line, with the place it came from and what to do about it."""
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
    """Import a kernel as at the top of a program: its constants must not become inference or fake tensors."""
    from torch.utils._python_dispatch import _disable_current_modes

    with torch.inference_mode(False), torch.enable_grad(), _disable_current_modes():
        yield
