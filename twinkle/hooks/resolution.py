"""What a written target stands for: the object, found without running any code of the program.

Only the dictionaries of imported modules are read, so a lazy package (``transformers``, one with a
``__getattr__`` of its own) stays lazy. It is asked for a name when the program asks, or when one of its own
modules that holds that name has been imported; then the answer costs nothing.

Standard library only.
"""

from __future__ import annotations

import os
import sys

from twinkle.hooks.finder import own_dict, spec_of
from twinkle.runtime import runtime
from twinkle.targets import Name, Pattern

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType
    from typing import Any
    from weakref import WeakSet

    from twinkle.targets import Target

__all__ = [
    "ABSENT",
    "LATER",
    "ask",
    "holders",
    "is_made_on_demand",
    "is_program",
    "look_up",
    "means",
    "observe_requests",
    "remember",
]

ABSENT: Any = type("ABSENT", (), {"__repr__": lambda self: "ABSENT"})()
"""There is no such name."""
LATER: Any = type("LATER", (), {"__repr__": lambda self: "LATER"})()
"""The module makes that name when the program asks for it, which it has not."""


def is_program(name: str) -> bool:
    """Whether the program that this process runs is meant: ``__main__``, ``-m``'s name, the script's name.

    Args:
        name: Of a module. ``pkg.train`` is the script ``pkg/train.py`` as well, which as ``python
            pkg/train.py`` has no such name.
    """
    if name == "__main__":
        return True
    main = own_dict(sys.modules.get("__main__"))
    spec = main.get("__spec__")
    if spec is not None:
        return bool(getattr(spec, "name", None) == name)
    # When the script has ended, it has no __file__ any more.
    file = main.get("__file__") or getattr(main.get("__loader__"), "path", None)
    if not isinstance(file, str):
        return False
    stem = os.path.splitext(os.path.abspath(file))[0]
    return stem.endswith(os.sep + name.replace(".", os.sep))


def holders(name: str) -> Iterator[ModuleType]:
    """The modules that a target may mean: the imported one, and the program where it is called so."""
    module = sys.modules.get(name)
    if module is not None:
        yield module
    if is_program(name):
        main = sys.modules.get("__main__")
        if main is not None and main is not module:
            yield main


def is_made_on_demand(module: object) -> bool:
    """Whether names of a module may come into being when they are asked for."""
    return "__getattr__" in own_dict(module) or hasattr(type(module), "__getattr__")


def look_up(module: object, dotted: str) -> Any:
    """What a name in a module stands for now; ``ABSENT`` or ``LATER`` where it stands for nothing yet.

    Args:
        module: As it stands in ``sys.modules``.
        dotted: The name, with those of the classes around it.
    """
    head, *path = dotted.split(".")
    found = own_dict(module).get(head, ABSENT)
    if found is ABSENT:
        return LATER if is_made_on_demand(module) else ABSENT
    for step in path:
        found = _static(found, step)
    return found


def _static(owner: object, name: str) -> Any:
    """An attribute of a class, read without running a descriptor."""
    for cls in type.__dict__["__mro__"].__get__(owner) if isinstance(owner, type) else ():
        if name in vars(cls):
            return vars(cls)[name]
    return ABSENT


def ask(module: object, name: str) -> Any:
    """Have a lazy module make a name; ``ABSENT`` where it cannot."""
    try:
        return getattr(module, name, ABSENT)
    except Exception:  # what the package needs is not installed: its own affair, when it is asked
        return ABSENT


class _Resolved:
    """The classes that targets were found to mean, by whatever name."""

    def __init__(self) -> None:
        self.by_target: dict[Target, WeakSet[type]] = {}
        self.looked_at: dict[Target, dict[str, int]] = {}
        self.modules: dict[Target, int] = {}


def remember(target: Target, cls: type) -> None:
    """The target means that class, now and after its name has come to stand for another."""
    from weakref import WeakSet

    runtime.of(_Resolved).by_target.setdefault(target, WeakSet()).add(cls)


def means(target: Target, cls: type) -> bool:
    """Whether a target means that very class, by any name under which the program can reach it.

    A name means the object it stands for. A pattern means the class by the name it was defined under, and
    by each name that a module has for it.
    """
    known = runtime.of(_Resolved).by_target.get(target)
    if known is not None and cls in known:
        return True
    if isinstance(target, Name):
        found = _named(target, cls)
    elif isinstance(target, Pattern):
        found = target.means(cls) or _has_public_name(target, cls)
    else:
        return target.means(cls)
    if found:
        remember(target, cls)
    return found


def _named(target: Name, cls: type) -> bool:
    modules = list(holders(target.module))
    if not modules:  # executed by a loader that enters it nowhere: its own word has to do
        return target.means(cls)
    for module in modules:
        found = look_up(module, target.name)
        if found is cls or (found is LATER and _gives(module, target.name, cls)):
            return True
        # Defined in a function, or in a module that stands there no more: nothing else has that name.
        if found is ABSENT and target.means(cls):
            return True
    return False


def _gives(module: ModuleType, name: str, cls: type) -> bool:
    """Whether a lazy package gives that class, which one of its own modules has defined under that name."""
    package = str(own_dict(module).get("__name__"))
    inside = cls.__module__.startswith(f"{package}.") and cls.__qualname__ == name
    return inside and ask(module, name) is cls


def _has_public_name(target: Pattern, cls: type) -> bool:
    """Whether a module that fits the pattern has the class under a name that fits."""
    state = runtime.of(_Resolved)
    if state.modules.get(target) != len(sys.modules):
        _look_through(target, state)
        if cls in state.by_target.get(target, ()):
            return True
    parts = cls.__module__.split(".")
    for at in range(1, len(parts)):
        name = ".".join(parts[:at])
        module = sys.modules.get(name)
        if module is not None and target.in_module(name) and target.fits_name(cls.__qualname__):
            found = look_up(module, cls.__qualname__)
            if found is LATER and _gives(module, cls.__qualname__, cls):
                return True
    return False


def _look_through(target: Pattern, state: _Resolved) -> None:
    """Take in the classes that modules which came since the last time have under names that fit."""
    looked_at = state.looked_at.setdefault(target, {})
    whole = True
    for name, module in list(sys.modules.items()):
        if looked_at.get(name) == id(module) or not target.in_module(name):
            continue
        for key, value in list(own_dict(module).items()):
            # Not isinstance, which asks the value for its class: torch.distributed.reduce_op warns then.
            if issubclass(type(value), type) and target.fits_name(key):
                remember(target, value)
        if getattr(spec_of(module), "_initializing", False):
            whole = False
        else:
            looked_at[name] = id(module)
    if whole:
        state.modules[target] = len(sys.modules)


def observe_requests(module: ModuleType, wanted: Callable[[str, Any], Any]) -> None:
    """Tell what a lazy module makes of the names that the program asks it for.

    Args:
        module: Has a ``__getattr__`` of its own in its dictionary; any other is left as it is.
        wanted: Called with a name and what was made for it; what it returns is what the program gets.
    """
    names = own_dict(module)
    original = names.get("__getattr__")
    if not callable(original) or isinstance(original, _Requests):
        return
    names["__getattr__"] = _Requests(original, wanted)


class _Requests:
    """A module's ``__getattr__`` that tells what it gave; it is its original in all that can be read."""

    __slots__ = ("_original", "_wanted")

    def __init__(self, original: Any, wanted: Callable[[str, Any], Any]) -> None:
        self._original = original
        self._wanted = wanted

    def __call__(self, name: str) -> Any:
        try:
            made = self._original(name)
        except BaseException as error:
            if error.__traceback__ is not None:
                error.__traceback__ = error.__traceback__.tb_next
            raise
        return self._wanted(name, made)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __repr__(self) -> str:
        return repr(self._original)
