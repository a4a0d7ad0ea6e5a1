"""What holds a function besides names of modules and classes: finding it, and putting another one there.

A table of functions, an attribute of an object, a ``functools.partial`` or a default argument goes on with
the original after the name is replaced. The garbage collector knows every object that refers to it, so the
search does not depend on who made the reference, where it is, or when:

- rebound: values of dicts of every class, items of lists, deques and sets, attributes of instances, cells of
  closures, default arguments, partials; and, where one of these or a class holds them, tuples, frozensets,
  bound, static and class methods with the function inside, which are made anew;
- named, never changed: keys of dicts, attributes of objects that hash by what they hold, what C code keeps
  (``functools.lru_cache``), properties, and what is inside something that cannot be changed;
- left alone: Twinkle's own records, kernels and generated functions, ``__wrapped__`` and
  ``unittest.mock`` (which are to give the original back), what only a running call has in hand.

No attribute is looked up through a class of the program, and no method of its containers runs.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections import deque
from types import CellType, FrameType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from twinkle.swap.scope import is_generated

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

__all__ = ["Held", "rebind"]

_DEEPEST = 8
"""How many containers may stand around a function."""
_MOST = 5000
"""More holders than this are data, and no tables of functions."""
_LEFT_ALONE = (__name__.partition(".")[0], "unittest")
_LEFT_PLACES = (".__wrapped__", " (default)['original']")
"""What is to give the original back, and the argument by which a kernel is handed it."""
_BY_IDENTITY: tuple[Any, ...] = (object.__hash__, None)
_WRAPPERS = (tuple, frozenset, MethodType, staticmethod, classmethod)
_INNER = (dict, list, set, deque, CellType, functools.partial, property, *_WRAPPERS)
"""What has no name of its own: the search goes on with what holds it."""


class Held:
    """A place that held an object, and holds another one now.

    Attributes:
        where: ``module.TABLE['key']`` or the like, for messages.
        original: What stood there.
        replacement: What was put there.
    """

    __slots__ = ("_swap", "original", "replacement", "where")

    def __init__(self, where: str, swap: Callable[[Any, Any], bool], original: Any, replacement: Any) -> None:
        self.where = where
        self.original = original
        self.replacement = replacement
        self._swap = swap

    def put_back(self) -> bool:
        """Put what stood there back; false where something else stands there by now."""
        return self._swap(self.replacement, self.original)

    def __repr__(self) -> str:
        return f"<Held {self.where}>"


def rebind(
    original: Any,
    replacement: Any,
    *,
    keep: Iterable[tuple[dict[str, Any], str]] = (),
    kernels: Collection[Any] = (),
    homes: Collection[object] = (),
) -> tuple[list[Held], list[str]]:
    """Put ``replacement`` in every place that holds ``original``.

    Args:
        original: What to look for.
        replacement: What to put there.
        keep: Globals and a name in them, each of which a kernel has for the original.
        kernels: Functions that go on with the original, with their closures and default arguments.
        homes: Modules that do so with all of their tables.

    Returns:
        The places that were changed, and the names of those that cannot be.
    """
    graph = _Graph(original, (replacement, *kernels), homes)
    kept = {(id(names), name) for names, name in keep}
    held: list[Held] = []
    named: list[str] = []

    def put(old: Any, new: Any, inside: str) -> bool:
        """Rebind in all that holds ``old``; whether that was anybody."""
        found = False
        for holder in graph.holders(old):
            for place, swap in _places(holder, old, graph):
                if place in _LEFT_PLACES or (id(holder), place[1:]) in kept:
                    continue
                found = True
                where = f"{graph.name(holder)}{place}{inside}"
                if swap is not None and _tried(swap, old, new):
                    held.append(Held(where, swap, old, new))
                else:
                    named.append(where)
            if isinstance(holder, _WRAPPERS):
                made = _made_anew(holder, old, new)
                before = len(named)
                text = "" if isinstance(holder, (MethodType, staticmethod, classmethod)) else "(…)"
                if made is None:
                    named.append(f"{graph.name(holder)}{inside}")
                found |= made is None or put(holder, made, f"{text}{inside}") or len(named) > before
        return found

    put(original, replacement, "")
    return held, list(dict.fromkeys(named))


def _tried(swap: Callable[[Any, Any], bool], old: Any, new: Any) -> bool:
    try:
        return swap(old, new)
    except (AttributeError, TypeError, ValueError):  # of C code, frozen or read-only
        return False


class _Graph:
    """What refers to an object, and what refers to that, up to things that have a name."""

    def __init__(self, start: Any, left_alone: Iterable[Any], homes: Collection[object]) -> None:
        self._homes = homes
        self.namespaces = {
            id(ModuleType.__getattribute__(module, "__dict__")): name
            for name, module in list(sys.modules.items())
            if issubclass(type(module), ModuleType)
        }
        self._above: dict[int, list[Any]] = {}
        self._skip = {id(one) for one in left_alone}
        for one in left_alone:
            parts = [getattr(one, f"__{what}__", None) for what in ("closure", "defaults", "kwdefaults")]
            self._skip |= {id(part) for part in parts} | {id(cell) for cell in parts[0] or ()}
        self._skip |= {id(self), id(vars(self)), id(self._above), id(start), *_in_hand()}
        level = [start]
        for _ in range(_DEEPEST):
            level = self._climb(level)
        self._drop_ours()

    def _climb(self, level: list[Any]) -> list[Any]:
        """Note what refers to the objects of a level; returns those of it that have no name."""
        wanted = {id(one): one for one in level}
        holders = gc.get_referrers(*level) if level else []
        self._skip |= {id(level), id(wanted), id(holders)}
        upper: list[Any] = []
        self._skip.add(id(upper))
        for holder in holders if len(holders) <= _MOST else ():
            if id(holder) in self._skip or type(holder).__name__.endswith("iterator"):
                continue
            for child in {id(one) for one in gc.get_referents(holder)} & wanted.keys():
                above = self._above.setdefault(child, [])
                self._skip.add(id(above))
                above.append(holder)
            named = not isinstance(holder, _INNER) or id(holder) in self.namespaces
            if not named and id(holder) not in self._above:
                upper.append(holder)
        return upper

    def holders(self, child: Any) -> list[Any]:
        """What refers to an object, but for what is left alone."""
        return self._above.get(id(child), [])

    def _drop_ours(self) -> None:
        """Take out what is Twinkle's own, and what nobody holds but for a call that runs."""
        verdicts: dict[int, bool] = {}

        def stays(holder: Any, depth: int = 0) -> bool:
            if id(holder) in verdicts:
                return verdicts[id(holder)]
            verdicts[id(holder)] = False  # for circles
            if self._is_left_alone(holder):
                return False
            if not isinstance(holder, _INNER) or id(holder) in self.namespaces:
                verdicts[id(holder)] = True
            else:
                above = self._above.get(id(holder), [])
                verdicts[id(holder)] = depth < _DEEPEST and any(stays(one, depth + 1) for one in above)
            return verdicts[id(holder)]

        for child, above in list(self._above.items()):
            self._above[child] = [holder for holder in above if stays(holder)]

    def _is_left_alone(self, holder: Any) -> bool:
        kind = type(holder)
        if kind is FrameType:
            return True
        if kind is FunctionType:
            # Those that a dispatcher calls in a trace have the original among their globals.
            return is_generated(holder) or "_tw_original" in holder.__globals__ or _from(holder.__module__)
        if id(holder) in self.namespaces:
            return _from(self.namespaces[id(holder)]) or self.namespaces[id(holder)] in self._homes
        cls = holder if issubclass(kind, type) else kind
        return _from(type.__getattribute__(cls, "__dict__").get("__module__"))

    def name(self, holder: Any) -> str:
        """A name for a holder: that of its module, class or function, or of the first that holds it."""
        seen: set[int] = set()
        path = ""
        while id(holder) not in seen:
            seen.add(id(holder))
            kind = type(holder)
            if id(holder) in self.namespaces:
                return f"{self.namespaces[id(holder)]}{path}"
            if issubclass(kind, (type, FunctionType)):
                return f"{holder.__module__}.{holder.__qualname__}{path}"
            if not isinstance(holder, _INNER):
                return f"an object of {kind.__module__}.{kind.__qualname__}{path}"
            above = self.holders(holder)
            if not above:
                break
            places = list(_places(above[0], holder, self))
            owner = _dict_of(above[0]) is holder or issubclass(type(above[0]), type)
            path = f"{places[0][0] if places and not owner else ''}{path}"
            holder = above[0]
        return f"a {type(holder).__name__} without a name{path}"


def _from(module: object) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in _LEFT_ALONE


def _in_hand() -> Iterator[int]:
    """The identities of what our own functions on the stack have in hand."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield id(frame)
        if _from(frame.f_globals.get("__name__")):
            values = frame.f_locals
            yield id(values)
            yield from map(id, list(values.values()))
        frame = frame.f_back


def _made_anew(wrapper: Any, old: Any, new: Any) -> Any:
    """The same with another object inside; None for a class of the program's, or what cannot be made."""
    kind = type(wrapper)
    if kind in (tuple, frozenset):
        return kind(new if one is old else one for one in wrapper)
    if kind is MethodType:
        return MethodType(new, wrapper.__self__) if wrapper.__func__ is old else None
    return kind(new) if kind in (staticmethod, classmethod) else None


def _places(holder: Any, old: Any, graph: _Graph) -> Iterator[tuple[str, Callable[[Any, Any], bool] | None]]:
    """Where a holder has an object: the step of a name, and what puts another one there (None: nothing)."""
    kind = type(holder)
    if isinstance(holder, dict):
        above = graph.holders(holder)
        default = any(type(one) is FunctionType and one.__kwdefaults__ is holder for one in above)
        for place, swap in _places_in_dict(holder, old, graph):
            yield f"{' (default)' if default else ''}{place}", swap
    elif isinstance(holder, (list, deque)):
        for at, value in enumerate(list(holder)):
            if value is old:
                yield f"[{at}]", functools.partial(_in_list, holder, at)
    elif isinstance(holder, set):
        yield "{…}", functools.partial(_in_set, holder)
    elif kind is CellType:
        yield "", functools.partial(_in_cell, holder)
    elif isinstance(holder, functools.partial):
        yield " (partial)", functools.partial(_in_partial, holder)
    elif kind is FunctionType:
        if any(one is old for one in (holder.__defaults__, holder.__kwdefaults__)):
            yield " (default)", functools.partial(_in_defaults, holder)
        elif holder.__closure__ is old:
            yield " (closure)", None
    elif not isinstance(holder, _WRAPPERS) and not issubclass(kind, (type, ModuleType)):
        yield from _places_in_object(holder, old)


def _places_in_object(holder: Any, old: Any) -> Iterator[tuple[str, Callable[[Any, Any], bool] | None]]:
    direct = gc.get_referents(holder)  # before a dict is made for attributes that had none
    names = _dict_of(holder)
    slots = list(_slots(holder, old))
    places: list[Any] = []
    if isinstance(names, dict) and names is not old:
        places = [
            (f".{name}", functools.partial(_in_dict, names, name))
            for name, value in list(dict.items(names))
            if value is old
        ]
    inline = 0 if any(one is names for one in direct) else len(places)
    # A key of some dict may hash by what it holds: it would not be found again.
    fixed = type(holder).__hash__ not in _BY_IDENTITY
    yield from [(place, None if fixed else swap) for place, swap in [*slots, *places]]
    if names is not old and sum(one is old for one in direct) > len(slots) + inline:
        yield "", None  # C code has it


def _places_in_dict(
    holder: dict[Any, Any], old: Any, graph: _Graph
) -> Iterator[tuple[str, Callable[[Any, Any], bool] | None]]:
    owner = next((one for one in graph.holders(holder) if _owns(one, holder)), None)
    plain = owner is not None or id(holder) in graph.namespaces
    for key, value in list(dict.items(holder)):
        if value is old:
            swap = functools.partial(_in_dict, holder, key)
            if owner is not None and issubclass(type(owner), type):
                swap = functools.partial(_in_class, owner, key)
            yield f".{key}" if plain else f"[{key!r}]", swap
        elif key is old:
            yield " (a key)", None


def _owns(owner: Any, names: dict[Any, Any]) -> bool:
    """Whether a dict has the attributes of an object or a class."""
    if not issubclass(type(owner), type):
        return _dict_of(owner) is names
    seen = type.__getattribute__(owner, "__dict__")
    return len(seen) == len(names) and all(seen.get(name, owner) is value for name, value in names.items())


def _slots(holder: Any, old: Any) -> Iterator[tuple[str, Callable[[Any, Any], bool]]]:
    for cls in type(holder).__mro__:
        for name, slot in list(type.__getattribute__(cls, "__dict__").items()):
            if type(slot).__name__ != "member_descriptor" or cls.__module__ == "builtins":
                continue
            try:
                found = slot.__get__(holder)
            except (AttributeError, TypeError):
                continue
            if found is old:
                yield f".{name}", functools.partial(_in_slot, holder, slot)


def _dict_of(holder: Any) -> object:
    try:
        return object.__getattribute__(holder, "__dict__")
    except (AttributeError, TypeError):
        return None


# Each puts ``new`` where ``old`` stands; false where something else stands there.


def _in_dict(names: dict[Any, Any], key: Any, old: Any, new: Any) -> bool:
    if dict.get(names, key) is not old:
        return False
    dict.__setitem__(names, key, new)
    return True


def _in_list(items: Any, at: int, old: Any, new: Any) -> bool:
    kind: Any = list if isinstance(items, list) else deque
    if at >= len(items) or kind.__getitem__(items, at) is not old:
        return False
    kind.__setitem__(items, at, new)
    return True


def _in_set(items: set[Any], old: Any, new: Any) -> bool:
    if not set.__contains__(items, old):
        return False
    set.discard(items, old)
    set.add(items, new)
    return True


def _in_cell(cell: CellType, old: Any, new: Any) -> bool:
    if cell.cell_contents is not old:
        return False
    cell.cell_contents = new
    return True


def _in_partial(made: functools.partial[Any], old: Any, new: Any) -> bool:
    function, args, keywords = made.func, made.args, made.keywords
    if args is not old and not any(one is old for one in (function, *args, *keywords.values())):
        return False
    args = new if args is old else tuple(new if one is old else one for one in args)
    keywords = {name: new if one is old else one for name, one in keywords.items()}
    state: Any = (new if function is old else function, args, keywords, vars(made))
    made.__setstate__(state)  # type: ignore[attr-defined]
    return True


def _in_defaults(function: FunctionType, old: Any, new: Any) -> bool:
    if function.__defaults__ is old:
        function.__defaults__ = new
    elif function.__kwdefaults__ is old:
        function.__kwdefaults__ = new
    else:
        return False
    return True


def _in_class(cls: type, name: str, old: Any, new: Any) -> bool:
    if type.__getattribute__(cls, "__dict__").get(name) is not old:
        return False
    type.__setattr__(cls, name, new)
    return True


def _in_slot(holder: Any, slot: Any, old: Any, new: Any) -> bool:
    if slot.__get__(holder) is not old:
        return False
    slot.__set__(holder, new)
    return True
