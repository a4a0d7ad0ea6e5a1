"""Kernelize a model: plan for every module first, then put all of it in place, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from twinkle.apply import functions
from twinkle.apply.bindings import layer_binding, settle_pattern
from twinkle.apply.change import Change
from twinkle.apply.specialise import specialise
from twinkle.devices import absent_reason, current_type, parse_device
from twinkle.errors import ApplyError, ConfigError
from twinkle.modes import Mode, rank
from twinkle.runtime import runtime
from twinkle.sources.specialised import SpecialisedSource
from twinkle.swap import layers as swap
from twinkle.swap.candidate import Candidate
from twinkle.targets import class_path, defining_match, parse_target

if TYPE_CHECKING:
    from twinkle.records import LayerKernel, LayerTarget, Source

__all__ = ["kernelize", "kernelize_layers", "unkernelize"]


class _Candidates:
    """The candidates of this process, by kernel and class."""

    def __init__(self) -> None:
        self.by_kernel: dict[tuple[int, type], Candidate] = {}


class Wanted:
    """The moment a request is about.

    Attributes:
        mode: The mode asked for, or ``None`` to follow each module.
        device: The device asked for, or ``None`` for that of each module.
        use_fallback: Keep the original where a kernel cannot be used.
        load: Load kernels now rather than at the first forward.
    """

    def __init__(self, mode: Mode | None, device: str | None, *, use_fallback: bool, load: bool) -> None:
        self.mode = mode
        self.device = device
        self.use_fallback = use_fallback
        self.load = load

    def training(self, module: nn.Module) -> bool:
        """Whether the moment is one of training for that module."""
        if self.mode is None or self.mode.bare_compile:
            return bool(module.training)
        return self.mode.train

    @property
    def compiling(self) -> bool:
        """Whether the moment is one under ``torch.compile``."""
        return self.mode is not None and self.mode.compile


def kernelize(
    model: nn.Module | None, *, mode: object, device: object, use_fallback: bool, where: str
) -> Change:
    """Plan layers and functions, then put both in place.

    Raises:
        ConfigError: ``mode`` or ``device`` is unknown, or ``model`` is no ``nn.Module``.
        ApplyError: ``use_fallback`` is false and something has no kernel that can be used.
    """
    wanted_mode = Mode.parse(mode, where=where)
    wanted_device = parse_device(device, where=where)
    if model is not None and not isinstance(model, nn.Module):
        raise ConfigError(
            "not a model", where=where, found=repr(type(model)), expected="an nn.Module, or None"
        )
    change = Change()
    try:
        if model is not None:
            wanted = Wanted(wanted_mode, wanted_device, use_fallback=use_fallback, load=True)
            _put_layers(model, wanted, change)
            _found_functions(model, None)
        function_device = wanted_device
        if function_device is None and model is not None:
            function_device = _device_of(model, None)
        for module in functions.registered_modules():
            change.applied += functions.apply(
                module,
                device=function_device,
                mode=wanted_mode,
                strict=not use_fallback,
                where=where,
                change=change,
                must_apply=False,
            ).applied
    except BaseException:
        change.undo()
        raise
    return change


def kernelize_layers(model: nn.Module) -> Change:
    """Put layer kernels in place as the settings in force say; they load at the first forward.

    The embedded kernels come last: what was bound by name or by structure goes first.
    """
    wanted = Wanted(
        runtime.options.mode, runtime.options.device, use_fallback=runtime.options.use_fallback, load=False
    )
    change = Change()
    try:
        _put_layers(model, wanted, change)
        _put_functions(model)
    except BaseException:
        change.undo()
        raise
    return change


def _put_functions(model: nn.Module) -> None:
    """What was bound to ops that are functions, and the loss, which is neither function nor layer."""
    device = _embedded_device()
    for module, asked_for in _found_functions(model, device).items():
        functions.apply(
            module,
            device=runtime.options.device,
            mode=runtime.options.mode,
            strict=asked_for and runtime.options.raises,
            where="activation",
            must_apply=False,
        )
    if device is not None:
        from twinkle.apply import embedded

        embedded.defer_logits(model)


def _found_functions(model: nn.Module, device: str | None) -> dict[str, bool]:
    if device is None and not any(kernel.op for kernel in runtime.registry.function_kernels):
        return {}
    from twinkle.apply import recognised_functions as found

    return found.register(model, device)


def unkernelize(model: nn.Module | None) -> None:
    """Restore every layer of ``model``, or every function when it is ``None``."""
    if model is None:
        functions.unapply()
        return
    for module in model.modules():
        swap.swap_out(module)


def _put_layers(model: nn.Module, wanted: Wanted, change: Change) -> None:
    absent = absent_reason(wanted.device)
    embedded_on = None if wanted.load else _embedded_device()
    if embedded_on is not None:
        from twinkle.apply import embedded

        embedded.offer()
    plans: dict[object, _ClassPlan | None] = {}
    chosen: list[swap.Plan] = []
    model_device = None
    for module in model.modules():
        cls = swap.original_class(module)
        if cls not in plans:
            plans[cls] = _plan_class(cls)
        plan = plans[cls]
        if plan is not None and plan.matched:
            plan = _plan_fitted(module, plan, plans)
        if plan is None and embedded_on is not None:
            kernels = embedded.layer_kernels(module, cls, embedded_on)
            plan = _plan_of(kernels, cls, cls, plans, asked_for=False) if kernels else None
        if plan is None:
            continue
        if absent is not None or not plan.candidates:
            plan.skip(absent or "none of its kernels is for a device of this machine", wanted)
            continue
        if wanted.load and not plan.settled:
            model_device = model_device or _device_of(model, None) or "cpu"
            plan.settle(module, wanted, model_device)
        plan.placed += 1
        if plan.made is not None and plan.made.also(module):
            continue
        made = swap.plan(module, plan.candidates, pinned=wanted.mode)
        if isinstance(made, str):
            plan.placed -= 1
            plan.leave(made, wanted)
        else:
            plan.made = made
            chosen.append(made)
    for made in chosen:
        if made.commit():
            change.did(made.undo)
    for plan in plans.values():
        if plan is not None:
            plan.tell()


class _ClassPlan:
    """The kernels for one class of a model."""

    def __init__(
        self, cls: type, target: type, candidates: tuple[Candidate, ...], *, asked_for: bool = True
    ) -> None:
        self.asked_for = asked_for
        self.matched: tuple[LayerKernel, ...] = ()
        self.cls = cls
        self.target = target
        self.candidates = candidates
        self.settled = False
        self.placed = 0
        self.made: swap.Plan | None = None

    def skip(self, reason: str, wanted: Wanted) -> None:
        """The request is for a device that is not there: keep the originals."""
        for candidate in self.candidates:
            if candidate.binding.state in ("pending", "skipped"):
                candidate.binding.set("skipped", reason)
        self._refuse(reason, wanted)

    def leave(self, reason: str, wanted: Wanted) -> None:
        """One module cannot be swapped: keep the original there."""
        for candidate in self.candidates:
            if candidate.rejected is None:
                candidate.binding.note(reason)
        self._refuse(reason, wanted)

    def settle(self, module: nn.Module, wanted: Wanted, model_device: str) -> None:
        """Load the kernel for the moment, or the next best one, or none."""
        self.settled = True
        device = wanted.device or _device_of(module, model_device)
        if device is None or device == "meta":
            return
        training, compiling = wanted.training(module), wanted.compiling
        refused: list[str] = []
        for candidate in _ranked(self.candidates, device, training=training, compiling=compiling):
            fit = candidate.fit(self.cls, (module,))
            problem = candidate.rejected if fit is None else fit.problem_with(module)
            if problem is None and fit is not None:
                if fit.can_torch_compile is False and compiling:
                    problem = "it says it cannot be compiled"
                elif fit.has_backward is False and training:
                    problem = "it says it has no backward"
            if problem is None:
                return
            refused.append(f"{candidate.kernel.source.describe()}: {problem}")
        moment = f"{device}/{wanted.mode or ('train' if training else 'inference')}"
        self._refuse("; ".join(refused) or f"no kernel is registered for {moment}", wanted, moment)

    def tell(self) -> None:
        """Bring the records up to date with what was put in place."""
        for candidate in self.candidates:
            if candidate.rejected is not None:
                continue
            if self.placed and candidate.known_fit(self.cls) is not None:
                candidate.mark_active()
            elif self.placed:
                candidate.mark_pending()
            elif not self.placed and candidate.binding.state == "pending" and candidate.binding.notes:
                candidate.binding.set("skipped", candidate.binding.notes[-1])

    def _refuse(self, reason: str, wanted: Wanted, moment: str | None = None) -> None:
        if self.asked_for and not wanted.use_fallback:
            raise ApplyError(
                f"no kernel for {class_path(self.target)} can be used",
                expected=f"a kernel for {moment}" if moment else None,
                found=reason,
                fix="use_fallback=True keeps the original",
            )


def _ranked(
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


def _device_of(module: nn.Module, default: str | None) -> str | None:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            return current_type(tensor.device.type)
    first = next(module.parameters(), None)
    if first is None:
        first = next(module.buffers(), None)
    return default if first is None else current_type(first.device.type)


def _plan_class(cls: type) -> _ClassPlan | None:
    """What is registered for modules of a class; worked out once per state of the registry."""
    found = _bound_name(cls)
    if found is None:
        return None
    target, name, by = found
    kernels = runtime.registry.kernels_named(name)
    if not kernels:
        return None
    if by is not None and isinstance(by.target, str) and by.target.startswith("match:"):
        for kernel in kernels:
            settle_pattern(kernel, by)
        plan = _ClassPlan(cls, target, ())
        plan.matched = kernels
        return plan
    usable = [kernel for kernel in kernels if _usable(kernel, target, by)]
    return _ClassPlan(cls, target, tuple(_candidate(kernel, target) for kernel in usable))


def _plan_fitted(module: nn.Module, plan: _ClassPlan, plans: dict[object, _ClassPlan | None]) -> _ClassPlan:
    """The kernels that were bound to an op, for what this instance of it is."""
    from twinkle.match.structure import check_instance, recognise

    found = recognise(plan.cls)
    checked = check_instance(found, module)
    facts = checked if isinstance(checked, dict) else str(checked)

    def source(registered: Source) -> SpecialisedSource:
        return SpecialisedSource(registered, str(found.op), found.form, facts)

    return _plan_of(specialise(plan.cls, plan.matched, facts, source), plan.cls, plan.target, plans)


def _plan_of(
    kernels: tuple[LayerKernel, ...],
    cls: type,
    target: type,
    plans: dict[object, _ClassPlan | None],
    *,
    asked_for: bool = True,
) -> _ClassPlan:
    """The plan for kernels that are for one kind of instance; layers of one class may be of several."""
    plan = plans.get(kernels)
    if plan is None:
        usable = [kernel for kernel in kernels if _usable(kernel, target, None)]
        candidates = tuple(_candidate(kernel, target) for kernel in usable)
        plan = plans[kernels] = _ClassPlan(cls, target, candidates, asked_for=asked_for)
    return plan


def _embedded_device() -> str | None:
    """Where the embedded kernels run, when they were asked for."""
    if runtime.options.kernels == "off" or not runtime.options.kernels:
        return None
    from twinkle.ops.backends import device

    return device()


def _usable(kernel: LayerKernel, target: type, by: LayerTarget | None) -> bool:
    settle_pattern(kernel, by)
    binding = layer_binding(kernel, target)
    if kernel.name in runtime.options.disabled:
        binding.set("skipped", "switched off by TWINKLE_DISABLE")
        return False
    absent = absent_reason(kernel.device)
    if absent is not None:
        binding.set("skipped", absent)
        return False
    return True


def _candidate(kernel: LayerKernel, target: type) -> Candidate:
    """The one candidate of a kernel and a class, so that models share what was loaded."""
    key = (id(kernel), target)
    candidates = runtime.of(_Candidates).by_kernel
    known = candidates.get(key)
    if known is None or known.kernel is not kernel:
        proofs = runtime.options.proofs(kernel.verify, kind=kernel.source.kind)
        known = candidates[key] = Candidate(
            kernel,
            layer_binding(kernel, target),
            strict=runtime.options.raises,
            proofs=proofs,
            recall=runtime.options.recalls(kernel.verify),
        )
    return known


def _bound_name(cls: type) -> tuple[type, str, LayerTarget | None] | None:
    """The target class, the kernel name bound to it and by what; the newest registration wins."""
    for entry in reversed(runtime.registry.layer_targets):
        if isinstance(entry.target, str) and entry.target.startswith("match:"):
            from twinkle.match.structure import recognise

            if recognise(cls).op == entry.target.removeprefix("match:"):
                return cls, entry.kernel_name, entry
            continue
        target = entry.target if isinstance(entry.target, type) else parse_target(entry.target)
        match = defining_match(cls, target)
        if match is not None:
            return match, entry.kernel_name, entry
    running = getattr(cls, "forward", None)
    for base in cls.__mro__:
        name = base.__dict__.get("kernel_layer_name")
        if isinstance(name, str) and getattr(base, "forward", None) is running:
            return (base, name, None) if runtime.registry.kernels_named(name) else None
    return None
