"""Swap modules: put kernels in the place of their ``forward``, and take them out again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from twinkle.errors import KernelError
from twinkle.swap import instance
from twinkle.swap.class_tree import core_of
from twinkle.swap.entry import Moment
from twinkle.swap.front import MARK
from twinkle.swap.generated import LayerDispatch, Pin, class_for, dispatch_of, move, original_of, swap_out
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from twinkle.modes import Mode
    from twinkle.swap.candidate import Candidate

__all__ = [
    "Plan",
    "candidates_of",
    "matches",
    "original_class",
    "placed",
    "plan",
    "restore",
    "swap_out",
]


class Plan:
    """A swap that can be made; nothing has been touched yet.

    Attributes:
        module: The module it is about.
        modules: That one, and those that it was found to hold for :meth:`also`.
        changes: False when the modules already are as they would be.
    """

    def __init__(self, module: nn.Module, dispatch: LayerDispatch) -> None:
        self.module = module
        self.modules = [module]
        self._dispatch = dispatch
        self._before = dispatch_of(module)
        self._cls = type(module)
        self._mark = module.__dict__.get(MARK)
        self._training = module.training
        self._simple = "forward" not in module.__dict__
        self.changes = self._before is not dispatch

    @property
    def dispatch(self) -> LayerDispatch:
        """What stands behind the class that the modules are to have."""
        return self._dispatch

    def also(self, module: nn.Module) -> bool:
        """Take another module into the plan if it can be swapped in the same way; models have many alike."""
        if (
            type(module) is not self._cls
            or module.__dict__.get(MARK) != self._mark
            or module.training is not self._training
            or not self._simple
            or "forward" in module.__dict__
        ):
            return False
        target = self._dispatch.target
        if any(_problem(candidate, target, module) for candidate in self._dispatch.candidates):
            return False
        self.modules.append(module)
        return True

    def resolve(self, *, device: str | None = None, training: bool | None = None) -> str | None:
        """Load the kernels now that the module would run, ahead of the first forward.

        Args:
            device: What ``tensor.device.type`` will say; by default that of the module.
            training: By default what the module says.

        Returns:
            Why nothing is left to swap, or ``None``.

        Raises:
            TwinkleError: A candidate is ``strict`` and cannot be loaded or is not compatible.
        """
        _load(self._dispatch, self.module, device, training)
        left, reasons = [], []
        for candidate in self._dispatch.candidates:
            problem = candidate.rejected or _problem(candidate, self._dispatch.target, self.module)
            if problem is None:
                left.append(candidate)
            elif candidate.strict:
                raise KernelError(f"{candidate.binding.target}: {problem}")
            else:
                reasons.append(problem)
        if not left:
            return "; ".join(reasons)
        self._dispatch = class_for(self._dispatch.target, tuple(left), self._dispatch.pin)
        self.changes = dispatch_of(self.module) is not self._dispatch
        return None

    def commit(self) -> bool:
        """Make the swap; false when there was nothing to change."""
        if not self.changes:
            self._dispatch.count(self.modules)
            return False
        move(self.modules, self._dispatch)
        self.changes = False
        return True

    def undo(self) -> None:
        """Bring the modules back to what they were when the plan was made."""
        for module in self.modules:
            restore(module, self._before)


def plan(module: nn.Module, candidates: Iterable[Candidate], *, pinned: Mode | None = None) -> Plan | str:
    """Work out a swap without touching the module.

    Args:
        module: Its own ``forward`` is replaced; see :func:`matches`.
        candidates: In order of registration; those that are rejected are passed over.
        pinned: A mode that was asked for by name. It holds until the next ``train()`` or ``eval()``.

    Returns:
        The plan, or why the module is left alone.
    """
    core, _ = core_of(type(module))
    now = dispatch_of(module)
    target: type[nn.Module] = now.target if now is not None else core
    reasons: list[str] = []
    usable: list[Candidate] = []
    for candidate in candidates:
        problem = candidate.rejected or _problem(candidate, target, module)
        if problem is None:
            usable.append(candidate)
        elif problem not in reasons:
            reasons.append(problem)
    if not usable:
        return "; ".join(reasons) or "no kernel to put in place"
    forward: Any = own_forward(target)
    if forward is nn.Module.forward:
        return f"{target.__name__} has no forward"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{target.__name__} turns into another class at its first forward: kernelize it after that"
    if instance.has_wrapper(module):
        functions = [forward, target.forward, *(now.functions if now is not None else ())]
        if not instance.reachable(module, functions):
            return (
                f"this {target.__name__} has a forward of its own ({instance.describe(module)}) "
                "that does not go on to the class's"
            )
    try:
        dispatch = class_for(target, tuple(usable), _pin(module, pinned))
    except TypeError as error:
        return f"{target.__name__} cannot be subclassed: {error}"
    return Plan(module, dispatch)


def original_class(module: nn.Module) -> type:
    """The class the module has without Twinkle."""
    return original_of(type(module))


def placed(module: nn.Module) -> LayerDispatch | None:
    """The dispatch of a swapped module, to be given to :func:`restore` later; None for another module."""
    return dispatch_of(module)


def restore(module: nn.Module, before: LayerDispatch | None) -> None:
    """Give a module the swap it had before, or none."""
    if before is None:
        swap_out(module)
    elif before is not dispatch_of(module):
        move((module,), before)


def candidates_of(module: nn.Module) -> tuple[Candidate, ...]:
    """The candidates of a swapped module, in order; none for another module."""
    dispatch = dispatch_of(module)
    return dispatch.candidates if dispatch is not None else ()


def matches(module: nn.Module, target_class: type[nn.Module]) -> bool:
    """Whether the ``forward`` that would run is the target's own: not where a subclass overrides it."""
    dispatch = dispatch_of(module)
    cls = dispatch.target if dispatch is not None else type(module)
    return isinstance(module, target_class) and own_forward(cls) is own_forward(target_class)


def _load(dispatch: LayerDispatch, module: nn.Module, device: str | None, training: bool | None) -> None:
    if device is None:
        tensors = (*module.parameters(), *module.buffers())
        device = next((t.device.type for t in tensors), None)
    if device == "meta":
        return
    if dispatch.fixed_training is not None:
        training = dispatch.fixed_training
    moment = Moment(
        device,
        training=module.training if training is None else training,
        compiling=dispatch.fixed_compiling,
        grad=torch.is_grad_enabled(),
    )
    dispatch.load(moment, (module,))
    dispatch.rebuild()


def _pin(module: nn.Module, mode: Mode | None) -> Pin | None:
    """The pin for a mode that was asked for by name; ``None`` when the module's own mode says the same."""
    if mode is None:
        return None
    training = None if mode.train == mode.inference or mode.train == module.training else mode.train
    return (training, mode.compile) if training is not None or mode.compile else None


def _problem(candidate: Candidate, target: type[nn.Module], module: nn.Module) -> str | None:
    """Why an instance cannot take a kernel that was loaded before, or ``None``."""
    known = candidate.known_compatibility(target)
    return known.problem_with(module) if known is not None else None
