"""Where modules are in their models: their places, by the names on every way to them.

Modules know what is in them, and not what they are in. Where something is registered for places, each
module that becomes part of another is noted, and those inside it are decided about anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import ref

from torch.nn.modules.module import register_module_module_registration_hook

from twinkle.hooks import guard
from twinkle.runtime import runtime
from twinkle.swap.generated import original_of
from twinkle.where import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from torch import nn

    Arrival = tuple[nn.Module, str, nn.Module]

__all__ = ["Decided", "Names", "Parents", "watch_places"]

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names that torch gives to what a wrapper holds: the wrapper has no name of its own."""
_MOST = 16
"""The places that are looked at of one module that is in a model many times."""


class Parents:
    """The modules that others were put into, since places matter in this process.

    Attributes:
        of: By the id of a module; who is gone, or has it no more, is passed over.
        watching: Whether every module that is put into another is noted.
    """

    def __init__(self) -> None:
        self.of: dict[int, list[ref[nn.Module]]] = {}
        self.watching = False
        self._alive: dict[int, ref[nn.Module]] = {}
        self._remove: Callable[[], None] | None = None

    def add(self, child: nn.Module, parent: nn.Module) -> None:
        """Note that a module is put into another."""
        key = id(child)
        known = self.of.setdefault(key, [])
        if not any(one() is parent for one in known):
            known[:] = [one for one in known if one() is not None]
            known.append(ref(parent))
        if key not in self._alive:
            self._alive[key] = ref(child, lambda gone: self._forget(key, gone))

    def _forget(self, key: int, gone: ref[nn.Module]) -> None:
        if self._alive.get(key) is gone:
            del self._alive[key]
            self.of.pop(key, None)

    def watch(self, attached: Callable[[nn.Module, str, nn.Module | None], None]) -> None:
        """Be told of each module that is put into another, before it is there."""
        if not self.watching:
            self.watching = True
            self._remove = register_module_module_registration_hook(attached).remove

    def close(self) -> None:
        """Be told no more."""
        if self._remove is not None:
            self._remove()


class Decided:
    """What was decided about modules whose place matters, when they were met last.

    Attributes:
        by_module: By id: the module, the places it was chosen for or None, and the outermost module that
            it was in. ``False`` stands for a module that the program itself has put a kernel in, or taken
            one out.
    """

    def __init__(self) -> None:
        self.by_module: dict[int, tuple[ref[nn.Module], object, ref[nn.Module]]] = {}

    def set(self, module: nn.Module, chosen: object, outermost: nn.Module) -> None:
        """Remember what was decided while the module lives."""
        key = id(module)
        known = self.by_module

        def forget(gone: ref[nn.Module]) -> None:
            if key in known and known[key][0] is gone:
                del known[key]

        known[key] = (ref(module, forget), chosen, ref(outermost))

    def get(self, module: nn.Module, default: object) -> object:
        """What was decided; the default for a module that was not met."""
        known = self.by_module.get(id(module))
        return known[1] if known is not None and known[0]() is module else default

    def was_taken_out(self, module: nn.Module) -> bool:
        """Whether the model is gone in which it was decided about a module."""
        known = self.by_module.get(id(module))
        return known is not None and known[2]() is None


class Names:
    """The places of the modules of a model, worked out when they are first asked for.

    Args:
        model: Is only read.
        arrival: A parent, a name and the module that is about to stand there.
    """

    def __init__(self, model: nn.Module, arrival: Arrival | None = None) -> None:
        self._model = model
        self._arrival = arrival
        self._places: dict[int, list[Place]] | None = None
        self._arrived: dict[str, nn.Module | None] | None = None

    def of(self, module: nn.Module) -> list[Place]:
        """Every place of a module."""
        if self._places is None:
            self._places = {}
            for place in self._above(self._model, ()):
                self._walk(self._model, place, ())
        return self._places.get(id(module)) or [_alone(module)]

    @property
    def outermost(self) -> nn.Module:
        """The outermost module that the model is known to be in, or itself."""
        top, seen = self._model, set[int]()
        while id(top) not in seen:
            seen.add(id(top))
            parents = [reference() for reference in runtime.of(Parents).of.get(id(top), ())]
            top = next((parent for parent in parents if parent is not None), top)
        return top

    def _children(self, module: nn.Module) -> dict[str, nn.Module | None]:
        children: dict[str, nn.Module | None] = module._modules
        if self._arrival is not None and self._arrival[0] is module:
            if self._arrived is None:
                self._arrived = {**children, self._arrival[1]: self._arrival[2]}
            return self._arrived
        return children

    def _above(self, module: nn.Module, below: tuple[int, ...]) -> Iterator[Place]:
        """The places of a module in the models that it is known to be in; alone where it is in none."""
        found = False
        for reference in runtime.of(Parents).of.get(id(module), ()):
            parent = reference()
            if parent is None or id(parent) in below:
                continue
            for name, child in self._children(parent).items():
                if child is module:
                    for place in self._above(parent, (*below, id(module))):
                        found = True
                        yield _inside(place, name, self._numbered(parent), module)
        if not found:
            yield _alone(module)

    def _walk(self, module: nn.Module, place: Place, above: tuple[int, ...]) -> None:
        assert self._places is not None
        known = self._places.setdefault(id(module), [])
        if len(known) >= _MOST or id(module) in above:
            return
        known.append(place)
        children = self._children(module)
        numbered = self._numbered(module)
        for name, child in children.items():
            if child is not None:
                self._walk(child, _inside(place, name, numbered, child), (*above, id(module)))

    def _numbered(self, module: nn.Module) -> int:
        return sum(map(str.isdecimal, self._children(module)))


def _inside(place: Place, name: str, numbered: int, module: nn.Module) -> Place:
    cls = original_of(type(module))
    return place.wrapped(cls) if name in _WRAPPERS else place.within(name, numbered, cls)


def _alone(module: nn.Module) -> Place:
    return Place(owners=((original_of(type(module)),),))


def watch_places(
    decide: Callable[[nn.Module, Arrival], None], *, building: Callable[[], bool], owner: str, strict: bool
) -> None:
    """Decide anew about the modules inside each one that is put into another, from now on.

    Args:
        decide: Called with the module whose places have changed, and the arrival, before it is there.
        building: Whether a model is being constructed that is decided about as a whole at its end.
        owner: Who asks, for messages.
        strict: Let what it raises reach the program, instead of a warning.
    """

    def attached(parent: nn.Module, name: str, child: Any) -> None:
        if child is None:
            return
        try:
            runtime.of(Parents).add(child, parent)
            if not building():
                for top in (child, *_shifted(parent, name)):
                    decide(top, (parent, name, child))
        except Exception as error:
            subject = f"{name} of {type(parent).__module__}:{type(parent).__qualname__}"
            guard.failed(error, owner=owner, subject=subject, strict=strict)

    runtime.of(Parents).watch(attached)


def _shifted(parent: nn.Module, name: str) -> Iterator[nn.Module]:
    """The numbered modules of a parent that are in other places, as from the last, once it has one more."""
    if not name.isdecimal() or name in parent._modules:
        return
    before = sum(map(str.isdecimal, parent._modules))
    wheres = [entry.where for entry in runtime.registry.layer_targets] + [runtime.options.where]
    numbers = set[int]().union(*(where.shifted(before, before + 1) for where in wheres if where is not None))
    for number in numbers:
        sibling = parent._modules.get(str(number))
        if sibling is not None:
            yield sibling
