"""When models get their captures: as they come, where this machine has a device that can capture.

A model of transformers gets them at the end of its construction, and so does any other module whose
constructor makes lists of modules: the outermost that is being made. Copies, and those from pickles, lose
theirs on the way and get them when they are restored. Nothing of the room ``capture`` is imported where
nothing can be captured. Standard library only at its top, for it is imported at interpreter start.
"""

from __future__ import annotations

import sys
from types import FunctionType, ModuleType

from twinkle.runtime import runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any
    from weakref import WeakKeyDictionary

    from twinkle.apply.functions import Change
    from twinkle.hooks.chosen import ChosenWatch
    from twinkle.hooks.construction import ConstructionWatch

__all__ = ["arrived", "begin", "begins", "has_device", "notice", "put_in", "restored", "take_out"]

_LISTS = frozenset({"ModuleDict", "ModuleList", "Sequential", "_get_clones"})
"""What a constructor says that makes lists of modules, itself or by a function that it calls."""

_OF_TORCH = ("Transformer", "TransformerDecoder", "TransformerEncoder")
"""The layers of torch that hold blocks. Of its others nobody asks: compiled code constructs them."""

_FUNCTIONS = (FunctionType, staticmethod, classmethod)
_MOST = 60
"""So many functions of a package are followed from a constructor; one that leads to more may make lists."""


class Noticed:
    """The classes that make lists of modules.

    Attributes:
        watch: Tells of their instances.
        models: Tells of models of transformers, whatever their constructors say.
        makes_lists: Whether the constructor of a class does, for those that were asked about.
    """

    def __init__(self) -> None:
        from weakref import WeakKeyDictionary

        self.watch: ChosenWatch | None = None
        self.models: ConstructionWatch | None = None
        self.makes_lists: WeakKeyDictionary[type, bool] = WeakKeyDictionary()

    def close(self) -> None:
        """Watch no more."""
        for watch in (self.watch, self.models):
            if watch is not None:
                watch.cancel()


def has_device() -> bool:
    """Whether torch finds a device of CUDA, without initialising it: processes may fork after this."""
    torch: Any = sys.modules["torch"]
    return bool(torch.cuda.device_count() > 0)


def _possible() -> bool:
    return begins() and has_device()


def begins() -> bool:
    """Whether captures may be asked for in this process: torch, which is there, was built for CUDA."""
    torch: Any = sys.modules["torch"]
    return runtime.options.capture != "off" and bool(torch.backends.cuda.is_built())


def begin() -> None:
    """Watch the models of transformers, and the classes of torch that hold blocks."""
    if begins():
        from twinkle.apply.arrivals import OWNER
        from twinkle.hooks.construction import watch_pretrained

        runtime.of(Noticed).models = watch_pretrained(arrived, owner=OWNER, strict=runtime.options.raises)
        for name in _OF_TORCH:
            _watch().choose(getattr(sys.modules["torch"].nn, name))


def notice(cls: type) -> None:
    """Watch a class that is about to be constructed for the first time, if its instances may hold blocks.

    Not within a model of transformers, nor such a model: these are told of whatever their classes say, and
    what their constructors lead to takes 70 ms a class to read.
    """
    if begins() and not _is_in_model(cls) and _makes_lists(cls):
        _watch().choose(cls)


def _is_in_model(cls: type) -> bool:
    from twinkle.hooks.construction import under_construction

    models = runtime.of(Noticed).models
    return models is not None and (models.is_family(cls) or any(map(models.is_in, under_construction())))


def arrived(model: Any) -> None:
    """Put captures into a model that has been constructed, unless one that holds it is being constructed."""
    if _possible() and not _is_inside():
        from twinkle.capture.install import install

        install(model)


def restored(module: Any) -> None:
    """Put captures into a module from a pickle, or a copy. One that holds it comes later, and takes over."""
    models = runtime.of(Noticed).models
    whole = models is not None and models.is_in(module)
    if begins() and (whole or _makes_lists(type(module))) and has_device():
        from twinkle.capture.install import install
        from twinkle.proof.room import comparing

        if not comparing():
            install(module)


def put_in(model: Any, change: Change) -> None:
    """Put captures into a model that is kernelized by name, and have the change take them back."""
    if _possible():
        from twinkle.capture.install import install
        from twinkle.capture.slot import empty

        blocks = install(model, again=True)
        if blocks:
            change.did(lambda: [empty(block) for block in blocks])


def take_out(model: Any) -> None:
    """Take the captures out of a model, and of the copies that are made of it."""
    if "twinkle.capture.install" in sys.modules:
        from twinkle.capture.install import remove

        remove(model)


def _watch() -> ChosenWatch:
    state = runtime.of(Noticed)
    if state.watch is None:
        from twinkle.apply.arrivals import OWNER
        from twinkle.hooks.chosen import ChosenWatch

        state.watch = ChosenWatch(arrived, owner=OWNER, strict=runtime.options.raises)
    return state.watch


def _is_inside() -> bool:
    """Whether something is being constructed that will be told of at its end."""
    from twinkle.hooks.construction import under_construction

    models, watch = runtime.of(Noticed).models, runtime.of(Noticed).watch
    return any(
        (watch is not None and type(one) in watch.classes) or (models is not None and models.is_in(one))
        for one in under_construction()
    )


def _makes_lists(cls: type) -> bool:
    """Whether the constructor of a class makes lists of modules."""
    known = runtime.of(Noticed).makes_lists
    found = known.get(cls)
    if found is None:
        found = known[cls] = _says_lists(cls)
    return found


def _says_lists(cls: type) -> bool:
    """Whether the constructors of a class and its bases say so, or functions of its package they lead to."""
    root = _package(cls.__module__)
    if root in ("torch", "twinkle"):
        return cls.__module__.startswith("torch.nn.") and cls.__name__ in _OF_TORCH
    from torch import nn

    from twinkle.hooks.construction import unobserved
    from twinkle.match.words import words_of

    if issubclass(cls, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return True
    spaces = [vars(base) for base in cls.__mro__]
    todo = [unobserved(space["__init__"]) for space in spaces if "__init__" in space]
    seen: dict[Any, None] = {}
    while todo and len(seen) < _MOST:
        words = words_of(todo.pop(), follow=False)
        for function in words.functions.keys() - seen.keys():
            seen[function] = None
            if words.have(_LISTS):
                return True
            if _package(function.__module__) == root:
                found = _named(words.names, [function.__globals__, *spaces])
                modules = [vars(value) for value in found if isinstance(value, ModuleType)]
                found += _named(words.names, [space for space in modules if space is not vars(nn)])
                todo += [value for value in found if isinstance(value, _FUNCTIONS)]
    return bool(todo)


def _named(names: Iterable[str], scopes: Iterable[Any]) -> list[Any]:
    return [scope[name] for scope in scopes for name in names if name in scope]


def _package(module: object) -> str:
    return str(module).partition(".")[0]
