"""References to a function that other modules took: finding them, and putting another function there.

``from target import f`` copies a reference, so a module that did so before ``target.f`` was
replaced goes on with the original. Found, by identity, and rebound are the globals of every imported module,
under any name, and the attributes of classes (bare or in a ``staticmethod``; not of those that ``gc.freeze``
has hidden). What else holds the function is the matter of :mod:`twinkle.swap.holders`.

No attribute of a module or class is looked up: only dictionaries are read, so that no lazy module
loads and no descriptor runs. Names that are taken after the replacement need nothing.
"""

from __future__ import annotations

import gc
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from twinkle.hooks.finder import spec_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    from twinkle.swap.holders import Held

__all__ = ["Alias", "being_imported", "find", "modules_since", "rebind", "restore"]

_OURS = __name__.partition(".")[0]


class Alias:
    """A name that holds an object.

    Attributes:
        holder: The module or class whose name it is.
        name: The name there.
        place: ``module``, ``class`` or ``staticmethod``.
        original: The object that was found there.
        replacement: What was put there, once it was.
    """

    __slots__ = ("holder", "name", "original", "place", "replacement")

    def __init__(self, holder: Any, name: str, place: str, original: object) -> None:
        self.holder = holder
        self.name = name
        self.place = place
        self.original = original
        self.replacement: object = None

    @property
    def where(self) -> str:
        """``module.name`` or ``module.Class.name``."""
        if isinstance(self.holder, type):
            return f"{self.holder.__module__}.{self.holder.__qualname__}.{self.name}"
        return f"{_name_of(self.holder)}.{self.name}"

    def _replace(self, old: object, new: object) -> bool:
        """Put ``new`` where ``old`` stands; ``False`` when something else stands there."""
        namespace = _namespace(self.holder)
        value = namespace.get(self.name)
        held = value.__func__ if type(value) is staticmethod else value
        if held is not old:
            return False
        if self.place == "module":
            # Not setattr: a module's class may define it.
            namespace[self.name] = new
        else:
            # A builtin does not bind in a class.
            binds_now = hasattr(type(new), "__get__") and not hasattr(type(self.original), "__get__")
            unbound = self.place == "staticmethod" or binds_now
            wrapped = staticmethod(new) if unbound else new  # type: ignore[arg-type]
            type.__setattr__(self.holder, self.name, wrapped)
        return True

    def put_back(self) -> bool:
        """Put the original back; false where something else stands there by now."""
        return self._replace(self.replacement, self.original)

    def __repr__(self) -> str:
        return f"<Alias {self.where}>"


def find(original: object, *, target: str | None = None) -> list[Alias]:
    """Find the names that hold that very object, in modules and in classes.

    Args:
        original: What to look for.
        target: The module that others take it from, where ``original.__module__`` does not say so.
            While that is being imported for the first time, only modules that came into
            ``sys.modules`` after it can have taken anything from it, and only they are read.
    """
    since = being_imported(original, target)
    wanted = id(original)
    found = []
    for module, namespace in modules_since(since):
        if wanted in map(id, list(namespace.values())):  # at C speed: nearly every module says no
            found += [
                Alias(module, name, "module", original)
                for name, value in list(namespace.items())
                if value is original
            ]
    for cls in _classes_that_hold(original) if since is None else _classes(since):
        for name, value in list(_namespace(cls).items()):
            if value is original:
                found.append(Alias(cls, name, "class", original))
            elif type(value) is staticmethod and value.__func__ is original:
                found.append(Alias(cls, name, "staticmethod", original))
    return found


def _classes_that_hold(original: object) -> list[type]:
    """The classes that hold the object, from the garbage collector: half the time of reading every class."""
    holders = gc.get_referrers(original)
    wrappers = [one for one in holders if type(one) is staticmethod]
    if wrappers:
        holders += gc.get_referrers(*wrappers)
    globals_ = {id(_namespace(module)) for module in list(sys.modules.values()) if _is_module(module)}
    namespaces = [
        one for one in holders if type(one) is dict and "__module__" in one and id(one) not in globals_
    ]
    if not namespaces:
        return []
    owners = gc.get_referrers(*namespaces)
    return [one for one in owners if issubclass(type(one), type) and not _is_ours(_name_of_module(one))]


def rebind(
    original: object,
    replacement: object,
    *,
    target: str | None = None,
    keep: Iterable[tuple[dict[str, Any], str]] = (),
) -> list[Alias]:
    """Put ``replacement`` under every name of :func:`find`; returns those that were changed.

    Args:
        original: What to look for.
        replacement: What to put there.
        target: As for :func:`find`.
        keep: Globals and a name in them, each of which a kernel has for the original.
    """
    kept = {(id(names), name) for names, name in keep}
    changed = []
    for alias in find(original, target=target):
        if (id(_namespace(alias.holder)), alias.name) in kept:
            continue
        try:
            if alias._replace(original, replacement):
                alias.replacement = replacement
                changed.append(alias)
        except (AttributeError, TypeError):  # a class of C code
            continue
    return changed


def restore(aliases: Sequence[Alias | Held]) -> list[Alias | Held]:
    """Put the originals back; returns the places that someone else has changed since, left alone."""
    return [alias for alias in reversed(aliases) if not alias.put_back()]


def being_imported(original: object, target: str | None) -> str | None:
    """The name of the module that others take the object from, while it is imported for the first time."""
    name = target or getattr(original, "__module__", None)
    module = sys.modules.get(name) if isinstance(name, str) else None
    return name if getattr(spec_of(module), "_initializing", False) else None


def modules_since(since: str | None = None) -> Iterator[tuple[ModuleType, dict[str, Any]]]:
    """Every imported module that is not ours, once, with its globals; the newest ones first."""
    seen = set()
    for name in reversed(list(sys.modules)):
        module = sys.modules.get(name)
        if _is_module(module) and id(module) not in seen and not _is_ours(name):
            seen.add(id(module))
            yield module, _namespace(module)  # type: ignore[misc]
        if name == since:
            return


def _classes(since: str | None = None) -> Iterator[type]:
    """Every class under a name in the module that defines it."""
    seen = set()
    for module, namespace in modules_since(since):
        defined_in = _name_of(module)
        for value in list(namespace.values()):
            # id() because a metaclass may define __hash__.
            if not issubclass(type(value), type) or id(value) in seen:
                continue
            if _name_of_module(value) == defined_in:
                seen.add(id(value))
                yield value


def _is_module(thing: object) -> bool:
    return issubclass(type(thing), ModuleType)


def _is_ours(module: object) -> bool:
    """Whether a module is Twinkle's own: it keeps originals in order to restore them."""
    return isinstance(module, str) and (module == _OURS or module.startswith(f"{_OURS}."))


def _namespace(holder: Any) -> Any:
    if issubclass(type(holder), type):
        return type.__getattribute__(holder, "__dict__")
    return ModuleType.__getattribute__(holder, "__dict__")


def _name_of(module: Any) -> str:
    return str(_namespace(module).get("__name__", "?"))


def _name_of_module(cls: Any) -> object:
    return _namespace(cls).get("__module__")
