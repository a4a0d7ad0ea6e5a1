"""The embedded kernels for modules of every class, in whatever model they are, or in none.

A model of transformers is decided about as a whole. Any other class is looked at once, at the first use of
an instance (:mod:`twinkle.hooks.first_use`), and its instances are decided about at their first call
(:mod:`twinkle.apply.first_calls`). Nothing is read, and no more is imported, for a class whose code has no
word of an op that there is a kernel for on this machine (:mod:`twinkle.match.words`).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from twinkle.apply.arrivals import OWNER, Arrivals
from twinkle.hooks.construction import under_construction
from twinkle.hooks.first_use import standing, watch_first_use
from twinkle.hooks.imports import watch_module
from twinkle.match.words import words_of
from twinkle.ops.backends import device
from twinkle.ops.catalog import all_ops
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import CodeType, ModuleType

    from torch import nn

    from twinkle.match.words import Words

__all__ = ["look_at", "may_hold_one", "notice"]

_OPERATORS = frozenset("+*")


class _Sought:
    """What is looked for in the classes, and where it was not found.

    Attributes:
        in_vain: The code of a forward that there is no kernel for, with the code that it leads to: a class
            that is made again, in a loop, is not read again.
        coming: The modules whose functions are looked at when they are imported.
    """

    def __init__(self) -> None:
        self.coming: set[str] = set()
        self.in_vain: WeakKeyDictionary[CodeType, tuple[CodeType, ...]] = WeakKeyDictionary()
        self._made_of: tuple[object, ...] = ()
        self._words: frozenset[str] = frozenset()

    def words(self) -> frozenset[str]:
        """A word of every op that was asked for and has an implementation for this machine."""
        options = runtime.options
        made_of = (options.kernels, options.disabled)
        if made_of != self._made_of:
            here = device()
            found = set[str]()
            for op in all_ops():
                if options.wants(op.name) and any(b.is_for(here) for b in op.backends):
                    found |= op.words
            self._made_of, self._words = made_of, frozenset(found)
        return self._words


def notice(cls: type[nn.Module]) -> bool | None:
    """Have a class looked at when it is first used, if its code may hold what there is a kernel for.

    Returns:
        Whether its instances are to be decided about when they are constructed, since its forward cannot
        be watched. None where this instance is part of a model that is decided about as a whole, and
        the next may not be.
    """
    models = runtime.of(Arrivals).models
    if not runtime.options.embedded or (models is not None and models.is_family(cls)):
        return False
    # A plain layer of torch is settled wherever it is: compiled code constructs them.
    if cls.__module__.partition(".")[0] == "torch" and not may_hold_one(cls):
        return False
    if models is not None and any(map(models.is_in, under_construction())):
        return None
    if not may_hold_one(cls):
        return False
    return not watch_first_use(cls, look_at, owner=OWNER, strict=runtime.options.raises)


def look_at(cls: type[nn.Module]) -> None:
    """Read the code of a class: its functions get their kernels now, its instances at their first call."""
    from twinkle.apply import first_calls
    from twinkle.apply.layers import has_kernels, serve_functions, served_with

    found, state = _words(cls, standing(cls)), runtime.of(_Sought)
    codes = tuple(one.__code__ for one in found.functions)
    modules = _whole(dict.fromkeys([cls.__module__, *(one.__module__ for one in found.functions)]))
    serve_functions(modules, [cls])
    if codes and state.in_vain.get(codes[0]) == codes[1:]:
        return
    if has_kernels(cls):
        first_calls.watch(cls)
        for other in served_with(cls):
            first_calls.watch(other)
    elif codes:
        state.in_vain[codes[0]] = codes[1:]


def _whole(modules: Iterable[str]) -> list[str]:
    """The modules that have been imported; one whose import goes on comes at its end."""
    ready = []
    for name in modules:
        if not getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False):
            ready.append(name)
        elif name not in runtime.of(_Sought).coming:
            runtime.of(_Sought).coming.add(name)
            watch_module(name, _came, owner=OWNER, strict=runtime.options.raises)
    return ready


def _came(module: ModuleType, name: str) -> None:
    from twinkle.apply.layers import serve_functions

    serve_functions([name])


def may_hold_one(cls: type[nn.Module]) -> bool:
    """Whether the code of a class has a word of an op that there may be a kernel for on this machine."""
    root = cls.__module__.partition(".")[0]
    if root == "twinkle":
        return False
    forward = standing(cls)
    if root == "torch":  # its layers call a function of torch, or are made of other layers
        code = getattr(forward, "__code__", None)
        return code is not None and not runtime.of(_Sought).words().isdisjoint(code.co_names)
    return _words(cls, forward).have(runtime.of(_Sought).words())


def _words(cls: type[nn.Module], forward: Any) -> Words:
    found = words_of(forward, cls)
    # What a model measures itself by is an attribute more often than not.
    made = words_of(vars(cls).get("__init__"), follow=False)
    found.names |= made.names - _OPERATORS
    return found
