"""Watch for classes: each class below a root is asked about once, when it is first constructed.

By then its name stands for it, decorators have done their work, and the modules that have it under other
names have mostly come. The ``__init__`` that asks gives its place back before the first instance is made:
a class that nobody wants costs nothing from its second construction on; one that is wanted stays observed.

Neither torch nor transformers is imported by this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

from twinkle.hooks import guard
from twinkle.hooks.construction import (
    Init,
    families,
    family,
    hidden,
    hook_subclasses,
    is_observed,
    observed,
    put_back,
    unhook_subclasses,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from twinkle.hooks.construction import ConstructionWatch

__all__ = ["ClassWatch", "watch_classes"]


class ClassWatch:
    """Who asks about the classes below a root, and what became of each.

    Attributes:
        wanted: The classes whose constructions are reported.
    """

    def __init__(
        self,
        root: type,
        wants: Callable[[type], bool | None],
        callback: Callable[[Any], object],
        *,
        owner: str,
        strict: bool,
        instead: ConstructionWatch | None,
        but: Callable[[type], bool],
    ) -> None:
        self.wanted: WeakSet[type] = WeakSet()
        self._root = root
        self._wants = wants
        self._callback = callback
        self._owner = owner
        self._strict = strict
        self._instead = instead
        self._but = but
        self._settled: WeakSet[type] = WeakSet()
        self._fresh: list[ref[type]] = []
        self._active = True

    def begin(self) -> None:
        """Ask about the classes there are, and about those to come."""
        with families().lock:
            hook_subclasses(self._root, self._created)
            families().singles.append(self._constructed)
        for cls in list(family(self._root)):
            self._ask(cls)

    def cancel(self) -> None:
        """Ask no more; every class gets its own constructor back."""
        self._active = False
        with families().lock:
            if self._constructed in families().singles:
                families().singles.remove(self._constructed)
            unhook_subclasses(self._root, self._created)
            for cls in family(self._root):
                init = cls.__dict__.get("__init__")
                if type(init) is _Question or (type(init) is Init and cls in self.wanted):
                    put_back(cls, "__init__", None if _owner(init) is not None else _function(init))

    def wants(self, cls: type) -> bool:
        """Whether objects of a class are asked for, of which none was constructed perhaps."""
        if self._fresh:
            self._finish()
        if not self._but(cls):
            self._settle(cls)
        return cls in self.wanted

    def reconsider(self, root: type) -> None:
        """Ask again about a class and those derived from it: something new was registered or found."""
        for cls in list(family(root)):
            if cls not in self.wanted:
                self._settled.discard(cls)
                self._ask(cls)

    def forget(self, cls: type) -> None:
        """Report the constructions of a class no more."""
        with families().lock:
            self.wanted.discard(cls)
            init = cls.__dict__.get("__init__")
            if type(init) is Init and not is_observed(_function(init)):
                put_back(cls, "__init__", None if _owner(init) is not None else _function(init))

    def _created(self, cls: type) -> None:
        if not self._active or self._but(cls):
            return
        self._finish()
        if "__init__" in cls.__dict__:
            self._ask(cls)
            return
        # Decorators have not run yet, and its first construction begins in the constructor it inherits.
        self._fresh.append(ref(cls))
        for base in cls.__mro__[1:]:
            if "__init__" in base.__dict__:
                if issubclass(base, self._root) and base not in self.wanted:
                    self._settled.discard(base)
                    self._ask(base)
                return

    def _finish(self) -> None:
        """The classes that were new the last time have all their attributes by now."""
        fresh, self._fresh = self._fresh, []
        for reference in fresh:
            cls = reference()
            if cls is not None:
                self._ask(cls)

    def _ask(self, cls: type) -> None:
        """Ask about a class at its first construction; about one that inherits its constructor, now."""
        # TorchScript compiles the constructors of its own classes.
        if cls in self._settled or cls.__module__.startswith("torch.jit") or self._but(cls):
            return
        with families().lock:
            init = cls.__dict__.get("__init__")
            if type(init) is _Question:
                return
            if init is not None:
                question = _Question()
                Init.function.__set__(question, init)  # type: ignore[attr-defined]
                Init.owner.__set__(question, None)  # type: ignore[attr-defined]
                _Question.holder.__set__(question, ref(cls))  # type: ignore[attr-defined]
                _Question.watch.__set__(question, self)  # type: ignore[attr-defined]
                type.__setattr__(cls, "__init__", question)
                return
        # An __init__ of its own would be seen: by a dataclass decorator, which then makes none.
        self._settle(cls)

    def answer(self, question: _Question, kind: type) -> bool:
        """Settle the class that a constructor stands in, and that of the instance; whether to report it."""
        own: Any = kind.__dict__.get("__init__")
        if self._fresh:
            self._finish()
        holder = _holder(question)()
        if holder is not None:
            self._settle(holder)
        # Its own constructor is observed and did not run: where its construction ends nobody knows.
        past = kind is not holder and is_observed(own) and _owner(own) is None
        if kind is not holder:
            self._settle(kind)
        return kind in self.wanted and not past

    def _settle(self, cls: type) -> None:
        if cls in self._settled:
            return
        try:  # outside the lock: whatever looks at a class may import modules
            wanted = self._active and self._wants(cls)
        except Exception as error:
            subject = f"{cls.__module__}:{cls.__qualname__}"
            guard.failed(error, owner=self._owner, subject=subject, strict=self._strict)
            wanted = False
        with families().lock:
            if wanted is None or cls in self._settled:
                return
            self._settled.add(cls)
            init = cls.__dict__.get("__init__")
            if type(init) is _Question:
                init = _function(init)
                type.__setattr__(cls, "__init__", init)
            if wanted:
                self.wanted.add(cls)
                if not is_observed(init):
                    made = observed(cls.__init__, cls) if init is None else observed(init, None)  # type: ignore[misc]
                    type.__setattr__(cls, "__init__", made)

    def _constructed(self, instance: object, building: list[object]) -> None:
        if type(instance) not in self.wanted:
            return
        if self._instead is not None and any(map(self._instead.is_in, building)):
            return  # inside one that is reported as a whole
        try:
            self._callback(instance)
        except Exception as error:
            kind = type(instance)
            subject = f"{kind.__module__}:{kind.__qualname__}"
            guard.failed(error, owner=self._owner, subject=subject, strict=self._strict)


class _Question(Init):
    """An ``__init__`` that asks about its class, and gives its place back."""

    __slots__ = ("holder", "watch")

    @hidden
    def __call__(self, instance: Any, /, *arguments: Any, **keywords: Any) -> Any:
        if _watch(self).answer(self, type(instance)):
            return _call(self, instance, *arguments, **keywords)
        try:
            return _function(self).__get__(instance, type(instance))(*arguments, **keywords)
        except BaseException as error:
            # As Init does it: a bare raise adds no frame.
            if error.__traceback__ is not None:
                error.__traceback__ = error.__traceback__.tb_next
            raise


_call: Callable[..., Any] = Init.__call__
_function: Callable[[Init], Any] = Init.function.__get__  # type: ignore[attr-defined]
_owner: Callable[[Init], type | None] = Init.owner.__get__  # type: ignore[attr-defined]
_holder: Callable[[_Question], ref[type]] = _Question.holder.__get__  # type: ignore[attr-defined]
_watch: Callable[[_Question], ClassWatch] = _Question.watch.__get__  # type: ignore[attr-defined]


def watch_classes(
    root: type,
    wants: Callable[[type], bool | None],
    callback: Callable[[Any], object],
    *,
    owner: str = "",
    strict: bool = False,
    instead: ConstructionWatch | None = None,
    but: Callable[[type], bool] = lambda cls: False,
) -> ClassWatch:
    """Call ``callback(instance)`` at the end of the construction of each instance of a class that is wanted.

    Args:
        root: ``nn.Module``, say; it and every class below it are asked about.
        wants: Asked once about each class, in the thread that first constructs it, before it does; again
            at the next construction where the answer is None.
        callback: Called in the constructing thread; constructions in it are not reported.
        owner: Who asks, for messages.
        strict: Let what either raises leave the constructor, instead of a warning.
        instead: Instances inside one that this watch reports are left to it.
        but: Classes that nobody constructs, and that are left as they are.
    """
    watch = ClassWatch(root, wants, callback, owner=owner, strict=strict, instead=instead, but=but)
    watch.begin()
    return watch
