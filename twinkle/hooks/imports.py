"""Watch for modules: a callback runs when a module of that name (or pattern) has been imported.

The finder is ours, the post-import hooks are wrapt's: a callback is registered with wrapt when its
module is there, and the hooks that others registered with wrapt on that module run with it. wrapt
is imported at the first match and never before (it costs 70 to 97 ms at interpreter start, 4 to 8
after torch). Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

import sys

from twinkle import forks
from twinkle.hooks import guard
from twinkle.hooks.finder import Finder, is_lazy, spec_of, when_initialized
from twinkle.hooks.patterns import Patterns
from twinkle.runtime import runtime
from twinkle.targets import is_pattern

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

__all__ = [
    "Installed",
    "Watch",
    "Watches",
    "bypassed",
    "catch_up",
    "install",
    "missed",
    "uninstall",
    "watch_module",
]


class Watch:
    """A callback and the modules it waits for.

    Attributes:
        name: A module's name, or a pattern: ``*`` is a part of a name, ``**`` may hold dots.
        owner: Who asks, in words, for messages.
        strict: What the callback raises fails the import.
        active: Not cancelled.
    """

    __slots__ = ("_callback", "_patterns", "_seen", "active", "name", "owner", "strict")

    def __init__(self, name: str, callback: Callable[[Any, str], object], owner: str, strict: bool) -> None:
        self.name = name
        self.owner = owner
        self.strict = strict
        self.active = True
        self._callback = callback
        self._patterns = Patterns((name,)) if is_pattern(name) else None
        self._seen: dict[str, Callable[[], object]] = {}

    def matches(self, module: str) -> bool:
        """Whether the watch waits for a module of that name."""
        return module == self.name if self._patterns is None else self._patterns.match(module)

    def names_in(self, modules: list[str]) -> list[str]:
        """The names among ``modules`` that the watch waits for."""
        if self._patterns is None:
            return [self.name] if self.name in sys.modules else []
        return [name for name in modules if self._patterns.match(name)]

    def cancel(self) -> None:
        """Do not call back any more; what the callback did stays done."""
        self.active = False
        with _watches().lock:
            _watches().all = tuple(watch for watch in _watches().all if watch is not self)
            _watches().tell()

    def has_run(self, name: str, module: object) -> bool:
        """Whether the callback ran for that very module object."""
        seen = self._seen.get(name)
        return seen is not None and seen() is module

    def claim(self, name: str, module: object, *, again: bool) -> bool:
        """Whether the caller is to run the callback; of several callers only one is."""
        with _watches().lock:
            if not self.active or (self.has_run(name, module) and not again):
                return False
            self._seen[name] = _reference(module)
            return True

    def run(self, name: str, module: object) -> None:
        """Call back; unless strict, what the callback raises does not leave this method."""
        try:
            self._callback(module, name)
        except Exception as error:
            guard.failed(error, owner=self.owner, subject=f"module {name}", strict=self.strict)

    def __repr__(self) -> str:
        return f"<Watch {self.name} of {self.owner or 'unknown owner'}>"


class Installed:
    """The handle of :func:`install`: takes back what came in by it, and nothing of anybody else's.

    That is the finder, where it was not in ``sys.meta_path`` before, and the watches begun since then.
    Leaving a ``with`` block does the same.
    """

    def __init__(self, *, put_in: bool, before: tuple[Watch, ...]) -> None:
        self._put_in = put_in
        self._before = before
        self._done = False

    def uninstall(self) -> None:
        """Cancel those watches and take the finder out; a second call does nothing."""
        if self._done:
            return
        self._done = True
        watches = _watches()
        with watches.lock:
            for watch in watches.all:
                if watch not in self._before:
                    watch.cancel()
            if self._put_in:
                watches.take_finder_out()

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        self.uninstall()


class Watches:
    """Who waits for which modules, and the finder that sees them come in.

    Attributes:
        lock: Held by whoever changes the table; taken anew in a forked child.
        all: Readers take the tuple; it is replaced, never changed.
        bypassed: The modules that came in without the finder, and past whom, in words.
    """

    def __init__(self) -> None:
        self.lock = forks.lock()
        self.all: tuple[Watch, ...] = ()
        self.finder = Finder(_loaded)
        self.bypassed: dict[str, str] = {}

    def close(self) -> None:
        """Take our finder out and cancel every watch."""
        with self.lock:
            self.take_finder_out()
            for watch in self.all:
                watch.active = False
            self.all = ()
            self.bypassed.clear()
            self.tell()

    def take_finder_out(self) -> None:
        """Modules that are imported from now on are not seen."""
        for at, finder in enumerate(sys.meta_path):
            if finder is self.finder:
                del sys.meta_path[at]
                break
        self.finder.see_no_executions()

    def tell(self) -> None:
        """Let the finder know what is watched."""
        exact = [watch.name for watch in self.all if not is_pattern(watch.name)]
        patterns = [watch.name for watch in self.all if is_pattern(watch.name)]
        self.finder.watch(exact, patterns)

    def after_fork(self) -> None:
        """In a child, other threads search for nothing."""
        self.finder.forget_threads()


def _watches() -> Watches:
    return runtime.of(Watches)


def install() -> Installed:
    """Put our finder at the front of ``sys.meta_path``, if it is not in there."""
    watches = _watches()
    with watches.lock:
        put_in = not any(finder is watches.finder for finder in sys.meta_path)
        if put_in:
            sys.meta_path.insert(0, watches.finder)
            watches.finder.see_executions()
        before = watches.all
    runtime.session.remarks_at_report["imports"] = remarks
    return Installed(put_in=put_in, before=before)


def uninstall() -> None:
    """Take our finder out and cancel every watch; what callbacks did stays done."""
    _watches().close()


def watch_module(
    name_or_pattern: str,
    callback: Callable[[ModuleType, str], object],
    *,
    owner: str = "",
    strict: bool = False,
) -> Watch:
    """Call ``callback(module, name)`` whenever a module of that name has been executed.

    That is at the end of its import (before any other thread can see it), again after each
    ``importlib.reload``, and at once when it is imported already; when it is being imported at
    this moment, at the end of that. ``module`` is what stands in ``sys.modules``, which is not the
    executed object where a package replaces itself by a lazy one. A module of
    ``importlib.util.LazyLoader`` counts as imported when it is loaded. The finder is installed.

    What the callback raises becomes a :class:`~twinkle.errors.TwinkleWarning` and a record
    (:mod:`twinkle.hooks.guard`).

    Args:
        name_or_pattern: ``*`` stands for characters other than a dot, ``**`` for any.
        callback: Called in the importing thread.
        owner: Who asks, for messages.
        strict: Let what the callback raises fail the import instead.
    """
    watch = Watch(name_or_pattern, callback, owner, strict)
    with _watches().lock:
        _watches().all = (*_watches().all, watch)
        _watches().tell()
    install()
    for name in watch.names_in(list(sys.modules)):
        _arrived(watch, name)
    return watch


def missed() -> list[str]:
    """The watched modules that are imported and whose callbacks have not all run.

    Normally empty: another finder before ours may load a module without asking us.
    """
    return sorted({name for _, name, module in _unseen() if _is_complete(module)})


def catch_up() -> list[str]:
    """Run the callbacks of the modules in :func:`missed`; returns their names.

    Those of modules that are still being imported run at the end of that.
    """
    _watches().finder.suspicious = False
    names = missed()
    for watch, name, _ in _unseen():
        if name in names:
            _watches().bypassed.setdefault(name, _who_bypassed(name))
        _arrived(watch, name)
    return names


def bypassed() -> dict[str, str]:
    """The modules that were found to have come in without us, and past whom, in words."""
    return dict(_watches().bypassed)


def remarks() -> list[str]:
    """What the report says of modules that came in without our finder being asked."""
    past = "was imported past Twinkle's finder"
    found = [f"{module} {past}: {whom}" for module, whom in bypassed().items()]
    return found + [f"{module} {past}, and is as it was" for module in missed()]


def _unseen() -> list[tuple[Watch, str, object]]:
    modules = list(sys.modules)
    return [
        (watch, name, module)
        for watch in _watches().all
        for name in watch.names_in(modules)
        if (module := sys.modules.get(name)) is not None and not watch.has_run(name, module)
    ]


def _is_complete(module: object) -> bool:
    return not is_lazy(module) and not _is_initializing(module)


def _is_initializing(module: object) -> bool:
    return bool(getattr(spec_of(module), "_initializing", False))


def _arrived(watch: Watch, name: str) -> None:
    """Call back for a module that is in ``sys.modules``: now, or when its import has ended."""
    module: Any = sys.modules.get(name)
    if module is None:
        return
    if is_lazy(module):
        _watches().finder.observe_lazy(module, name)
    elif _is_initializing(module) and when_initialized(spec_of(module), lambda: _settled(name)):
        if not _is_initializing(module):  # it finished while we looked
            _settled(name)
    else:
        _fire([watch], name, module, again=False)


def _settled(name: str) -> None:
    """Call back at the end of an import that began before it could be observed."""
    module = sys.modules.get(name)
    if module is not None:
        _fire([watch for watch in _watches().all if watch.matches(name)], name, module, again=False)


def _loaded(name: str, executed: ModuleType) -> None:
    """Call back for a module that was executed."""
    module = _standing(name, executed)
    if module is not None:
        watches = [watch for watch in _watches().all if watch.matches(name)]
        if watches:
            _fire(watches, name, module, again=True)
        if watches or "wrapt" in sys.modules:  # whose finder we may have walked past
            _notify(module if getattr(module, "__name__", None) == name else executed)
    if _watches().finder.suspicious:
        catch_up()


def _standing(name: str, executed: ModuleType) -> ModuleType:
    """What stands for a module that was executed: itself, or the one that it has put in its place."""
    module = sys.modules.get(name)
    if module is None:  # entered nowhere by whoever executed it
        return executed
    spec = spec_of(module)
    return executed if spec is not None and spec is not spec_of(executed) else module


def _fire(watches: list[Watch], name: str, module: object, *, again: bool) -> None:
    ready = [watch for watch in watches if watch.claim(name, module, again=again)]
    if not ready:
        return

    def hook(found: object) -> None:
        for watch in ready:
            watch.run(name, found)

    wrapt = _wrapt()
    if wrapt is None or sys.modules.get(name) is not module:
        hook(module)
    else:
        # The module is there, so wrapt calls the hook at once. Registering earlier would have
        # wrapt's finder load the module, which deadlocks where ours does not.
        wrapt.register_post_import_hook(hook, name)


def _notify(module: ModuleType) -> None:
    """Run other people's hooks; what they raise is theirs to raise, as with wrapt's own finder."""
    wrapt = _wrapt()
    if wrapt is not None:
        wrapt.notify_module_loaded(module)


def _wrapt() -> Any:
    """Wrapt, or ``None`` where it is not installed or is being imported right now."""
    try:
        import wrapt
    except ImportError:
        return None
    return wrapt if hasattr(wrapt, "notify_module_loaded") else None


def _who_bypassed(name: str) -> str:
    before = []
    for finder in sys.meta_path:
        if finder is _watches().finder:
            break
        before.append(_kind(finder))
    loader = getattr(spec_of(sys.modules.get(name)), "loader", None)
    text = f"loaded by {_kind(loader)}" if loader is not None else "loaded without a loader"
    return f"{text}; before Twinkle's finder: {', '.join(before)}" if before else text


def _kind(thing: object) -> str:
    kind = thing if isinstance(thing, type) else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def _reference(module: object) -> Callable[[], object]:
    from _weakref import ref

    try:
        return ref(module)
    except TypeError:  # anything may stand in sys.modules
        return lambda: module


def _after_fork() -> None:
    _watches().after_fork()


forks.in_child(_after_fork)
