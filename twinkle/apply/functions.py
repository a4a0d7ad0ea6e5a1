"""Apply function kernels: choose and load for every function, then put all of them in place."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from twinkle.apply.bindings import function_binding
from twinkle.devices import absent_reason, parse_device
from twinkle.errors import ApplyError, TwinkleError, warn
from twinkle.modes import Mode, rank
from twinkle.runtime import runtime
from twinkle.swap import aliases, holders
from twinkle.swap.candidate import FunctionCandidate, explain
from twinkle.swap.decorated import caches, redecorated, undecorated
from twinkle.swap.functions import dispatcher, function_at, put
from twinkle.swap.kinds import PLAIN, kind_of
from twinkle.swap.placed import Placed, Placements
from twinkle.swap.scope import dispatch_behind

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from types import ModuleType

    from twinkle.records import FunctionKernel
    from twinkle.swap.functions import Placement

__all__ = ["Change", "FunctionPlan", "apply", "commit", "plan", "registered_modules", "unapply"]


# What a target raises that cannot be read or replaced: a lazy module that needs another package, a frozen
# class, an immutable type, a read-only module. The others are put in place all the same.
_REFUSALS = (TwinkleError, AttributeError, ImportError, TypeError)

# How often a kernel is chosen anew because another function came to stand there.
_MOST_CHOICES = 10


class Change:
    """What one request put in place, layers and functions, and how to take it back.

    Attributes:
        applied: ``"module.function"`` of each function that runs a kernel.
    """

    def __init__(self) -> None:
        self.applied: list[str] = []
        self._steps: list[Callable[[], object]] = []

    def did(self, undo: Callable[[], object]) -> None:
        """Remember how to undo a step that was just made."""
        self._steps.append(undo)

    def undo(self) -> None:
        """Take every step back, the last first; a second call does nothing."""
        while self._steps:
            self._steps.pop()()


class _Candidates:
    """The candidates of this process, by function, device and mode."""

    def __init__(self) -> None:
        self.by_target: dict[str, tuple[FunctionKernel, Any, FunctionCandidate]] = {}


def registered_modules() -> list[str]:
    """The modules that have function kernels, in registration order."""
    kernels = (*runtime.registry.function_kernels, *runtime.embedded.function_kernels)
    return list(dict.fromkeys(kernel.target_module for kernel in kernels if kernel.target_module is not None))


def _registered(module: str) -> tuple[FunctionKernel, ...]:
    """The kernels for the functions of a module: what is offered where nothing else was registered."""
    asked_for = runtime.registry.functions_of(module)
    taken = {kernel.name for kernel in asked_for}
    return (
        *asked_for,
        *(kernel for kernel in runtime.embedded.functions_of(module) if kernel.name not in taken),
    )


def apply(
    target_module: str,
    *,
    device: object,
    mode: object,
    strict: bool,
    where: str,
    must_apply: bool = True,
    module: ModuleType | None = None,
    names: Collection[str] | None = None,
) -> Change:
    """Put the kernels registered for the functions of ``target_module`` in place.

    Args:
        target_module: The module, as registrations call it; it is imported if need be.
        device: Decide for it, once; without it and ``mode``, a dispatcher decides at each call.
        mode: Decide for it, once.
        strict: Raise on the first failure; without it, one that fails never keeps the others out.
        where: Who asks.
        must_apply: With ``strict``, raise also when there is nothing to put in place.
        module: The module where it is at hand; it need not be in ``sys.modules`` under that name.
        names: Only these functions of it.

    Raises:
        ApplyError: As ``strict`` says; everything is as it was.
    """
    plans = plan(
        target_module, device=device, mode=mode, strict=strict, where=where, module=module, names=names
    )
    if strict and must_apply and not any(one.implementation for one in plans):
        kernels = _registered(target_module)
        reasons = [f"{kernel.target}: {function_binding(kernel).reason}" for kernel in kernels]
        raise ApplyError(
            f"no function kernel of {target_module} was applied",
            where=where,
            found="; ".join(reasons) or "none is registered for that module",
        )
    change = Change()
    try:
        commit(plans, change)
    except BaseException:
        change.undo()
        raise
    return change


def plan(
    target_module: str,
    *,
    device: object,
    mode: object,
    strict: bool,
    where: str,
    module: ModuleType | None = None,
    names: Collection[str] | None = None,
) -> list[FunctionPlan]:
    """Choose and load the kernels for the functions of a module; what stands there stays.

    Args:
        target_module: As for :func:`apply`, with all that follows.
        device: A device, or None to decide at each call.
        mode: A mode, or None to decide at each call.
        strict: Raise on the first failure.
        where: Who asks.
        module: The module where it is at hand.
        names: Only these functions of it.

    Raises:
        ApplyError: ``strict``, and the module cannot be imported, or a kernel cannot be used.
    """
    wanted_mode = mode if isinstance(mode, Mode) else Mode.parse(mode, where=where)
    wanted_device = parse_device(device, where=where)
    kernels = _registered(target_module)
    plans: list[FunctionPlan] = []
    try:
        holder = module if module is not None else _import(target_module, kernels)
        for name in dict.fromkeys(kernel.name for kernel in kernels):
            if names is not None and name not in names:
                continue
            same = [kernel for kernel in kernels if kernel.name == name]
            plans.append(FunctionPlan(holder, name, same, wanted_mode, wanted_device))
            plans[-1].choose(strict=strict)
    except TwinkleError as error:
        if strict:
            raise ApplyError(
                f"function kernels of {target_module} cannot be applied",
                where=where,
                found=error.reason,
                fix=error.fix or "strict=False keeps the original",
            ) from error
    return plans


def commit(plans: Iterable[FunctionPlan], change: Change) -> None:
    """Put in place what was chosen.

    Args:
        plans: As :func:`plan` made them.
        change: Learns what was done.
    """
    for one in plans:
        one.commit(change)


def unapply(target_module: str | None = None) -> list[str]:
    """Restore the original functions of a module, or of all; returns ``"module.function"`` of each."""
    restored = []
    placements = runtime.of(Placements)
    for target in list(placements.by_target):
        module, _, name = target.partition(":")
        if target_module in (None, module):
            placements.restore(target, "unapplied")
            restored.append(f"{module}.{name}")
    return restored


def _import(name: str, kernels: tuple[FunctionKernel, ...]) -> Any:
    try:
        importlib.import_module(name)
    except Exception as error:
        failure = ApplyError(f"cannot import {name}", found=f"{type(error).__name__}: {error}")
        for kernel in kernels:
            function_binding(kernel).set("failed", failure.reason)
        raise failure from error
    return sys.modules[name]  # a lazy module may have replaced what import_module returned


class FunctionPlan:
    """The kernel that one function is to run, chosen and not in place yet.

    Attributes:
        target: ``module:function``.
        standing: What stands there without Twinkle, with its decorators.
        implementation: What is to stand there, below these decorators; None leaves the original.
        chosen: The kernels behind it.
    """

    def __init__(
        self,
        module: Any,
        name: str,
        kernels: list[FunctionKernel],
        mode: Mode | None,
        device: str | None,
    ) -> None:
        self.module = module
        self.name = name
        self.target = kernels[0].target.text
        self.kernels = kernels
        self.mode = mode
        self.device = device
        self.standing: Any = None
        self.implementation: Callable[..., Any] | None = None
        self.chosen: list[FunctionCandidate] = []
        self._strict = False

    def choose(self, *, strict: bool) -> None:
        """Load what may run in the mode and on the device asked for, and keep the best of it.

        Raises:
            TwinkleError: ``strict``, and a kernel cannot be loaded or does not fit.
        """
        self._strict = strict
        self.implementation, self.chosen = None, []
        try:
            self.standing = self._stands()
            original = undecorated(self.standing, self.target)
        except _REFUSALS as error:
            self._fail(error)
            return
        absent = absent_reason(self.device)
        usable: list[FunctionCandidate] = []
        for kernel in self.kernels:
            binding = function_binding(kernel)
            reason = absent or self._reason_against(kernel)
            if reason is None:
                usable.append(_candidate(kernel, original, self.standing))
            elif binding.state not in ("active", "failed", "quarantined"):
                binding.set("skipped", reason)
        if self.mode is None and self.device is None:
            self._dispatch(original, usable, strict=strict)
        else:
            self._decide(original, usable, strict=strict)

    def _stands(self) -> Any:
        """What stands in the place without Twinkle; raises one of ``_REFUSALS``."""
        placements = runtime.of(Placements)
        with placements.lock:
            placed = placements.by_target.get(self.target)
            if placed is not None and not self._has_gone(placed):
                return placed.placement.original
            # The module was reloaded, or someone replaced ours: theirs is the original now.
            return function_at(self.module, self.name)

    def commit(self, change: Change) -> None:
        """Put the kernel in place, or the original back where there is none.

        Raises:
            TwinkleError: ``strict``, and it cannot be put there.
        """
        lock = runtime.of(Placements).lock
        for _ in range(_MOST_CHOICES):
            with lock:
                try:
                    same = self.implementation is None or self._stands() is self.standing
                except _REFUSALS as error:
                    self._fail(error)
                    return
                if same:
                    self._commit(change)
                    return
            # Another thread, or code that the loading of a kernel ran, put something else there meanwhile.
            self.choose(strict=self._strict)
        self._fail(ApplyError(f"what stands at {self.target} changes again and again"))

    def _commit(self, change: Change) -> None:
        placements = runtime.of(Placements)
        placed = placements.by_target.get(self.target)
        former = None
        if placed is not None and self._has_gone(placed):
            former = placements.let_go(self.target)
        elif placed is not None:
            if placed.same(self.implementation, self.chosen):
                change.applied.append(self.target.replace(":", ".", 1))
                return
            placements.restore(self.target, "another mode or device was applied")
        if self.implementation is not None:
            try:
                self._put(self.implementation, former)
            except _REFUSALS as error:
                self._fail(error)
                return
            change.did(partial(placements.restore, self.target, "taken back"))
            change.applied.append(self.target.replace(":", ".", 1))

    def _has_gone(self, placed: Placed) -> bool:
        """Whether what was put there stands in this module no more, or in another one of its name."""
        owner = self.module
        for step in self.name.split(".")[:-1]:
            owner = getattr(owner, step, None)
        return placed.placement.displaced or placed.placement.owner is not owner

    def _fail(self, error: Exception) -> None:
        """Leave what stands there, and say so; with ``strict``, that is an error."""
        reason = explain(error)
        for kernel in self.kernels:
            function_binding(kernel).set("failed", reason)
        origin = self.kernels[0].origin
        if self._strict and isinstance(error, TwinkleError):
            raise error
        if self._strict:
            raise ApplyError(f"{self.target} is not replaced", where=origin, found=reason) from error
        if any(kernel.chosen_by == "user" for kernel in self.kernels):
            warn(f"{self.target} is not replaced: {reason} ({origin})")

    def _put(self, implementation: Callable[..., Any], former: Any) -> None:
        """Put the implementation under every name of the function.

        Args:
            implementation: As chosen.
            former: The original before the module was reloaded, whose names are to have it as well.
        """
        whole = redecorated(self.standing, implementation)
        placement = put(self.module, self.name, whole, check=False)
        rebound, left = self._put_in_copies(placement, former)
        dispatch = dispatch_behind(implementation)
        if dispatch is not None:
            dispatch.caches = caches(whole)
        runtime.of(Placements).by_target[self.target] = Placed(
            placement, rebound, self.chosen, implementation
        )
        for candidate in self.chosen:
            candidate.binding.count(1 + len(rebound))
            for where in left:
                candidate.binding.note(f"{where} still holds the original")
            if candidate.loaded:
                candidate.mark_active()
            else:
                candidate.mark_pending()

    def _put_in_copies(
        self, placement: Placement, former: Any
    ) -> tuple[list[aliases.Alias | holders.Held], list[str]]:
        """Put the implementation where else the function is held; returns these places, and those left."""
        keep = [own for candidate in self.chosen for own in candidate.own]
        # Every object of the process is asked: too much for what nobody named.
        named = any(candidate.kernel.chosen_by == "user" for candidate in self.chosen)
        if "." in self.name and not named:
            return [], []
        new = placement.function
        rebound: list[aliases.Alias | holders.Held] = []
        left: list[str] = []
        home = _home(placement.original)
        for original in [placement.original, *([] if former is None else [former])]:
            since = home if original is placement.original else None
            rebound += aliases.rebind(original, new, target=since, keep=keep)
            if named:
                kernels = [getattr(candidate.kernel.source, "in_hand", None) for candidate in self.chosen]
                homes = {getattr(kernel, "__module__", None) for kernel in kernels} - {"__main__", home}
                held, more = holders.rebind(original, new, keep=keep, kernels=kernels, homes=homes)
                rebound, left = [*rebound, *held], [*left, *more]
        return rebound, left

    def _reason_against(self, kernel: FunctionKernel) -> str | None:
        if not {kernel.name, self.target, self.target.replace(":", ".", 1)}.isdisjoint(
            runtime.options.disabled
        ):
            return "switched off by TWINKLE_DISABLE"
        if self.device is not None and kernel.device not in (None, self.device):
            return f"registered for {kernel.device}, applied for {self.device}"
        absent = absent_reason(kernel.device)
        if absent is not None:
            return absent
        if self.mode is None and kernel.mode is not None and caches(self.standing):
            return "its target caches results from one mode to the next: register it without a mode"
        if self.mode is not None and self._place(kernel.mode) is None:
            return f"registered for mode {kernel.mode}, applied for {self.mode}"
        return None

    def _place(self, mode: Mode | None, can_torch_compile: bool | None = None) -> int | None:
        """The rank of a kernel's mode in the mode asked for; None where a part of that must not run it."""
        if self.mode is None:
            return 0
        places = [
            rank(mode, training=training, compiling=self.mode.compile, can_torch_compile=can_torch_compile)
            for training, asked in ((True, self.mode.train), (False, self.mode.inference))
            if asked
        ]
        return None if None in places else max(place for place in places if place is not None)

    def _decide(self, original: Any, usable: list[FunctionCandidate], *, strict: bool) -> None:
        order = sorted(usable, key=lambda c: (c.kernel.device is None, self._place(c.kernel.mode) or 0))
        for at, candidate in enumerate(order):
            implementation = _resolve(candidate, original, strict=strict)
            if implementation is None:
                continue
            if self._place(candidate.kernel.mode, candidate.can_torch_compile) is None:
                candidate.binding.set("skipped", "it says it cannot be compiled")
                continue
            self.chosen = [candidate]
            if not candidate.proofs.number:
                candidate.binding.ran = None  # nobody stands between it and its callers
            # A kernel that is still to be proven needs the dispatcher's first call.
            self.implementation = (
                dispatcher(original, self.chosen) if candidate.proofs.number else implementation
            )
            for other in order[at + 1 :]:
                other.binding.set("skipped", f"{candidate.binding.source} goes first here")
            return

    def _dispatch(self, original: Any, usable: list[FunctionCandidate], *, strict: bool) -> None:
        """Choose a dispatcher, which decides at each call and guards the first one."""
        for candidate in usable:
            if strict or _is_for_any(candidate):
                _resolve(candidate, original, strict=strict)
        self.chosen = [candidate for candidate in usable if candidate.rejected is None]
        if self.chosen:
            self.implementation = dispatcher(original, self.chosen)


def _home(original: Any) -> str | None:
    """The module a function is from, whatever it calls itself: nobody took it before that one began."""
    with contextlib.suppress(Exception):
        original = inspect.unwrap(original)
    names = getattr(original, "__globals__", None)
    name = names.get("__name__") if isinstance(names, dict) else None
    return name if isinstance(name, str) else None


def _is_for_any(candidate: FunctionCandidate) -> bool:
    return candidate.device is None and candidate.mode is None


def _resolve(candidate: FunctionCandidate, original: Any, *, strict: bool) -> Callable[..., Any] | None:
    function = candidate.function(original)
    if function is None and strict:
        raise ApplyError(
            f"kernel {candidate.binding.source} cannot stand in for {candidate.binding.target}",
            where=candidate.kernel.origin,
            found=candidate.rejected,
        )
    return function


def _candidate(kernel: FunctionKernel, original: Any, standing: Any) -> FunctionCandidate:
    key = f"{kernel.target}|{kernel.device}|{kernel.mode}"
    candidates = runtime.of(_Candidates).by_target
    known = candidates.get(key)
    if known is None or known[0] is not kernel or known[1] is not original:
        proofs = runtime.options.proofs(kernel.verify, bound_by_name=kernel.bound_by_name)
        binding = function_binding(kernel)
        if proofs and kind_of(original) != PLAIN:
            proofs = 0
            binding.note(f"not compared: its target is {kind_of(original)}")
        candidate = FunctionCandidate(
            kernel,
            binding,
            strict=runtime.options.raises,
            proofs=proofs,
            recall=runtime.options.recalls(kernel.verify),
            watch=runtime.options.watched(kernel.watch),
        )
        candidate.standing = standing
        known = candidates[key] = (kernel, original, candidate)
    return known[2]
