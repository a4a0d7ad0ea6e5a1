"""The class a swapped module has: a subclass of its own, with another ``forward`` and nothing else.

Nothing is kept in the instance, so there is no residue in its ``__dict__`` or ``state_dict`` and no
reference cycle. ``docs/decisions/0001-swap-mechanism.md`` has the figures behind the choice.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from twinkle.fit.layer import LayerFit
from twinkle.swap.candidate import Candidate
from twinkle.swap.dispatch import Dispatch
from twinkle.swap.entry import Entry
from twinkle.swap.members import adopt

__all__ = [
    "LayerDispatch",
    "Pin",
    "Pinned",
    "Swapped",
    "class_for",
    "core_of",
    "original_of",
    "rebase",
    "set_class",
]

_lock = threading.RLock()
_classes: weakref.WeakValueDictionary[Any, type] = weakref.WeakValueDictionary()
_rebased: weakref.WeakValueDictionary[Any, type] = weakref.WeakValueDictionary()

Pin = tuple["bool | None", bool]  # (training, or None to look each time; compiling)


class Swapped:
    """What every generated class adds to the original.

    It has no ``__slots__``: Python would take it for the base that decides the layout, and an
    instance could not change to a class without a ``__dict__``.
    """

    __twinkle__: LayerDispatch

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Nothing: a base that registers its subclasses must not hear of generated ones."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as an instance of the original class, so that the file loads without Twinkle."""
        plain = original_of(type(self))
        reducer: Any = copyreg.dispatch_table.get(plain)
        if reducer is not None:
            return reducer(self)
        return _without(super().__reduce_ex__(protocol), type(self), plain)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        inherited = getattr(super(), "__deepcopy__", None)
        twin = inherited(memo) if inherited is not None else _clone(self, super().__reduce_ex__, memo)
        return _as_swapped(twin, type(self))

    def __copy__(self) -> Any:
        inherited = getattr(super(), "__copy__", None)
        twin = inherited() if inherited is not None else _clone(self, super().__reduce_ex__, None)
        return _as_swapped(twin, type(self))


class Pinned(Swapped):
    """A swap for a mode that was asked for by name: it holds until the module's mode is set."""

    def train(self, mode: bool = True) -> Any:
        """Follow the module from now on."""
        from twinkle.swap.layers import unpin

        unpin(self)
        return self.train(mode)


class _Instance(weakref.ref[nn.Module]):
    """A weak reference that takes itself out of its dict; no closure, for there may be many."""

    __slots__ = ("home", "key")

    home: dict[int, Any]
    key: int

    def __new__(cls, module: nn.Module, home: dict[int, Any]) -> _Instance:
        self = super().__new__(cls, module, _forget)
        self.key = id(module)
        self.home = home
        return self

    def __init__(self, module: nn.Module, home: dict[int, Any]) -> None:
        super().__init__(module, _forget)  # type: ignore[call-arg]


def _forget(reference: Any) -> None:
    if reference.home.get(reference.key) is reference:
        del reference.home[reference.key]


class LayerDispatch(Dispatch):
    """The choice behind the ``forward`` of one generated class.

    Attributes:
        target: The original class.
        candidates: What was asked for, in order.
        pin: A mode that was asked for by name, or ``None``.
        functions: Every function that has stood as ``forward``.
        instances: The modules that have the class now, by id.
    """

    training_text = "self.training"

    def __init__(self, target: type[nn.Module], candidates: tuple[Candidate, ...], pin: Pin | None) -> None:
        self.target = target
        self.candidates = candidates
        self.pin = pin
        self.cls: type | None = None
        self.functions: list[Any] = []
        self._members: dict[str, object] = {}
        self.instances: dict[int, weakref.ref[nn.Module]] = {}
        training, compiling = pin if pin is not None else (None, False)
        super().__init__(target.forward, candidates, training=training, compiling=compiling, skip=1)

    def born(self, cls: type) -> None:
        """The class exists: kernels that are known already take their place in it."""
        self.cls = cls
        for entry in self.entries:
            assert isinstance(entry.candidate, Candidate)
            if entry.candidate.known_fit(self.target) is not None:
                self.prepare(entry, ())
        self.rebuild()

    def enter(self, modules: Sequence[nn.Module], wrappers: Sequence[type] = ()) -> None:
        """Modules have the class from now on, below the classes that torch generated on top."""
        assert self.cls is not None
        cls, instances = rebase(wrappers, self.cls), self.instances
        for module in modules:
            set_class(module, cls)
            instances[id(module)] = _Instance(module, instances)
        for candidate in self.candidates:
            candidate.binding.count(len(modules))
        for entry in self.entries:
            if entry.state == "new":
                entry.candidate.mark_pending()
            else:
                entry.candidate.mark_active()

    def leave(self, module: nn.Module) -> None:
        """A module no longer has the class."""
        if self.instances.pop(id(module), None) is not None:
            for candidate in self.candidates:
                candidate.binding.count(-1)

    def modules(self) -> list[nn.Module]:
        """The modules of this class that are alive."""
        found = [reference() for reference in list(self.instances.values())]
        return [module for module in found if module is not None]

    def prepare(self, entry: Entry, args: tuple[Any, ...]) -> bool:
        """Load and check a kernel; instances it does not suit go to a class without it."""
        candidate = entry.candidate
        assert isinstance(candidate, Candidate)
        modules = [*args[:1], *self.modules()]
        fit = candidate.fit(self.target, modules)
        if fit is None or self.cls is None:
            return False
        with self.lock:
            clash = self._take(entry, fit) if entry.state == "new" else None
        if clash is not None:
            others = ", ".join(c.binding.kernel for c in self.candidates if c is not candidate)
            candidate.reject("failed", f"has a member {clash!r} that {others} has otherwise")
            return False
        suited = True
        for module in modules:
            problem = fit.problem_with(module)
            if problem is not None:
                from twinkle.swap.layers import drop

                drop(module, candidate, problem)
                suited = suited and not (args and module is args[0])
        if self.instances:
            candidate.mark_active()
        return suited

    def _take(self, entry: Entry, fit: LayerFit) -> str | None:
        """Make a kernel's code part of the class; the member that stands in the way, if one does."""
        cls = self.cls
        assert cls is not None
        taken = [name for name, value in fit.members.items() if self._members.get(name, value) is not value]
        names = {name: f"{name}__{entry.index}" for name in taken}
        try:
            members = {names.get(n, n): adopt(v, cls, names) for n, v in fit.members.items()}
            function = adopt(fit.forward, cls, names)
        except ValueError as error:
            return str(error)
        for name, value in members.items():
            if name not in self._members:
                self._members[name] = fit.members.get(name, value)
                type.__setattr__(cls, name, value)
        entry.function = function
        entry.can_torch_compile = fit.can_torch_compile
        entry.has_backward = fit.has_backward
        entry.same_signature = fit.same_signature
        entry.state = "ready"
        return None

    def is_training(self, args: tuple[Any, ...]) -> bool:
        """What the module says."""
        return bool(args[0].training)

    def subject(self, args: tuple[Any, ...]) -> tuple[nn.Module | None, type | None]:
        """The module itself, and the class it had."""
        return args[0], self.target

    def alike(self) -> list[nn.Module]:
        """The modules of this class."""
        return self.modules()

    def trace_arguments(self) -> tuple[Any, ...]:
        """Some module, so that its attributes can be checked."""
        return tuple(self.modules()[:1])

    def rebuilt(self, only: Entry | None) -> None:
        """Put the kernel itself in the class where it takes every call: not even a call is lost."""
        if self.cls is None:
            return
        function: Any = self.function
        if only is not None and only.same_signature:
            function = only.function
        elif all(entry.candidate.rejected is not None for entry in self.entries):
            function = self.original
        if function not in self.functions:
            self.functions.append(function)
        if vars(self.cls).get("forward") is not function:
            type.__setattr__(self.cls, "forward", function)


def class_for(core: type[nn.Module], candidates: tuple[Candidate, ...], pin: Pin | None) -> LayerDispatch:
    """The generated class over ``core``, one for all modules with the same candidates and pin."""
    key = (core, core.forward, candidates, pin)
    with _lock:
        known = _classes.get(key)
        if known is not None:
            dispatch: LayerDispatch = vars(known)["__twinkle__"]
            return dispatch
        dispatch = LayerDispatch(core, candidates, pin)
        space: dict[str, Any] = {
            "__module__": core.__module__,
            "__qualname__": core.__qualname__,
            "__doc__": core.__doc__,
            "__annotations__": dict(vars(core).get("__annotations__", {})),
            "__twinkle__": dispatch,
            "forward": dispatch.function,
        }
        if "__firstlineno__" in vars(core):
            space["__firstlineno__"] = vars(core)["__firstlineno__"]
        meta: Any = type(core)
        cls: type = meta(core.__name__, (Swapped if pin is None else Pinned, core), space)
        _check_layout(core, cls)
        dispatch.born(cls)
        _classes[key] = cls
        return dispatch


def set_class(module: nn.Module, cls: type) -> None:
    """Change the class of a module so that compiled code hears of it."""
    object.__setattr__(module, "__class__", cls)
    if "torch._dynamo" in sys.modules:
        # Dynamo passes over the checks of a module whose `__dict__` has not been touched (torch 2.11:
        # a model compiled before the swap went on with the originals).
        module.__dict__["_twinkle"] = None
        del module.__dict__["_twinkle"]


def _check_layout(core: type, cls: type) -> None:
    """Raise ``TypeError`` now if instances of ``core`` cannot be given the class."""
    if hasattr(core, "__del__"):
        return
    try:
        probe: Any = object.__new__(core)
    except TypeError:
        return
    object.__setattr__(probe, "__class__", cls)


def core_of(cls: type) -> tuple[type, list[type]]:
    """The class below those that torch generated on top (FSDP2, parametrize), and these, outermost first."""
    wrappers: list[type] = []
    while cls.__module__.startswith("torch.") and cls.__bases__:
        below = cls.__bases__[-1]
        if cls.__name__ not in (f"{prefix}{below.__name__}" for prefix in _WRAPPERS):
            break
        wrappers.append(cls)
        cls = below
    return cls, wrappers


_WRAPPERS = ("FSDP", "Replicate", "Parametrized")


def rebase(wrappers: Sequence[type], core: type) -> type:
    """Classes that torch generated, over another core."""
    for wrapper in reversed(wrappers):
        below = wrapper.__bases__[-1]
        if below is core:
            core = wrapper
            continue
        core = _over(wrapper, core)
    return core


def _over(wrapper: type, core: type) -> type:
    source = vars(wrapper).get("__twinkle_source__")
    if source is not None and source.__bases__[-1] is core:
        found: type = source
        return found
    with _lock:
        known = _rebased.get((wrapper, core)) or _known_to_fsdp(wrapper, core)
        if known is None:
            space = {
                k: v for k, v in vars(wrapper).items() if k not in ("__dict__", "__weakref__", "__doc__")
            }
            if not hasattr(core, "__twinkle__"):
                space.pop("__twinkle_source__", None)
            else:
                space["__twinkle_source__"] = source or wrapper
            known = type(wrapper)(wrapper.__name__, (*wrapper.__bases__[:-1], core), space)
            _rebased[wrapper, core] = known
        return known


def _known_to_fsdp(wrapper: type, core: type) -> type | None:
    """The class that ``fully_shard`` itself made for ``core``, where it keeps them."""
    module = sys.modules.get("torch.distributed.fsdp._fully_shard._fully_shard")
    made = getattr(module, "cls_to_fsdp_cls", {})
    found: type | None = made.get(core)
    return found if found is not None and found.__bases__[:-1] == wrapper.__bases__[:-1] else None


def original_of(cls: type) -> type:
    """The class a module would have without Twinkle."""
    core, wrappers = core_of(cls)
    dispatch = vars(core).get("__twinkle__")
    return rebase(wrappers, dispatch.target) if dispatch is not None else cls


def _as_swapped(twin: Any, cls: type) -> Any:
    """A copy keeps the kernel, also where the class's own way of copying names the original class."""
    if isinstance(twin, nn.Module) and type(twin) in (cls, original_of(cls)):
        core, wrappers = core_of(cls)
        vars(core)["__twinkle__"].enter((twin,), wrappers)
    return twin


def _clone(module: Any, reduce: Any, memo: dict[int, Any] | None) -> Any:
    """``copy.copy`` (no memo) or ``copy.deepcopy`` by way of what the class says of its state."""

    def through(value: Any) -> Any:
        return value if memo is None else copy.deepcopy(value, memo)

    if "parametrizations" in module._modules:
        # torch refuses to reduce parametrized modules, and copies them like this itself.
        value: Any = (copyreg.__newobj__, (type(module),), dict(module.__dict__))  # type: ignore[attr-defined]
    else:
        value = reduce(4)
    if isinstance(value, str):
        return module
    parts: list[Any] = [*value, None, None, None, None]
    make, arguments, state, items, pairs, setter = parts[:6]
    twin = make(*through(arguments))
    if memo is not None:
        memo[id(module)] = twin
    if state is not None:
        state = through(state)
        if setter is not None:
            setter(twin, state)
        elif hasattr(twin, "__setstate__"):
            twin.__setstate__(state)
        else:
            state, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
            twin.__dict__.update(state or {})
            for name, slot in (slots or {}).items():
                setattr(twin, name, slot)
    for item in items or ():
        twin.append(through(item))
    for key, item in pairs or ():
        twin[through(key)] = through(item)
    return twin


def _without(value: Any, cls: type, plain: Any) -> Any:
    """What ``__reduce_ex__`` gave, with the original class in the place of ours."""
    if isinstance(value, str):
        return value
    make, arguments, *rest = value
    arguments = tuple(plain if argument is cls else argument for argument in arguments)
    if make is cls:
        make = plain
    name = getattr(make, "__name__", "")
    # Pickle's own opcodes for these two insist on the class that the object has.
    if name == "__newobj__":
        if plain.__new__ is object.__new__ and len(arguments) == 1:
            make, arguments = copyreg._reconstructor, (plain, object, None)  # type: ignore[attr-defined]
        else:
            make = plain.__new__
    elif name == "__newobj_ex__":
        make, arguments = functools.partial(plain.__new__, plain, *arguments[1], **arguments[2]), ()
    return (make, arguments, *rest)
