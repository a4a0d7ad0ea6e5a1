"""The two ways in which a module gets a kernel: a mark for its class's forward, or a class of its own.

With Twinkle's own kernels it is marked and keeps its class (:mod:`twinkle.swap.front`). A user's kernel
may have methods and constants and call ``super()``: its modules have a generated subclass, with another
``forward`` and nothing else. ``docs/decisions/0001-swap-mechanism.md`` has the figures behind the choice.
"""

from __future__ import annotations

import copyreg
import functools
import gc
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from twinkle import forks
from twinkle.errors import KernelError
from twinkle.match.reads import CHANGED
from twinkle.runtime import runtime
from twinkle.swap import instance
from twinkle.swap.candidate import Candidate
from twinkle.swap.class_tree import check_layout, core_of, rebase, set_class
from twinkle.swap.copies import Maker, reduced_as
from twinkle.swap.dispatch import Dispatch
from twinkle.swap.front import MARK, USERS, Front, dispatch_marked, new_mark, owner_of_forward
from twinkle.swap.members import adopt
from twinkle.swap.stand_ins import Marked, can_follow_mode
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from twinkle.fit.layer import LayerCompatibility
    from twinkle.swap.entry import Entry

__all__ = [
    "LayerDispatch",
    "Pin",
    "Pinned",
    "Swapped",
    "class_for",
    "dispatch_of",
    "drop",
    "front_for",
    "move",
    "original_of",
    "swap_out",
    "unpin",
]

Pin = tuple["bool | None", bool]
"""A mode that was asked for by name: (training, or None to look each time; compiling)."""


class _Classes:
    """The generated classes that some module or some dispatch still uses, by what they were made for.

    Modules that have one keep it, and all they need with it, when the runtime begins anew.
    """

    def __init__(self) -> None:
        self.lock = forks.lock()
        self.known: weakref.WeakValueDictionary[Any, type] = weakref.WeakValueDictionary()
        self.fronts: weakref.WeakKeyDictionary[type, weakref.ref[Front]] = weakref.WeakKeyDictionary()

    def front_of(self, core: type, owner: type) -> Front:
        """The front for a class, which stands already, was made for a plan, or is made now."""
        found = Front.of(core)
        if found is None and owner in self.fronts:
            found = self.fronts[owner]()
        if found is None or found.original is not own_forward(core):
            found = Front(owner)
            self.fronts[owner] = weakref.ref(found)
            for cls in list(self.known.values()):
                dispatch: LayerDispatch = vars(cls)["__twinkle__"]
                if dispatch.original is found.original:
                    dispatch.names["_tw_front"] = found.function
        return found


class Swapped:
    """Base of every generated class: copies keep the kernels, pickles name the original class.

    It has no ``__slots__``: Python would take it for the base that decides the layout, and an
    instance could not change to a class without a ``__dict__``.
    """

    __twinkle__: LayerDispatch

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Do nothing: a base that registers its subclasses must not hear of generated ones."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy as a swapped module, pickle as one of the original class: the file loads without Twinkle.

        There is no ``__deepcopy__`` or ``__copy__`` here: ``copy`` asks instances for these, and finds them
        through every wrapper that hands on attributes it does not know (PEFT's, ``OptimizedModule``).
        """
        cls, plain = type(self), original_of(type(self))
        reducer: Any = copyreg.dispatch_table.get(plain)
        value = reducer(self) if reducer is not None else super().__reduce_ex__(protocol)
        if isinstance(value, str):
            return value
        make, *rest = reduced_as(value, cls, plain)
        return (Maker(make, lambda twin: _as_swapped(twin, cls)), *rest)


class Pinned(Swapped):
    """A swap for a mode that was asked for by name: it holds until the module's mode is set."""

    def train(self, mode: bool = True) -> Any:
        """Set the module's mode, which the kernels follow from now on."""
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


class _Instances(dict[int, "weakref.ref[nn.Module]"]):
    """The modules of a dispatch, by id, and what the report has to say of them."""

    __slots__ = ("dispatch",)

    def __init__(self, dispatch: LayerDispatch) -> None:
        super().__init__()
        self.dispatch = weakref.ref(dispatch)

    def changed(self) -> str | None:
        """That the program has given the class another forward, where nothing of ours is called any more."""
        dispatch = self.dispatch()
        if not self or dispatch is None or dispatch.front is None:
            return None
        return None if dispatch.front.stands_in(dispatch.target) else f"its forward {CHANGED}"


def _forget(reference: Any) -> None:
    if reference.home.get(reference.key) is reference:
        del reference.home[reference.key]


class LayerDispatch(Dispatch, Marked):
    """The dispatch behind the ``forward`` of one generated class, or of the modules with one mark.

    Attributes:
        target: The original class.
        candidates: The kernels that were asked for, in order.
        pin: A mode that was asked for by name, or ``None``.
        functions: Every function that has stood as ``forward``.
        instances: The modules that have the class or the mark now, by id, without copies of marked ones.
        front: Of the marked modules' class; None where there is a generated class.
        mark: What modules are marked with.
        holders: How many references there are to the mark when no module has it.
    """

    training_text = "{}.training"
    # The program may give the class below another forward later, which is to run then.
    # There may be a function for marked modules around it: looking behind that takes 150 ns.
    standing = (
        "_tw_target.forward",
        "(_tw_target.forward is _tw_original or _tw_target.forward is _tw_front"
        " or _tw_own(_tw_target) is _tw_original)",
    )
    target: type[nn.Module]

    def __init__(
        self,
        target: type[nn.Module],
        candidates: tuple[Candidate, ...],
        pin: Pin | None,
        front: Front | None = None,
    ) -> None:
        self.target = target
        self.front = front
        own = all(candidate.kernel.source.kind == "embedded" for candidate in candidates)
        self.mark = new_mark("" if own else USERS)
        self.holders = 0
        self.candidates = candidates
        self.pin = pin
        self.cls: type | None = None
        self.functions: list[Any] = []
        self._members: dict[str, object] = {}
        self.instances = _Instances(self)
        if front is not None:  # whoever gives the class another forward takes that of the front out
            self.standing = ("_tw_original", "")
        training, compiling = pin if pin is not None else (None, False)
        original: Any = own_forward(target)
        super().__init__(original, candidates, training=training, compiling=compiling, skip=1)
        if front is not None:
            self.functions.append(front.function)

    def born(self, cls: type | None) -> None:
        """Take hold of the generated class, if there is one, and put in the kernels that are loaded."""
        self.cls = cls
        for entry in self.entries:
            assert isinstance(entry.candidate, Candidate)
            if entry.candidate.known_compatibility(self.target) is not None:
                self.prepare(entry, ())
        self.rebuild()

    def enter(self, modules: Sequence[nn.Module], wrappers: Sequence[type] = ()) -> None:
        """Give modules the mark, or the class, below the classes that torch generated on top."""
        if self.front is not None:
            self.front.add(self)
        cls = rebase(wrappers, self.target if self.cls is None else self.cls)
        for module in modules:
            if type(module) is not cls:
                set_class(module, cls)
            if self.front is not None:
                module.__dict__[MARK] = self.mark
        self.count(modules)
        for entry in self.entries:
            if entry.state == "new":
                entry.candidate.mark_pending()
            else:
                entry.candidate.mark_active()

    def count(self, modules: Sequence[nn.Module]) -> None:
        """Take modules for instances, also copies that came with the mark and were in no account."""
        for module in modules:
            if id(module) not in self.instances:
                self.instances[id(module)] = _Instance(module, self.instances)
        for candidate in self.candidates:
            candidate.binding.lives_in(self.instances)

    def leave(self, module: nn.Module) -> None:
        """Stop counting a module that no longer has the class, and take the mark from it."""
        if self.front is not None:
            module.__dict__.pop(MARK, None)
        self.instances.pop(id(module), None)

    @property
    def stands(self) -> Any:
        """The function that is ``forward`` for the modules."""
        return self.function if self.front is None else self.front.function

    def modules(self) -> list[nn.Module]:
        """The modules of this class that are alive."""
        found = [reference() for reference in list(self.instances.values())]
        return [module for module in found if module is not None]

    def copies(self) -> list[nn.Module]:
        """The modules, with copies of marked ones: the collector knows who holds the text (14 to 49 ms)."""
        found = self.modules()
        if self.front is None:
            return found
        holders = gc.get_referrers(self.mark)
        # An instance whose `__dict__` nobody asked for holds its values itself (Python 3.13).
        holders += gc.get_referrers(*(one for one in holders if isinstance(one, dict)))
        known = set(map(id, found))
        return found + [m for m in holders if isinstance(m, nn.Module) and id(m) not in known]

    def prepare(self, entry: Entry, args: tuple[Any, ...]) -> bool:
        """Load and check a kernel; instances it does not suit go to a class without it."""
        candidate = entry.candidate
        assert isinstance(candidate, Candidate)
        modules = [*args[:1], *self.modules()]
        compatibility = candidate.compatibility(self.target, modules)
        if compatibility is None or (self.cls is None and self.front is None):
            return False
        if self.front is not None and compatibility.needs_class:
            self._outgrow(candidate, compatibility, modules)
            return False
        with self.lock:
            clash = self._take(entry, compatibility) if entry.state == "new" else None
        if clash is not None:
            others = ", ".join(c.binding.kernel for c in self.candidates if c is not candidate)
            candidate.reject("failed", f"has a member {clash!r} that {others} has otherwise")
            return False
        suited = True
        for module in modules:
            problem = compatibility.problem_with(module)
            if problem is not None:
                drop(module, candidate, problem)
                suited = suited and not (args and module is args[0])
        if self.instances:
            candidate.mark_active()
        return suited

    def _outgrow(
        self, candidate: Candidate, kernel: LayerCompatibility, modules: Sequence[nn.Module]
    ) -> None:
        """Give the modules a generated class, which a kernel turned out to need; one may be a copy."""
        try:
            successor = class_for(self.target, self.candidates, self.pin)
        except TypeError as error:
            reason = f"it needs a class of its own, and {self.target.__name__} cannot be subclassed: {error}"
            candidate.fail(KernelError(reason))
            return
        if successor.front is not None:  # rejected by another thread meanwhile
            return
        for module in modules:
            problem = kernel.problem_with(module)
            if problem is not None:
                drop(module, candidate, problem)
        self.successor = successor
        self.hand_over(modules)

    def hand_over(self, modules: Sequence[Any]) -> int:
        """Give modules that have the mark to the successor; returns how many had it."""
        mine = [module for module in modules if isinstance(module, nn.Module) and dispatch_of(module) is self]
        assert isinstance(self.successor, LayerDispatch)
        for module in mine:  # one by one: torch may have made classes on top of some
            move((module,), self.successor)
        return len(mine)

    def succeeded(self, args: tuple[Any, ...]) -> Any:
        """What runs for a module since there is a successor, which has it from now on."""
        if self.hand_over(args[:1]) or not self.instances:
            assert self.front is not None
            self.front.let_go(self)
        now = dispatch_of(args[0]) if args and isinstance(args[0], nn.Module) else None
        return self.original if now is None or now is self else now.stands

    def unpin(self, module: nn.Module) -> None:
        """Let a module follow its own mode, where one was asked for by name."""
        if self.pin is not None:
            move((module,), class_for(self.target, self.candidates, None))

    def dress(self, twin: object) -> Any:
        """Give the mark to a copy that may have come without it; returns the copy."""
        if isinstance(twin, nn.Module):
            self.enter((twin,), core_of(type(twin))[1])
        return twin

    def _take(self, entry: Entry, kernel: LayerCompatibility) -> str | None:
        """Make a kernel's code part of the class; returns the name of a member that stands in the way."""
        cls = self.target if self.cls is None else self.cls
        taken = [
            name for name, value in kernel.members.items() if self._members.get(name, value) is not value
        ]
        names = {name: f"{name}__{entry.index}" for name in taken}
        try:
            members = {names.get(n, n): adopt(v, cls, names) for n, v in kernel.members.items()}
            function = adopt(kernel.forward, cls, names)
        except ValueError as error:
            return str(error)
        for name, value in members.items():
            if name not in self._members:
                self._members[name] = kernel.members.get(name, value)
                type.__setattr__(cls, name, value)
        entry.function = function
        entry.can_torch_compile = kernel.can_torch_compile
        entry.has_backward = kernel.has_backward
        entry.state = "ready"
        return None

    def is_training(self, args: tuple[Any, ...]) -> bool:
        """Whether the module that is called is in training mode."""
        return bool(args[0].training)

    def rebuilt(self) -> None:
        """Write the function of the marked modules' class anew, or put this one in the generated class."""
        if self.front is not None and self in self.front.slots:
            self.front.rewrite()
        if self.cls is None:
            return
        function: Any = self.function
        if function not in self.functions:
            self.functions.append(function)
        if vars(self.cls).get("forward") is not function:
            type.__setattr__(self.cls, "forward", function)


def class_for(core: type[nn.Module], candidates: tuple[Candidate, ...], pin: Pin | None) -> LayerDispatch:
    """Generate the class over ``core``, or find it: one for all modules with the same candidates and pin.

    Raises:
        TypeError: The class cannot be subclassed.
    """
    key = (core, own_forward(core), candidates, pin)
    classes = runtime.of(_Classes)
    with classes.lock:
        owner = None if _needs_class(core, candidates, pin) else owner_of_forward(core)
        if owner is not None:
            return _marking(core, candidates, pin, classes.front_of(core, owner))
        known = classes.known.get(key)
        if known is not None:
            dispatch: LayerDispatch = vars(known)["__twinkle__"]
            return dispatch
        dispatch = LayerDispatch(core, candidates, pin)
        standing = Front.of(core)
        if standing is not None:
            dispatch.names["_tw_front"] = standing.function
        space: dict[str, Any] = {
            "__module__": core.__module__,
            "__qualname__": core.__qualname__,
            "__doc__": core.__doc__,
            "__annotations__": dict(vars(core).get("__annotations__", {})),
            "__twinkle__": dispatch,
            "forward": dispatch.function,
        }
        for name in ("__deepcopy__", "__copy__"):
            if hasattr(core, name):
                space[name] = _copying(getattr(core, name))
        if "__firstlineno__" in vars(core):
            space["__firstlineno__"] = vars(core)["__firstlineno__"]
        meta: Any = type(core)
        cls: type = meta(core.__name__, (Swapped if pin is None else Pinned, core), space)
        check_layout(core, cls)
        dispatch.born(cls)
        classes.known[key] = cls
        return dispatch


def front_for(core: type[nn.Module]) -> Front | None:
    """The front for the forward of a class, whether it stands there or not; None where none can stand."""
    classes = runtime.of(_Classes)
    with classes.lock:
        owner = owner_of_forward(core)
        return None if owner is None else classes.front_of(core, owner)


def _needs_class(core: type[nn.Module], candidates: tuple[Candidate, ...], pin: Pin | None) -> bool:
    """Whether modules need a generated class, as far as that is known: some kernels are not loaded yet."""
    if pin is not None and not can_follow_mode(core):
        return True
    known = (c.known_compatibility(core) for c in candidates if c.rejected is None)
    return any(kernel is not None and kernel.needs_class for kernel in known)


def _marking(
    core: type[nn.Module], candidates: tuple[Candidate, ...], pin: Pin | None, front: Front
) -> LayerDispatch:
    """The dispatch for marked modules: one for all with the same class, candidates and pin."""
    key = core, candidates, pin
    dispatch = front.made.get(key)
    if dispatch is None:
        dispatch = front.made[key] = LayerDispatch(core, candidates, pin, front)
        dispatch.born(None)
    return dispatch


def original_of(cls: type) -> type:
    """The class a module would have without Twinkle."""
    core, wrappers = core_of(cls)
    dispatch = vars(core).get("__twinkle__")
    return rebase(wrappers, dispatch.target) if dispatch is not None else cls


def _copying(copying: Any) -> Any:
    """A class's own way of copying, whose copies keep the kernels."""

    @functools.wraps(copying)
    def method(self: Any, *args: Any) -> Any:
        return _as_swapped(copying(self, *args), type(self))

    return method


def _as_swapped(twin: Any, cls: type) -> Any:
    """A copy with the kernels of ``cls``, also where the class's own way of copying gave the original."""
    if isinstance(twin, nn.Module) and type(twin) in (cls, original_of(cls)):
        core, wrappers = core_of(cls)
        vars(core)["__twinkle__"].enter((twin,), wrappers)
    return twin


def swap_out(module: nn.Module) -> bool:
    """Restore a module; false when it was not swapped."""
    dispatch = dispatch_of(module)
    if dispatch is None:
        return False
    if dispatch.front is None:
        set_class(module, original_of(type(module)))
    dispatch.leave(module)
    stands = Front.of(dispatch.target)
    if stands is not None:
        stands.let_go()
        stands = Front.of(dispatch.target)
    instance.rebind(module, dispatch.functions, dispatch.original if stands is None else stands.function)
    return True


def unpin(module: nn.Module) -> None:
    """Let a module that was swapped for a mode asked for by name follow its own mode."""
    dispatch = dispatch_of(module)
    if dispatch is not None:
        dispatch.unpin(module)


def drop(module: nn.Module, candidate: Candidate, why: str) -> None:
    """Take one candidate out of one module.

    Args:
        module: A swapped module.
        candidate: One of its candidates.
        why: The reason, for the report.
    """
    dispatch = dispatch_of(module)
    candidate.binding.note(why)
    if dispatch is None or candidate not in dispatch.candidates:
        return
    left = tuple(c for c in dispatch.candidates if c != candidate)
    if left:
        move((module,), class_for(dispatch.target, left, dispatch.pin))
    else:
        swap_out(module)


def dispatch_of(module: nn.Module) -> LayerDispatch | None:
    """The dispatch of a swapped module; ``None`` for another module."""
    # The class is found by inheritance also below what torch generated on top.
    found: LayerDispatch | None = getattr(type(module), "__twinkle__", None)
    return dispatch_marked(module) if found is None else found


def move(modules: Sequence[nn.Module], dispatch: LayerDispatch) -> None:
    """Give modules of one class the class of a dispatch."""
    now = dispatch_of(modules[0])
    front = Front.of(dispatch.target)
    functions = [dispatch.original, *(now.functions if now is not None else ()), *dispatch.functions]
    functions += [front.function] if front is not None else []
    _, wrappers = core_of(type(modules[0]))
    if now is not None:
        for module in modules:
            now.leave(module)
    dispatch.enter(modules, wrappers)
    for module in modules:
        instance.rebind(module, functions, dispatch.stands)
    if now is not None and now.front is not None and now.front is not dispatch.front:
        now.front.let_go()
