"""Watch for models: a callback runs at the end of the construction of an instance.

Every ``__init__`` in the family of a watched class is observed: those there are, and those of the
classes that are defined later. The outermost one that runs for an instance ends its construction,
so whatever a subclass does after ``super().__init__()`` is done by then.

Neither torch nor transformers is imported by this module.
"""

from __future__ import annotations

import operator
from _thread import _local
from types import FunctionType, MethodType

from twinkle import forks
from twinkle.hooks import guard
from twinkle.hooks.finder import own_dict
from twinkle.hooks.imports import watch_module
from twinkle.runtime import runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType
    from typing import Any, TypeVar

    from twinkle.hooks.imports import Watch

    _F = TypeVar("_F", bound=Callable[..., Any])

__all__ = [
    "ConstructionWatch",
    "Families",
    "Init",
    "SubclassHook",
    "families",
    "family",
    "hidden",
    "hook_subclasses",
    "is_observed",
    "observed",
    "put_back",
    "under_construction",
    "unhook_subclasses",
    "unobserved",
    "watch_class",
    "watch_pretrained",
    "watched_classes",
]

# The stacklevel of warnings skips frames whose file name holds "importlib" and "_bootstrap": a
# constructor that warns its caller still points at its caller.
_FILE = "<twinkle.hooks.construction, hidden as importlib._bootstrap is>"


def hidden(function: _F) -> _F:
    """The function, as one of the import system's in tracebacks and warnings."""
    function.__code__ = function.__code__.replace(co_filename=_FILE)
    return function


class ConstructionWatch:
    """A callback and the family of classes it waits for.

    Attributes:
        owner: Who asks, in words, for messages.
        outermost: Instances inside another one of the family do not count.
        strict: What the callback raises leaves the constructor.
    """

    def __init__(
        self, callback: Callable[[Any], object], *, owner: str, outermost: bool, strict: bool
    ) -> None:
        self.owner = owner
        self.outermost = outermost
        self.strict = strict
        self._callback = callback
        self._active = True
        self._roots: list[type] = []
        self._import: Watch | None = None

    def cancel(self) -> None:
        """Do not call back any more; the classes that no other watch needs get their own back."""
        self._active = False
        if self._import is not None:
            self._import.cancel()
        while self._roots:
            _release(self._roots.pop(), self)

    def is_in(self, instance: object) -> bool:
        """Whether an instance is of one of the families."""
        return any(isinstance(instance, root) for root in self._roots)

    def is_family(self, cls: type) -> bool:
        """Whether a class is of one of the families."""
        return any(issubclass(cls, root) for root in self._roots)

    def observe(self, root: type) -> None:
        """Call back for instances of ``root`` too."""
        if self._active and root not in self._roots:
            self._roots.append(root)
            _observe(root, self)

    def run(self, instance: object) -> None:
        """Call back; unless strict, what the callback raises does not leave this method."""
        try:
            self._callback(instance)
        except Exception as error:
            kind = type(instance)
            subject = f"{kind.__module__}:{kind.__qualname__}"
            guard.failed(error, owner=self.owner, subject=subject, strict=self.strict)


def watch_class(
    cls: type, callback: Callable[[Any], object], *, owner: str = "", strict: bool = False
) -> ConstructionWatch:
    """Call ``callback(instance)`` at the end of the construction of each instance of ``cls``.

    Instances of subclasses count, and so do instances inside others. A subclass whose ``__init__``
    is put there after the class statement (by a class decorator) is noticed at its first instance,
    for which the callback runs at the end of the ``__init__`` that it inherits.

    Args:
        cls: Any class written in Python.
        callback: Called in the constructing thread; constructions in it are not reported.
        owner: Who asks, for messages.
        strict: Let what the callback raises leave the constructor, instead of a warning.

    Raises:
        TypeError: ``cls`` is no class, or one whose attributes cannot be set.
    """
    if not isinstance(cls, type):
        raise TypeError(f"expected a class, found {cls!r}")
    watch = ConstructionWatch(callback, owner=owner, outermost=False, strict=strict)
    watch.observe(cls)
    return watch


def watch_pretrained(
    callback: Callable[[Any], object], *, owner: str = "", strict: bool = False
) -> ConstructionWatch:
    """Call ``callback(model)`` at the end of the construction of each transformers model.

    The outermost ``PreTrainedModel`` counts, once, whichever way it is built; the models inside it
    are reached through it. ``from_pretrained`` constructs first and loads the weights afterwards,
    so the model may be on ``meta``. transformers is not imported: the watch begins when it is.

    Args:
        callback: Called in the constructing thread; constructions in it are not reported.
        owner: Who asks, for messages.
        strict: Let what the callback raises leave the constructor, instead of a warning.
    """
    watch = ConstructionWatch(callback, owner=owner, outermost=True, strict=strict)

    def arrived(module: ModuleType, name: str) -> None:
        watch.observe(own_dict(module)["PreTrainedModel"])

    watch._import = watch_module("transformers.modeling_utils", arrived, owner=owner)
    return watch


class _Thread(_local):
    """What a thread is constructing, and whether it is in a callback."""

    def __init__(self) -> None:
        self.building: dict[int, object] = {}
        self.reporting = False


_thread = _Thread()


def under_construction() -> list[object]:
    """What the constructors that are observed are making now, in this thread."""
    return list(_thread.building.values())


class Families:
    """Who watches which family of classes."""

    def __init__(self) -> None:
        self.lock = forks.lock()
        self.watches: dict[type, tuple[ConstructionWatch, ...]] = {}
        # Asked at the end of each observed construction: those of single classes, without their families.
        self.singles: list[Callable[[object, list[object]], None]] = []

    def close(self) -> None:
        """Cancel every watch: all classes get their own constructors back."""
        for watches in list(self.watches.values()):
            for watch in watches:
                watch.cancel()


def families() -> Families:
    """Those of this process."""
    return runtime.of(Families)


def watched_classes() -> tuple[type, ...]:
    """The classes whose families are watched now."""
    return tuple(families().watches)


def is_observed(function: object) -> bool:
    """Whether that is an ``__init__`` that was put around a class's own to observe it."""
    return issubclass(type(function), Init)


def unobserved(function: Any) -> Any:
    """The ``__init__`` of a class itself, below all that was put around it to observe it."""
    while is_observed(function):
        function = _function(function)
    return function


class Init:
    """An ``__init__`` that is observed.

    It is its original in all that can be read or set: signature, annotations with the globals they
    refer to, source, documentation. There is no ``__wrapped__`` by which others could strip it,
    and pickling it by value (as cloudpickle does with the classes of ``__main__``) pickles the
    original.
    """

    __slots__ = ("function", "owner")

    @hidden
    def __call__(self, instance: Any, /, *arguments: Any, **keywords: Any) -> Any:
        """Construct, and report the instance at the end of the outermost constructor that is observed."""
        building = _thread.building
        key = id(instance)
        outermost = key not in building
        if outermost:
            building[key] = instance
        try:
            function = _function(self)
            owner: Any = _owner(self)
            if owner is not None:
                result = super(owner, instance).__init__(*arguments, **keywords)
            elif type(function) is FunctionType:
                result = function(instance, *arguments, **keywords)
            else:
                result = function.__get__(instance, type(instance))(*arguments, **keywords)
        except BaseException as error:
            # A bare raise adds no frame: cutting ours here leaves none (from Python 3.11 on).
            if error.__traceback__ is not None:
                error.__traceback__ = error.__traceback__.tb_next
            raise
        finally:
            if outermost:
                building.pop(key, None)
        if outermost:
            _constructed(instance, building)
        return result

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __getattribute__(self, name: str) -> Any:
        if name in ("__call__", "__get__", "__reduce_ex__"):
            return object.__getattribute__(self, name)
        return getattr(_function(self), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(_function(self), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(_function(self), name)

    def __repr__(self) -> str:
        return repr(_function(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__qualname__  # by reference, like any function


_function: Callable[[Init], Any] = Init.function.__get__  # type: ignore[attr-defined]
_owner: Callable[[Init], type | None] = Init.owner.__get__  # type: ignore[attr-defined]


def observed(function: Any, owner: type | None) -> Init:
    """An observed ``__init__``; with an owner, that class had none and inherits ``function``."""
    init = Init()
    Init.function.__set__(init, function)  # type: ignore[attr-defined]
    Init.owner.__set__(init, owner)  # type: ignore[attr-defined]
    return init


class SubclassHook:
    """An ``__init_subclass__`` that also tells of the new class."""

    __slots__ = ("created", "original", "owner")

    def __init__(self, owner: Any, original: Any, created: Callable[[type], object]) -> None:
        self.owner = owner
        self.original = original
        self.created = created

    def __get__(self, instance: object, cls: type | None = None) -> Any:
        return MethodType(self, cls if cls is not None else type(instance))

    @hidden
    def __call__(self, cls: Any, /, **keywords: Any) -> None:
        """Initialize a new class, then tell of it."""
        try:
            if self.original is None:
                super(self.owner, cls).__init_subclass__(**keywords)
            else:
                self.original.__get__(None, cls)(**keywords)
        except BaseException as error:
            if error.__traceback__ is not None:
                error.__traceback__ = error.__traceback__.tb_next
            raise
        self.created(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.original is None:
            return getattr, (object, "__init_subclass__")
        return operator.itemgetter(0), ((self.original,),)


def hook_subclasses(root: type, created: Callable[[type], object]) -> None:
    """Tell of each class that is defined below a root from now on; called under the lock of the families."""
    own = root.__dict__.get("__init_subclass__")
    type.__setattr__(root, "__init_subclass__", SubclassHook(root, own, created))


def unhook_subclasses(root: type, created: Callable[[type], object]) -> None:
    """Tell it no more; others that were hooked before or after it stay."""
    above: SubclassHook | None = None
    hook = root.__dict__.get("__init_subclass__")
    while type(hook) is SubclassHook and hook.created != created:
        above, hook = hook, hook.original
    if type(hook) is SubclassHook and above is not None:
        above.original = hook.original
    elif type(hook) is SubclassHook:
        put_back(root, "__init_subclass__", hook.original)


def _constructed(instance: object, building: dict[int, object]) -> None:
    kind = type(instance)
    watches = families().watches
    if not is_observed(kind.__init__):
        # An __init__ that was put there after the class statement ran around the observed one.
        for cls in kind.__mro__:
            if any(root in cls.__mro__ for root in watches):
                _instrument(cls)
    ready = [
        watch
        for root in kind.__mro__
        for watch in watches.get(root, ())
        if not (watch.outermost and any(isinstance(other, root) for other in building.values()))
    ]
    singles = families().singles
    if not (ready or singles) or _thread.reporting:
        return
    _thread.reporting = True
    try:
        for watch in ready:
            watch.run(instance)
        for single in singles:
            single(instance, list(building.values()))
    finally:
        _thread.reporting = False


def _observe(root: type, watch: ConstructionWatch) -> None:
    state = families()
    with state.lock:
        if root not in state.watches:
            if "__init__" not in root.__dict__:
                type.__setattr__(root, "__init__", observed(root.__init__, root))  # type: ignore[misc]
            hook_subclasses(root, _instrument)
            for cls in family(root):
                _instrument(cls)
        state.watches[root] = (*state.watches.get(root, ()), watch)


def _release(root: type, watch: ConstructionWatch) -> None:
    state = families()
    with state.lock:
        left = tuple(one for one in state.watches.get(root, ()) if one is not watch)
        if left:
            state.watches[root] = left
            return
        state.watches.pop(root, None)
        unhook_subclasses(root, _instrument)
        for cls in family(root):
            init: Any = cls.__dict__.get("__init__")
            if not is_observed(init) or any(other in state.watches for other in cls.__mro__):
                continue
            if type(init) is Init:
                put_back(cls, "__init__", None if _owner(init) is not None else _function(init))
            elif is_observed(_function(init)):
                Init.function.__set__(init, _function(_function(init)))  # type: ignore[attr-defined]


def put_back(cls: type, name: str, original: object) -> None:
    """Give a class its own attribute back, or none where it had none."""
    if original is None:
        type.__delattr__(cls, name)
    else:
        type.__setattr__(cls, name, original)


def _instrument(cls: type) -> None:
    """Have the ``__init__`` that the class itself defines observed."""
    init = cls.__dict__.get("__init__")
    if init is None:
        return
    if not is_observed(init):
        type.__setattr__(cls, "__init__", observed(init, None))
    elif type(init) is not Init and _owner(init) is None and not is_observed(_function(init)):
        # Beneath one that gives its place back at the first construction.
        Init.function.__set__(init, observed(_function(init), None))  # type: ignore[attr-defined]


def family(root: type) -> Iterator[type]:
    """The class and every class derived from it, each once."""
    seen = {root}
    waiting = [root]
    while waiting:
        cls = waiting.pop()
        yield cls
        children: list[type] = type.__subclasses__(cls)
        for child in children:
            if child not in seen:
                seen.add(child)
                waiting.append(child)
