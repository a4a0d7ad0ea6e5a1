"""Kernelize a model in three passes: match every module, plan all swaps, commit all of them.

Matching (:mod:`twinkle.apply.matching`) and planning touch nothing of the model, so an error in either
leaves it as it was. Functions are planned after the layers and committed after them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from twinkle.apply import captures, functions
from twinkle.apply.bindings import settle_target
from twinkle.apply.candidates import candidate_of, ranked, usable
from twinkle.apply.functions import Change
from twinkle.apply.matching import Rules, match, rules_in_force
from twinkle.apply.places import Decided, Names, Parents
from twinkle.devices import absent_reason, current_type, parse_device
from twinkle.errors import ApplyError, ConfigError
from twinkle.modes import Mode
from twinkle.runtime import runtime
from twinkle.swap import layers as swap
from twinkle.swap.first_calls import leave_alone
from twinkle.targets import class_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from twinkle.apply.bound import Bound
    from twinkle.apply.functions import FunctionPlan
    from twinkle.apply.functions_beside import RecognisedFunction
    from twinkle.apply.selection import Selection
    from twinkle.deferred.install import DeferralPlan
    from twinkle.records import FunctionKernel, LayerKernel
    from twinkle.swap.candidate import Candidate

__all__ = [
    "has_kernels",
    "kernelize",
    "kernelize_layers",
    "place_again",
    "serve_functions",
    "served_with",
    "unkernelize",
]


class Wanted:
    """The mode and device that kernels are asked for.

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
    model: nn.Module | None,
    *,
    mode: object,
    device: object,
    use_fallback: bool,
    where: str,
    only: Selection | None = None,
) -> Change:
    """Put the registered kernels in place of layers and of functions, or nothing.

    Args:
        model: None for functions alone.
        mode: As it was given.
        device: As it was given.
        use_fallback: Keep the original where a kernel cannot be used.
        where: The call, for messages.
        only: Which of the layers that kernels are registered for are to have them; None is all.

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
    layers = None
    function_device = wanted_device
    if model is not None:
        wanted = Wanted(wanted_mode, wanted_device, use_fallback=use_fallback, load=True)
        names = Names(model)
        bound = match(model.modules(), Rules(None), names)
        if only is not None:
            bound = only.of(model, bound, names, use_fallback=use_fallback)
        layers = plan(bound, wanted, model)
        _decided_by_program(model)
        _recognised_functions(model, None)
        function_device = wanted_device or _device_of(model, None)
    function_plans = [
        made
        for module in functions.registered_modules()
        for made in functions.plan(
            module, device=function_device, mode=wanted_mode, strict=not use_fallback, where=where
        )
    ]
    change = _commit(layers, function_plans)
    if model is not None:
        leave_alone(model.modules())
        captures.put_in(model, change)
    return change


def kernelize_layers(model: nn.Module, *, whole: bool = True) -> Change:
    """Put layer kernels in place as the settings in force say; they load at the first forward.

    The embedded kernels come last: what was bound by name or by structure goes first. With them come the
    functions beside the layers that were recognised, and the loss, which is neither function nor layer.

    Args:
        model: A model, or a layer.
        whole: It is a model: classes in it that nothing was for are asked about again.
    """
    options = runtime.options
    wanted = Wanted(options.mode, options.device, use_fallback=options.use_fallback, load=False)
    embedded_on = _embedded_device()
    if embedded_on is not None:
        from twinkle.apply import embedded

        embedded.offer()
    names = Names(model)
    layers = plan(match(model.modules(), rules_in_force(embedded_on, fresh=whole), names), wanted, model)
    if embedded_on is not None:
        deferral = embedded.plan_deferral(model, layers.include)
        if deferral is not None and (
            options.where is None or options.where.includes(names.of(deferral.head))
        ):
            layers.deferral = deferral
    return _commit(layers, _function_plans(_recognised_functions(model, embedded_on, layers.deferral)))


def _function_plans(modules: Mapping[str, bool]) -> list[FunctionPlan]:
    """What is to be put in place in modules, and whether somebody asked for it."""
    options = runtime.options
    return [
        made
        for module, asked_for in modules.items()
        for made in functions.plan(
            module,
            device=options.device,
            mode=options.mode,
            strict=asked_for and options.raises,
            where="activation",
        )
    ]


def unkernelize(model: nn.Module | None) -> None:
    """Restore every layer of ``model``, or every function when it is ``None``."""
    if model is None:
        functions.unapply()
        return
    for module in model.modules():
        swap.swap_out(module)
    leave_alone(model.modules())
    captures.take_out(model)
    _decided_by_program(model)


def place_again(model: nn.Module, arrival: tuple[nn.Module, str, nn.Module]) -> None:
    """Decide anew about the layers of a model whose places have changed, or are about to.

    Args:
        model: Is looked at as a whole.
        arrival: A parent, a name and the module that is about to stand there.
    """
    options = runtime.options
    embedded_on = _embedded_device() if runtime.options.where is not None else None
    rules, names, decided = rules_in_force(embedded_on), Names(model, arrival), runtime.of(Decided)
    moved = []
    for module in model.modules():
        if not rules.by_place(type(module)):
            continue
        before = decided.get(module, _UNMET)
        # What was taken out of its model, or a copy of it, keeps what it had there.
        kept = swap.placed(module) is not None if before is _UNMET else decided.was_taken_out(module)
        if before is False or (kept and not rules.speak_of(module, names)):
            continue
        rule = rules.choose(module, names)
        if before is _UNMET or before is not (rule and rule.where):
            moved.append(module)
    if moved:
        for module in moved:
            swap.swap_out(module)
        wanted = Wanted(options.mode, options.device, use_fallback=options.use_fallback, load=False)
        _commit(plan(match(moved, rules, names), wanted, model), ())
        leave_alone(moved)


def has_kernels(cls: type[nn.Module]) -> bool:
    """Whether an instance of a class may get a kernel when it is decided about."""
    embedded_on = _embedded_device()
    if not rules_in_force(embedded_on).of(cls):
        return embedded_on is not None and _defers(cls)
    if embedded_on is None:
        return True
    from twinkle.apply import embedded

    return embedded.may_have_places(cls) or _defers(cls)


def served_with(cls: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    """The classes that are looked at once one is that has kernels; nobody asks about them by themselves."""
    if _embedded_device() is None:
        return ()
    from twinkle.apply import embedded

    return embedded.looked_at_with(cls)


def _defers(cls: type[nn.Module]) -> bool:
    from twinkle.apply import embedded

    return embedded.defers(cls)


def serve_functions(modules: Iterable[str], classes: Iterable[type] = ()) -> None:
    """Put kernels in place of recognised functions in modules, as the settings in force say.

    Args:
        modules: By their names.
        classes: Layers whose forward may be such a function.
    """
    from twinkle.apply import recognised_functions

    offered = _offered(_embedded_device())
    _commit(None, _function_plans(recognised_functions.register_in(modules, offered, classes)))


def _offered(embedded_on: str | None) -> Callable[[RecognisedFunction], Sequence[FunctionKernel]] | None:
    if embedded_on is None:
        return None
    from twinkle.apply import embedded

    embedded.offer()
    return partial(embedded.function_kernels, where=embedded_on)


_UNMET = object()


def _decided_by_program(model: nn.Module) -> None:
    """Leave the layers of a model as the program has made them, wherever they come."""
    decided = runtime.of(Decided)
    if runtime.of(Parents).watching:
        for module in model.modules():
            decided.set(module, False, model)


def _embedded_device() -> str | None:
    """The device of the embedded kernels, where they were asked for."""
    if not runtime.options.embedded:
        return None
    from twinkle.ops.backends import device

    return device()


def _recognised_functions(
    model: nn.Module, embedded_on: str | None, deferral: DeferralPlan | None = None
) -> dict[str, bool]:
    """Register kernels for recognised functions: the modules that have new ones, and whether asked for.

    What a forward whose logits are deferred was recognised with stays as it is.
    """
    if embedded_on is None and not any(kernel.op for kernel in runtime.registry.function_kernels):
        return {}
    from twinkle.apply import recognised_functions

    offered = _offered(embedded_on)
    if offered is not None and deferral is not None:
        from twinkle.apply import embedded

        offered = embedded.apart_from_head(swap.original_class(model), offered)
    return recognised_functions.register(model, offered)


def _commit(layers: LayerPlans | None, function_plans: Iterable[FunctionPlan]) -> Change:
    """Put all that was planned in place, or nothing."""
    change = Change()
    try:
        if layers is not None:
            layers.commit(change)
        functions.commit(function_plans, change)
    except BaseException:
        change.undo()
        raise
    return change


def plan(bound: Iterable[Bound], wanted: Wanted, model: nn.Module) -> LayerPlans:
    """Work out the swaps for the modules that kernels are bound to; records change, the model does not.

    Args:
        bound: As matched.
        wanted: The moment asked for.
        model: Tells the device of modules that have no tensors.

    Raises:
        ApplyError: A module that was asked for has no kernel that can be used, and there is no fallback.
    """
    plans = LayerPlans()
    absent = absent_reason(wanted.device)
    model_device = None
    for one in bound:
        group = plans.group_of(one)
        if absent is not None or not group.candidates:
            group.skip(absent or "none of its kernels is for a device of this machine", wanted)
            continue
        if wanted.load and not group.settled:
            model_device = model_device or _device_of(model, None) or "cpu"
            group.settle(one.module, wanted, model_device)
        made = group.swap_for(one.module, wanted)
        if made is not None:
            plans.swaps.append(made)
    return plans


class LayerPlans:
    """The swaps for the layers of a model, none of which was made yet.

    Attributes:
        swaps: In the order in which they are made.
        deferral: Deferred logits, which are neither a layer nor a function; they come after the layers.
    """

    def __init__(self) -> None:
        self.swaps: list[swap.Plan] = []
        self.deferral: DeferralPlan | None = None
        self._groups: dict[tuple[type, tuple[LayerKernel, ...]], _Group] = {}

    def group_of(self, bound: Bound) -> _Group:
        """The modules of one class with the same kernels; layers of a class may be of several kinds."""
        key = (bound.cls, bound.kernels)
        group = self._groups.get(key)
        if group is None:
            if bound.asked_for:
                settle_target(bound.kernels, bound.entry, bound.target)
            candidates = tuple(
                candidate_of(kernel, bound.target) for kernel in bound.kernels if usable(kernel, bound.target)
            )
            group = self._groups[key] = _Group(bound.cls, bound.target, candidates, asked_for=bound.asked_for)
        return group

    def include(self, module: nn.Module) -> bool:
        """Whether a module is to have a kernel by one of the swaps."""
        return any(one is module for made in self.swaps for one in made.modules)

    def commit(self, change: Change) -> None:
        """Make every swap, then bring the records up to date."""
        for made in self.swaps:
            if made.changes:
                change.did(made.undo)  # first: a swap that fails half-way is taken back as well
            made.commit()
        if self.deferral is not None:
            change.did(self.deferral.undo)
            self.deferral.commit()
            runtime.registry.record(self.deferral.installed.binding)
        for group in self._groups.values():
            group.tell()


class _Group:
    """The modules of one class that have the same kernels.

    Attributes:
        candidates: The kernels that may run on this machine.
        settled: Whether kernels were loaded for the moment asked for.
        placed: How many modules are to have them.
    """

    def __init__(
        self, cls: type, target: type, candidates: tuple[Candidate, ...], *, asked_for: bool
    ) -> None:
        self.cls = cls
        self.target = target
        self.candidates = candidates
        self.asked_for = asked_for
        self.settled = False
        self.placed = 0
        self._last: swap.Plan | None = None

    def swap_for(self, module: nn.Module, wanted: Wanted) -> swap.Plan | None:
        """A swap of that module; None where an earlier one holds for it too, or none can be made."""
        if self._last is not None and self._last.also(module):
            self.placed += 1
            return None
        made = swap.plan(module, self.candidates, pinned=wanted.mode)
        if isinstance(made, str):
            self.leave(made, wanted)
            return None
        self.placed += 1
        self._last = made
        return made

    def skip(self, reason: str, wanted: Wanted) -> None:
        """Keep the originals: the device that was asked for, or that of every kernel, is absent."""
        for candidate in self.candidates:
            if candidate.binding.state in ("pending", "skipped"):
                candidate.binding.set("skipped", reason)
        self._refuse(reason, wanted)

    def leave(self, reason: str, wanted: Wanted) -> None:
        """Keep the original of one module, which cannot be swapped."""
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
        for candidate in ranked(self.candidates, device, training=training, compiling=compiling):
            fit = candidate.compatibility(self.cls, (module,))
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
        """Bring the records of the kernels up to date with what was put in place."""
        for candidate in self.candidates:
            if candidate.rejected is not None:
                continue
            if self.placed and candidate.known_compatibility(self.cls) is not None:
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


def _device_of(module: nn.Module, default: str | None) -> str | None:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            return current_type(tensor.device.type)
    first = next(module.parameters(), None)
    if first is None:
        first = next(module.buffers(), None)
    return default if first is None else current_type(first.device.type)
