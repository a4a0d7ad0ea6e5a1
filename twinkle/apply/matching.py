"""Match: which kernels are registered for which modules of a model. Nothing is planned or touched here."""

from __future__ import annotations

from functools import cache, partial
from operator import is_not
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, ref

from twinkle.apply.bound import Bound, specialise
from twinkle.apply.places import Decided
from twinkle.hooks.resolution import means
from twinkle.runtime import runtime
from twinkle.sources.specialised import SpecialisedSource
from twinkle.swap.generated import original_of
from twinkle.targets import Op, class_path, defining_match

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn

    from twinkle.apply.places import Names
    from twinkle.match.recognition import Recognition
    from twinkle.records import LayerKernel, LayerTarget, Source
    from twinkle.where import Where

__all__ = ["Rules", "classes_have_come", "kernels_for", "match", "rules_in_force", "taken_for"]


class Rule(NamedTuple):
    """How modules of a class are bound, in the places that a registration is for.

    Attributes:
        bind: From the class of a module, without Twinkle, and the module to what it is bound to; None where
            it is none of what its class promises. It holds no class: classes come and go in loops.
        where: The places; None for every place.
    """

    bind: Callable[[type, nn.Module], Bound | None]
    where: Where | None


class Rules:
    """The rules for the classes of layers, each worked out once; the first that is for a module holds.

    Args:
        embedded_on: The device of the embedded kernels, which are for modules that nothing else is
            registered for; None where they are off.
    """

    def __init__(self, embedded_on: str | None) -> None:
        self.embedded_on = embedded_on
        self._of: WeakKeyDictionary[type, tuple[Any, tuple[Rule, ...]]] = WeakKeyDictionary()

    def of(self, cls: type) -> tuple[Rule, ...]:
        """Those for a class of modules; none where nothing is for it."""
        forward = getattr(cls, "forward", None)
        known = self._of.get(cls)
        if known is None or known[0]() is not forward:
            known = self._of[cls] = _weak(forward), tuple(_rules(original_of(cls), self.embedded_on))
        return known[1]

    def forget_unbound(self) -> None:
        """Ask again about the classes that nothing is for: they may come to have a name that is a target."""
        for cls in [cls for cls, known in self._of.items() if not known[1]]:
            del self._of[cls]

    def by_place(self, cls: type) -> bool:
        """Whether it matters where modules of a class are."""
        return any(rule.where is not None for rule in self.of(cls))

    def speak_of(self, module: nn.Module, names: Names) -> bool:
        """Whether a place that something is registered for is that of a module."""
        wheres = [rule.where for rule in self.of(type(module)) if rule.where is not None]
        return any(where.speaks_of(names.of(module)) for where in wheres)

    def choose(self, module: nn.Module, names: Names) -> Rule | None:
        """The rule for a module where it is; None where none is for it."""
        for rule in self.of(type(module)):
            if rule.where is None or rule.where.chooses(module, names.of(module)):
                return rule
        return None


class _InForce:
    """The rules of the hooks, and the registrations and settings that they are made of."""

    def __init__(self) -> None:
        self.made_of: tuple[object, ...] = ()
        self.rules = Rules(None)


def rules_in_force(embedded_on: str | None, *, fresh: bool = False) -> Rules:
    """What holds for layers that are constructed: the same rules until something is registered.

    Args:
        embedded_on: As for :class:`Rules`.
        fresh: Ask again about the classes that nothing was for.
    """
    state, options, registry = runtime.of(_InForce), runtime.options, runtime.registry
    made_of = (
        registry.layer_targets,
        registry.layer_kernels,
        runtime.embedded.layer_targets,
        embedded_on,
        options.kernels,
        options.disabled,
        options.where,
    )
    if len(state.made_of) != len(made_of) or any(map(is_not, state.made_of, made_of)):
        state.made_of, state.rules = made_of, Rules(embedded_on)
    if fresh:
        state.rules.forget_unbound()
    return state.rules


def classes_have_come() -> None:
    """Ask again about every class: names that are targets have come to stand for classes."""
    runtime.of(_InForce).made_of = ()


def match(modules: Iterable[nn.Module], rules: Rules, names: Names) -> list[Bound]:
    """The modules that kernels are registered for, in their order.

    Args:
        modules: Are only read.
        rules: What holds for their classes.
        names: Where they are.
    """
    decided = runtime.of(Decided)
    found = []
    for module in modules:
        if not rules.of(type(module)):
            continue
        rule = rules.choose(module, names)
        if rules.by_place(type(module)):
            decided.set(module, rule and rule.where, names.outermost)
        bound = rule.bind(original_of(type(module)), module) if rule is not None else None
        if bound is not None:
            found.append(bound)
    return found


def kernels_for(cls: type) -> tuple[LayerKernel, ...]:
    """What is registered for modules of a class: by name, by pattern or for the op it is."""
    return next(_registered(cls, _recognition(cls)), (None, None, ()))[2]


def taken_for(cls: type) -> LayerTarget | None:
    """The registration of an op that modules of a class are bound by, where that is what binds them."""
    _, entry, _ = next(_registered(cls, _recognition(cls)), (None, None, ()))
    return entry if entry is not None and isinstance(entry.target, Op) else None


def _recognition(cls: type) -> Callable[[], Recognition]:
    @cache
    def recognition() -> Recognition:
        """What the class is recognised as: asked at most once, and not of a class that was named."""
        from twinkle.match.structure import recognise

        return recognise(cls)

    return recognition


def _rules(cls: type, embedded_on: str | None) -> Iterator[Rule]:
    """How modules of a class are bound, up to the first rule that is for every place."""
    recognition = _recognition(cls)
    for target, entry, kernels in _registered(cls, recognition):
        where = None if entry is None else entry.where
        if entry is None or not isinstance(entry.target, Op):
            yield Rule(partial(_named, ref(target), kernels, entry), where)
        else:
            yield Rule(partial(_recognised, kernels, entry, recognition()), where)
        if where is None:
            return
    if embedded_on is None:
        return
    from twinkle.apply import embedded

    bind = embedded.layer_rule(cls, recognition(), embedded_on)
    if bind is not None:
        yield Rule(bind, runtime.options.where)


def _registered(
    cls: type, recognition: Callable[[], Recognition]
) -> Iterator[tuple[type, LayerTarget | None, tuple[LayerKernel, ...]]]:
    """The target class, the registration and its kernels, in the order in which they are asked.

    Those for places come before those for every place, and the newer before the older.
    """
    entries = reversed(runtime.registry.layer_targets)
    for entry in sorted(entries, key=lambda one: one.where is None):
        if isinstance(entry.target, Op):
            target = cls if recognition().op == entry.target.op else None
        else:
            target = defining_match(cls, entry.target, means)
        if target is not None:
            kernels = runtime.registry.kernels_named(entry.kernel_name)
            if kernels:
                entry.classes.add(class_path(target))
                yield target, entry, kernels
            if entry.where is None:
                return
    running = getattr(cls, "forward", None)
    for base in cls.__mro__:
        name = base.__dict__.get("kernel_layer_name")
        if isinstance(name, str) and getattr(base, "forward", None) is running:
            kernels = runtime.registry.kernels_named(name)
            if kernels:
                yield base, None, kernels
            return


def _weak(value: Any) -> Callable[[], Any]:
    """What gives a value as long as it lives."""
    try:
        return ref(value)
    except TypeError:
        return partial(_given, value)


def _given(value: Any) -> Any:
    return value


def _named(
    target: ref[type],
    kernels: tuple[LayerKernel, ...],
    entry: LayerTarget | None,
    cls: type,
    module: nn.Module,
) -> Bound:
    """Bind a module of a class that was named."""
    return Bound(module, cls, target() or cls, kernels, entry)


def _recognised(
    kernels: tuple[LayerKernel, ...],
    entry: LayerTarget,
    recognition: Recognition,
    cls: type,
    module: nn.Module,
) -> Bound:
    """Bind a module of a class that is recognised as an op: its kernels are specialised for the module."""
    from twinkle.match.structure import check_instance

    checked = check_instance(recognition, module)
    facts = checked if isinstance(checked, dict) else str(checked)

    def source(registered: Source) -> SpecialisedSource:
        return SpecialisedSource(registered, str(recognition.op), recognition.variant, facts)

    return Bound(module, cls, cls, specialise(cls, kernels, facts, source), entry)
