"""The finder of ours in ``sys.meta_path``: it sees a watched module come in and says when it is loaded.

It finds nothing itself. For a watched name it asks the finders behind it and observes the spec that
they give. Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

import _frozen_importlib_external as _bootstrap_external  # what importlib calls it, without importing that
import sys
from _thread import get_ident

from twinkle.hooks.patterns import Patterns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any, TypeVar

    _F = TypeVar("_F", bound=Callable[..., Any])

__all__ = ["Finder", "is_lazy", "own_dict", "spec_of", "when_initialized"]

# Frames of code with this file name are cut from the tracebacks of imports (Python/import.c) and
# skipped by the stacklevel of warnings, so that both look as they do without us.
_MACHINERY = "<frozen importlib._bootstrap_external>"


def _as_machinery(function: _F) -> _F:
    function.__code__ = function.__code__.replace(co_filename=_MACHINERY)
    return function


class Finder:
    """Reports the end of the import of watched modules.

    Args:
        loaded: Called with the name and the module object when a watched module was executed, for
            the first time or by a reload; also after any module that came in when others are
            found to have come in behind our back (see ``suspicious``).
    """

    def __init__(self, loaded: Callable[[str, ModuleType], None]) -> None:
        self._loaded = loaded
        self._verdicts: dict[str, bool] = {}
        self._patterns = Patterns(())
        self._searching: set[tuple[str, int]] = set()
        self._front: object = self
        self._size = sys.maxsize
        self._asked = ""
        self.suspicious = False
        self._executing: set[tuple[str, int]] = set()
        self._exec_module: Any = None

    def watch(self, exact: Iterable[str], patterns: Sequence[str]) -> None:
        """Watch these names and what these patterns mean, and nothing else from now on."""
        # Readers take the verdicts first and the patterns second: set them the other way round.
        self._patterns = Patterns(patterns)
        self._verdicts = dict.fromkeys(exact, True)

    def is_watched(self, name: str) -> bool:
        """Whether a module of that name is watched, exactly or by a pattern."""
        verdicts = self._verdicts
        known = verdicts.get(name)
        if known is None:
            known = verdicts[name] = self._patterns.match(name)
        return known

    @_as_machinery
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the finders behind this one give for a watched name; ``None`` for any other."""
        verdicts = self._verdicts  # as is_watched() does it, without the time of a call
        watched = verdicts.get(fullname)
        if watched is None:
            watched = verdicts[fullname] = self._patterns.match(fullname)
        if not watched and (sys.meta_path[0] is self._front or not self._was_bypassed(fullname)):
            return None
        # Someone asks for the spec while we look for it: let them find the real one.
        key = (fullname, get_ident())
        if key in self._searching:
            return None
        self._searching.add(key)
        try:
            spec = self._search(fullname, path, target)
        finally:
            self._searching.discard(key)
        if spec is not None:
            self._observe(spec, fullname)
        return spec

    def see_executions(self) -> None:
        """Report watched modules that are executed from a file without our being asked for them, too.

        A spec of ``spec_from_file_location``, the finder of an editable install in front of ours: whoever
        found it, a module of source or bytecode is executed by one method of the import system.
        """
        loaders: Any = _bootstrap_external._LoaderBasics
        if self._exec_module is None:
            self._exec_module = loaders.exec_module
            loaders.exec_module = _observed(self._exec_module, self)

    def see_no_executions(self) -> None:
        """Give the import system its method back, unless somebody else has changed it since."""
        loaders: Any = _bootstrap_external._LoaderBasics
        if getattr(loaders.exec_module, "finder", None) is self:
            loaders.exec_module, self._exec_module = self._exec_module, None

    def executed_unseen(self, module: ModuleType) -> None:
        """Report a module that was executed, unless a loader of ours is about to."""
        name = own_dict(module).get("__name__")
        if not isinstance(name, str) or not self.is_watched(name):
            return
        if (name, get_ident()) not in self._executing:
            self.executed(name, module)

    def invalidate_caches(self) -> None:
        """Nothing is cached that depends on the file system."""

    def forget_threads(self) -> None:
        """Drop the searches of other threads, which do not live on in a forked child."""
        self._searching = {key for key in self._searching if key[1] == get_ident()}
        self._executing = {key for key in self._executing if key[1] == get_ident()}

    def observe_lazy(self, module: ModuleType, name: str) -> None:
        """Report the load of a module of ``importlib.util.LazyLoader`` whenever it comes."""
        spec = spec_of(module)
        if spec is not None:
            self._observe(spec, name)

    @_as_machinery
    def _search(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        """Ask the finders behind this one for a spec.

        Those before us have declined already. ``importlib.util.find_spec`` would ask them again and
        take the parent's import lock again, which deadlocks when ``pkg/__init__`` waits for a thread
        that imports ``pkg.sub``; wrapt's finder does so, and its hooks are fired by us anyway.
        """
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in behind:
            if isinstance(finder, Finder) or _is_wrapts(finder):
                continue
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None else _find_legacy(finder, fullname, path)
            if spec is not None:
                return spec  # type: ignore[no-any-return]
        return None

    def _observe(self, spec: ModuleSpec, name: str) -> None:
        loader: Any = spec.loader
        if loader is None:
            # A namespace package: nothing is executed, and the import system makes its loader.
            when_initialized(spec, lambda: self._finished(name))
        elif type(loader) is not _Loader:
            try:
                spec.loader = _Loader(loader, name, self)  # type: ignore[assignment]
            except AttributeError:  # a spec that cannot be changed: missed() will name the module
                return

    def _finished(self, name: str) -> None:
        module = sys.modules.get(name)
        if module is not None:
            self._loaded(name, module)

    def executed(self, name: str, module: ModuleType) -> None:
        """Report that a module was executed; a lazy one is reported when it loads."""
        if is_lazy(module):
            self.observe_lazy(module, name)
        else:
            self._loaded(name, module)

    def _was_bypassed(self, fullname: str) -> bool:
        """Whether a module came in that this finder was not asked for, because another stands before it."""
        if self not in sys.meta_path:
            return False
        before = sys.meta_path[: sys.meta_path.index(self)]
        if all(_is_wrapts(finder) for finder in before):
            self._front = sys.meta_path[0]  # wrapt's finder asks us for everything
            self._size = sys.maxsize
            return False
        # One import adds the name that was asked for, when it succeeds; more has not passed here.
        # Fewer is what is found at the first look, and where modules were deleted: look as well.
        known, self._size = self._size, len(sys.modules)
        asked, self._asked = self._asked, fullname
        if not known <= self._size <= known + (asked in sys.modules):
            self.suspicious = True
        return self.suspicious


class _Loader:
    """The original loader in everything but that the end of an execution is reported.

    It gives its place in the spec and the module back before the module's first line runs.
    """

    __slots__ = ("__finder", "__name", "__original")

    def __init__(self, original: Any, name: str, finder: Finder) -> None:
        object.__setattr__(self, "_Loader__original", original)
        object.__setattr__(self, "_Loader__name", name)
        object.__setattr__(self, "_Loader__finder", finder)

    @property
    def __class__(self) -> Any:
        return self.__original.__class__

    @__class__.setter
    def __class__(self, value: Any) -> None:
        self.__original.__class__ = value

    def __getattr__(self, name: str) -> Any:
        # hasattr(loader, "exec_module") decides how a module is loaded: only what is there is shown.
        value = getattr(self.__original, name)
        if name == "exec_module":
            return self.__exec
        if name == "create_module":
            return self.__create
        if name == "load_module":
            return self.__load
        return value

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.__original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__original, name)

    def __dir__(self) -> Iterable[str]:
        return dir(self.__original)

    def __repr__(self) -> str:
        return repr(self.__original)

    def __eq__(self, other: object) -> bool:
        return bool(self.__original == (other.__original if type(other) is _Loader else other))

    def __hash__(self) -> int:
        return hash(self.__original)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__original.__reduce_ex__(protocol)

    @_as_machinery
    def __create(self, spec: Any) -> Any:
        own, spec.loader = spec.loader, self.__original
        try:
            return self.__original.create_module(spec)
        finally:
            spec.loader = own

    @_as_machinery
    def __exec(self, module: Any) -> None:
        self.__step_back(module)
        executing, key = self.__finder._executing, (self.__name, get_ident())
        executing.add(key)
        try:
            self.__original.exec_module(module)
        except BaseException as error:
            # A bare raise adds no frame: cutting ours here leaves none (from Python 3.11 on).
            if error.__traceback__ is not None:
                error.__traceback__ = error.__traceback__.tb_next
            raise
        finally:
            executing.discard(key)
        self.__finder.executed(self.__name, module)

    @_as_machinery
    def __load(self, *arguments: Any) -> Any:
        executing, key = self.__finder._executing, (self.__name, get_ident())
        executing.add(key)
        try:
            module = self.__original.load_module(*arguments)
        finally:
            executing.discard(key)
        self.__step_back(module)
        self.__finder.executed(self.__name, module)
        return module

    def __step_back(self, module: Any) -> None:
        namespace = own_dict(module)
        spec = namespace.get("__spec__")
        if spec is not None and getattr(spec, "loader", None) is self:
            spec.loader = self.__original
        if namespace.get("__loader__") is self:
            namespace["__loader__"] = self.__original


def _observed(exec_module: Any, finder: Finder) -> Any:
    """The import system's method, and the report of what it executed."""

    @_as_machinery
    def observed(self: Any, module: ModuleType) -> None:
        try:
            exec_module(self, module)
        except BaseException as error:
            if error.__traceback__ is not None:
                error.__traceback__ = error.__traceback__.tb_next
            raise
        finder.executed_unseen(module)

    function: Any = observed
    function.__name__, function.__qualname__ = exec_module.__name__, exec_module.__qualname__
    function.__module__, function.__doc__ = exec_module.__module__, exec_module.__doc__
    function.finder = finder
    return function


def own_dict(module: object) -> dict[str, Any]:
    """The module's dictionary, read without running any code of the module's class."""
    try:
        namespace = object.__getattribute__(module, "__dict__")
    except AttributeError:
        return {}
    return namespace if isinstance(namespace, dict) else {}


def spec_of(module: object) -> Any:
    """The module's ``__spec__`` or ``None``, without loading a lazy module."""
    return own_dict(module).get("__spec__")


def is_lazy(module: object) -> bool:
    """Whether a module is one of ``importlib.util.LazyLoader`` that was not touched yet."""
    kind = type(module)
    if kind.__name__ != "_LazyModule" or kind.__module__ != "importlib.util":
        return False
    # Python 3.13 changes the class when the module has been executed, older ones before that.
    state = getattr(spec_of(module), "loader_state", None)
    return not (isinstance(state, dict) and state.get("is_loading"))


def when_initialized(spec: Any, done: Callable[[], None]) -> bool:
    """Call ``done`` when the import system marks the module of ``spec`` as initialized.

    The mark is an attribute of the spec, and the import system sets it in the importing thread
    while it still holds the module's lock: no polling, no thread, no window for anyone to see the
    module without what ``done`` does to it. A spec that is waited for already keeps its first
    ``done``.

    Returns:
        Whether ``done`` will be called (a spec of an unusual class may not allow it).
    """
    plain = type(spec)
    if "_initializing" in vars(plain):
        return True

    def get(self: Any) -> Any:
        return vars(self).get("_initializing", False)

    def set_(self: Any, value: Any) -> None:
        vars(self)["_initializing"] = value
        if not value and type(self) is waiting:
            self.__class__ = plain
            done()

    members = {"_initializing": property(get, set_), "__module__": plain.__module__}
    waiting = type(plain.__name__, (plain,), members)
    try:
        spec.__class__ = waiting
    except (AttributeError, TypeError):
        return False
    return True


def _is_wrapts(finder: object) -> bool:
    kind = type(finder)
    return kind.__name__ == "ImportHookFinder" and kind.__module__ in ("wrapt.importer", "wrapt")


def _find_legacy(finder: object, fullname: str, path: Sequence[str] | None) -> Any:
    """Ask a finder of before PEP 451, as Python 3.10 and 3.11 still accept it."""
    from importlib import _bootstrap

    legacy = getattr(_bootstrap, "_find_spec_legacy", None)
    if legacy is None or not hasattr(finder, "find_module"):
        return None
    return legacy(finder, fullname, path)
