"""What the recognition of code rests on, and one expression that says that all of it is still so.

The symbolic execution notes each global, attribute and function that it read while it followed the code of a
class or a function (:class:`Read`), and the check of an instance notes what it read of that. A :class:`Guard`
joins them into one expression, which the function in the place of the target evaluates at each call: where it
is false the program has changed something since, and its own code runs. Nobody lists by hand what a kernel
depends on.

Each call pays for each test, so the expressions go the quick way: a parameter or a layer is looked up in
its dict (through ``__getattr__`` it takes a quarter of a microsecond), and what is read again has a name.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
import sys
from functools import cached_property
from types import CellType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as _torch

from twinkle.codegen import compile_source
from twinkle.match.symbolic import source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "CHANGED",
    "KEPT",
    "Guard",
    "Read",
    "absent",
    "bare",
    "of_attribute",
    "of_cell",
    "of_code",
    "of_entry",
    "of_forward",
    "of_global",
    "of_method",
    "place_of",
    "same",
]

CHANGED = "changed since it was recognised: the original runs"
"""What the report says of it."""
KEPT = object.__getattribute__
"""Reads an attribute past what a class defines for it."""
_EVERYWHERE = (
    _torch._global_forward_hooks,
    _torch._global_forward_pre_hooks,
    _torch._global_backward_hooks,
    _torch._global_backward_pre_hooks,
)
"""The very dicts that torch's functions for hooks on all modules write to."""
_USUAL: tuple[Any, ...] = (object.__getattribute__, ModuleType.__getattribute__, type.__getattribute__)
_AT = "_tw_at_"
"""What the names of layers begin with that :func:`bare` looked at; with ``_state`` it is the ``__dict__``."""
_OWN = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Read:
    """A test of one thing that recognised code reads.

    Attributes:
        text: An expression. In it ``{self}`` is the layer, ``{own}`` its ``__dict__``, ``{cls}`` its class
            without Twinkle, and ``{0}``, ``{1}`` … are ``objects``. Names begin with ``_tw_``: a global or a
            builtin may be something else where it stands.
        objects: Python objects, compared by identity.
        what: The thing in words.
    """

    __slots__ = ("_hash", "objects", "text", "what")

    def __init__(self, text: str, objects: Sequence[Any], what: str) -> None:
        self.text = text
        self.objects = tuple(objects)
        self.what = what
        # Those of a class are asked for theirs at the construction of each of its layers.
        self._hash = hash((text, *map(id, self.objects)))

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Read)
            and other._hash == self._hash
            and other.text == self.text
            and len(other.objects) == len(self.objects)
            and all(a is b for a, b in zip(self.objects, other.objects, strict=True))
        )

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"<Read {self.what}>"

    @property
    def of_layer(self) -> bool:
        """Whether it is of the layer itself, not of its class or something beside it."""
        return "{self}" in self.text or "{own}" in self.text

    def inside(self, place: str, cls: type, what: str = "") -> Read:
        """The same read of a layer that stands at a place, in another one or beside it.

        Args:
            place: The expression of that layer.
            cls: Its class.
            what: Its name, in words.
        """
        moved = self.at(place)
        text = moved.text.replace("{cls}", f"{{{len(self.objects)}}}")
        return Read(text, (*self.objects, cls), f"{what}.{self.what}".lstrip("."))

    def at(self, place: str) -> Read:
        """The same read of the layer that an expression gives."""
        text = self.text.replace("{own}", _state_of(place)).replace("{self}", place)
        return Read(text, self.objects, self.what)


class Guard:
    """All reads of a recognition as one expression.

    Args:
        reads: The reads, in the order in which they are tested; equal ones count once.
    """

    def __init__(self, reads: Iterable[Read]) -> None:
        self.reads = tuple(dict.fromkeys(reads))

    def of(self, cls: type | None) -> Guard:
        """The guard for the layers of a class; for a function as it is."""
        return self if cls is None else Guard(read.inside("{self}", cls) for read in self.reads)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Guard) and other.reads == self.reads

    def __hash__(self) -> int:
        return hash(self.reads)

    @cached_property
    def holds(self) -> Callable[..., bool]:
        """Says whether all would be read as before, of a layer and its class; of nothing for a function."""
        # No `__name__` in these globals: dynamo would look the objects up in the module of that name.
        text, names = self.inline("layer", "_tw_read")
        names |= {"_tw_compiling": torch.compiler.is_compiling, "_tw_type": type, "_tw_kept": KEPT}
        text = f"def holds(layer=None, cls=None):\n    try:\n        return {text}\n    except Exception:\n"
        compile_source(text + "        return False\n", "guard", names)
        holds: Callable[..., bool] = names["holds"]
        return holds

    def inline(self, layer: str, prefix: str) -> tuple[str, dict[str, Any]]:
        """The expression, to stand in the text of a function.

        It may raise any exception, which says that something is otherwise. Besides the names below it reads
        ``_tw_compiling`` (``torch.compiler.is_compiling``), ``_tw_type``, ``_tw_kept`` (:data:`KEPT`) and,
        for a guard that was not made by :meth:`of`, ``cls``.

        Args:
            layer: The expression of the layer.
            prefix: What the names of objects begin with.

        Returns:
            The text, and what the names in it stand for.
        """
        names: dict[int, str] = {}
        objects: dict[str, Any] = {}
        parts = []
        for read in self.reads:
            for value in read.objects:
                name = names.setdefault(id(value), f"{prefix}{len(names)}")
                objects[name] = value
            called = [names[id(value)] for value in read.objects]
            parts.append(read.text.format(*called, self=layer, cls="cls", own="{own}"))
        text = " and ".join(parts) or "True"
        if text.count("{own}") == 1:
            text = re.sub(r"\{own\}\['(\w+)'\]", rf"{layer}.\1", text)
        else:
            text = text.replace("{own}", f"(_tw_state := {layer}.__dict__)", 1).replace("{own}", "_tw_state")
        return text.replace("{own}", f"{layer}.__dict__"), objects

    def changed(self, layer: Any = None, cls: Any = None) -> str | None:
        """In words the first thing that would be read otherwise; None where all is as before."""
        if self.holds(layer, cls):
            return None
        for at, read in enumerate(self.reads):
            if not Guard(self.reads[: at + 1]).holds(layer, cls):  # one may name what the next goes on with
                return read.what
        return None


def same(place: str, value: Any, objects: Sequence[Any], what: str) -> Read:
    """The read of a value: the very object, or an equal number, text or tuple.

    Args:
        place: The expression that reads it.
        value: What was read.
        objects: Those in ``place``.
        what: Its name, in words.
    """
    if value is None or isinstance(value, bool):
        return Read(f"{place} is {value!r}", objects, what)
    if (text := _literal(value)) is not None:
        return Read(f"{place} == {text}", objects, what)
    given = None
    if isinstance(value, functools.partial) and not value.args:  # layers have one each
        given = _literal([*value.keywords.items()])
    if given is not None:
        test = f"_tw_type({place}) is {{{len(objects)}}} and {place}.func is {{{len(objects) + 1}}}"
        return Read(
            f"{test} and not {place}.args and [*{place}.keywords.items()] == {given}",
            (*objects, functools.partial, value.func),
            what,
        )
    if isinstance(value, MethodType):
        return Read(f"{place}.__func__ is {{{len(objects)}}}", (*objects, value.__func__), what)
    if isinstance(value, list):  # what is in it may be replaced in place
        tests = [f"{place}.__len__() == {len(value)}"]
        tests += [f"{place}[{at}] is {{{len(objects) + at}}}" for at in range(len(value))]
        return Read(" and ".join(tests), (*objects, *value), what)
    return Read(f"{place} is {{{len(objects)}}}", (*objects, value), what)


def _literal(value: Any) -> str | None:
    """The text of a number, a text, or a tuple or list of these; None for what has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or type(value) in (bool, int, float, str):
        return repr(value).replace("{", "{{").replace("}", "}}")
    if not isinstance(value, list | tuple):
        return None
    parts = [_literal(item) for item in value]
    if None in parts:
        return None
    inside = ", ".join(map(str, parts))
    return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(parts) == 1)})"


def of_global(function: FunctionType, name: str, value: Any) -> Read | None:
    """The read of a global name in a function; None for the modules that torch's own functions read."""
    scope = function.__globals__
    if isinstance(value, ModuleType) and _is_torchs(function):
        return None
    module = sys.modules.get(scope.get("__name__", ""))
    what = f"{scope.get('__name__', '')}.{name}"
    if isinstance(module, ModuleType) and vars(module) is scope:
        return same(f"{{0}}.{name}", value, (module,), what)
    return same(f"{{0}}[{name!r}]", value, (scope,), what)


def of_cell(function: FunctionType, name: str, cell: CellType) -> Read:
    """The read of a name that a function has from the one around it."""
    return same("{0}.cell_contents", cell.cell_contents, (cell,), f"{function.__qualname__}.{name}")


def of_entry(mapping: dict[Any, Any], key: Any, what: str) -> Read:
    """The read of what a dict has under a key, or that it has nothing there."""
    if key not in mapping:
        return Read(f"{key!r} not in {{0}}", (mapping,), f"the table of {what}")
    return same(f"{{0}}[{key!r}]", mapping[key], (mapping,), f"the table of {what}")


def of_attribute(owner: Any, name: str, value: Any) -> Read | None:
    """The read of an attribute of a module or a class; None for what cannot be told apart from itself.

    A dtype of torch is not worth a test either, nor is a module in another one.
    """
    if (
        isinstance(value, torch.dtype | ModuleType)
        or not name.isidentifier()
        or getattr(owner, name, None) is not value
    ):
        return None
    return same(f"{{0}}.{name}", value, (owner,), f"{getattr(owner, '__name__', owner)}.{name}")


def of_code(function: FunctionType) -> Read | None:
    """The read of a function's code, which tools that reload modules replace; None for torch's own."""
    if _is_torchs(function):
        return None
    # The question is asked of old compilers alone, which guard code by themselves and cannot read it.
    text = "({0}.__code__ is {1} or _tw_compiling())"
    return Read(text, (function, function.__code__), function.__qualname__)


def _is_torchs(function: FunctionType) -> bool:
    return str(function.__globals__.get("__name__")).startswith("torch.")


def of_forward(cls: type) -> Read:
    """The read of the forward that a class has, with or without what Twinkle put around it."""
    forward: Any = cls.forward  # type: ignore[attr-defined]
    around = getattr(forward, "__twinkle__", None)
    if around is not None and around.function is forward:
        forward = around.original
    ours = "(_tw_forward := {0}.forward).__twinkle__.function is _tw_forward"
    text = f"({{0}}.forward is {{1}} or {ours} and _tw_forward.__twinkle__.original is {{1}})"
    return Read(text, (cls, forward), f"{cls.__qualname__}.forward")


def of_method(name: str, function: Any) -> tuple[Read, Read]:
    """The reads of a method: the class has it, and the layer nothing of its own under that name."""
    return same(f"{{cls}}.{name}", function, (), name), Read(f"{name!r} not in {{own}}", (), name)


def place_of(layer: Any, path: str, place: str = "{self}") -> str:
    """The expression that reads a path of attributes the quick way.

    Args:
        layer: What the path starts from.
        path: Such as ``config.get_text_config().scales[0]``.
        place: The expression of ``layer``.

    Raises:
        AttributeError: There is no such attribute.
    """
    value = layer
    for step in path.replace("()", ".()").replace("[", ".[").split("."):
        if step == "()":
            value, place = value(), f"{place}()"
        elif step.startswith("["):
            value, place = value[int(step[1:-1])], f"{place}{step}"
        else:
            place = _attribute_place(value, step, place)
            value = getattr(value, step)
    return place


def _attribute_place(owner: Any, name: str, place: str) -> str:
    if isinstance(owner, nn.Module) and name not in owner.__dict__:
        if name in owner._modules:
            return f"{_state_of(place)}['_modules'][{name!r}]"
        if name in owner._parameters:
            # A hook may keep it as a mere attribute from now on (pruning, weight norm, FSDP's views).
            return f"{_state_of(place)}['_parameters'].get({name!r}, {place})"
    if type(owner).__getattribute__ not in _USUAL and (kept := _kept_as(owner, name)) is not None:
        return f"_tw_kept({place}, {kept!r})"
    return f"{place}.{name}"


def _kept_as(owner: Any, name: str) -> str | None:
    """The name under which an object that looks attributes up in a way of its own has the value of one.

    A config of transformers takes three microseconds to say which implementation of experts was chosen.
    """
    state, value = object.__getattribute__(owner, "__dict__"), getattr(owner, name)
    getter = inspect.getattr_static(type(owner), name, None)
    if isinstance(getter, property):
        try:
            *_, last = source.parse(getter.fget).body if isinstance(getter.fget, FunctionType) else (None,)
        except source.NoSource:
            return None
        given = last.value if isinstance(last, ast.Return) else None
        if not (isinstance(given, ast.Attribute) and isinstance(given.value, ast.Name)):
            return None
        name = given.attr
    return name if name in state and state[name] is value else None


def _state_of(place: str) -> str:
    """The expression of the ``__dict__`` of a layer."""
    if place == "{self}":
        return "{own}"
    return f"{place}_state" if place.isidentifier() and place.startswith(_AT) else f"{place}.__dict__"


def absent(layer: Any, name: str) -> Read:
    """The read that a layer has no such attribute."""
    homes = ["{own}"]
    if isinstance(layer, nn.Module):
        homes += [f"{{own}}['{home}']" for home in ("_parameters", "_modules", "_buffers")]
    return Read(" and ".join(f"{name!r} not in {home}" for home in homes), (), name)


def bare(place: str, layer: nn.Module, what: str) -> tuple[str, tuple[Read, ...]]:
    """The reads of a layer whose call a kernel leaves out: the forward of its class runs, and nothing else.

    Args:
        place: The expression of the layer.
        layer: The layer.
        what: Its name, in words.

    Returns:
        A shorter expression of the layer, for what is read of it after these, and the reads.
    """
    cls: Any = type(layer)
    here = _AT + re.sub(r"\W+", "_", what)
    state, (first, *others) = _state_of(here), _OWN
    own = " or ".join(
        (f"({state} := {here}.__dict__)[{first!r}]", *(f"{state}[{name!r}]" for name in others))
    )
    everywhere = " or ".join(f"{{{at}}}" for at in range(len(_EVERYWHERE)))
    return here, (
        Read(f"_tw_type({here} := {place}) is {{0}}", (cls,), what),
        Read(f"not ({own} or 'forward' in {state})", (), f"the hooks of {what}"),
        Read(f"not ({everywhere})", _EVERYWHERE, "the hooks on all modules"),
    )
