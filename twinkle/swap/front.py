"""The function that stands in a class in the place of its ``forward`` and asks each instance for its mark.

A module with a kernel keeps its class; it has a mark in its ``__dict__``, a short text. Text is plain data:
copies have it, files with it load without Twinkle, and a compiler guards on it by value. It begins with some
letters that are new in each process, so that a mark from a file means nothing in another.

The text of every dispatch stands in this one function. Its code is replaced in place as kernels come and go:
whoever holds it (a wrapper, a bound method) has the newest, and a compiler, which guards on the code of every
function but a module's ``forward``, goes on with its graphs. Whoever sets ``Class.forward`` takes it out.
"""

from __future__ import annotations

import contextlib
import functools
import re
import secrets
import sys
import weakref
from itertools import count
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from twinkle import forks
from twinkle.swap.code import CallForm
from twinkle.swap.graphs import forget_graphs
from twinkle.swap.scope import Scope
from twinkle.swap.stand_ins import put_stand_ins, take_stand_ins
from twinkle.swap.tensors import constant
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from twinkle.swap.generated import LayerDispatch

__all__ = [
    "LEFT_ALONE",
    "MARK",
    "USERS",
    "Front",
    "dispatch_marked",
    "meaning_of",
    "new_mark",
    "owner_of_forward",
]

MARK = "_tw"
"""The attribute of a module with a kernel, and of the class of its forward, where it is None."""

USERS = "u"
"""The end of marks for kernels that are not all Twinkle's own: fused steps leave such layers alone."""

_HOT = ("_tw_original", "_tw_type", "_tw0_mark", "_tw1_mark")
"""The names that the function has a cell for."""

_PROCESS = secrets.token_hex(4)
LEFT_ALONE = f"{_PROCESS}:0"
"""The mark of a module that was decided about, and runs its original."""
_numbers = count(1)
_marked: weakref.WeakValueDictionary[str, LayerDispatch] = weakref.WeakValueDictionary()


class Front:
    """What stands as ``forward`` in one class.

    Args:
        owner: The class that defines the forward.

    Attributes:
        original: The function that stood there.
        function: The one that stands there now. The original is its ``__wrapped__``.
        slots: The dispatches that marks of instances mean; None where there was one. Each keeps its place,
            which compiled graphs look at.
        made: Every dispatch for the class that is in use or planned, by core class, candidates and pin.
        on_code: Called with the function whenever its code is another.
        asks: It stays without a dispatch, and asks about instances whose mark means nothing.
    """

    def __init__(self, owner: type) -> None:
        self.owner = owner
        self.original: Any = vars(owner)["forward"]
        self.slots: list[LayerDispatch | None] = []
        self.made: weakref.WeakValueDictionary[Any, LayerDispatch] = weakref.WeakValueDictionary()
        self.on_code: Callable[[Any], None] | None = None
        self.asks = False
        self._lock = forks.lock()
        self._form = CallForm(self.original, 1)
        self._self = self._form.first
        self._scope = Scope(self.original, _HOT)
        self._scope["_tw_original"] = self.original
        self._scope["_tw_type"] = type
        self._scope["_tw_Exception"] = Exception
        self.function: Any = self._scope.function(self._text(), self.original.__qualname__)
        self._form.dress(self.function, self.original)
        self.function.__dict__.pop("__signature__", None)
        self.function.__dict__.update(self.original.__dict__)
        self.function.__dict__.update({"__wrapped__": self.original, "__twinkle__": self})

    def __reduce__(self) -> Any:
        # A class that is pickled by value takes the function along, which runs the original.
        return type(None), ()

    @classmethod
    def of(cls, core: type) -> Front | None:
        """The front that stands where a class has its forward from, if one does."""
        return cls.behind(getattr(core, "forward", None))

    @classmethod
    def behind(cls, function: Any) -> Front | None:
        """The front whose function this is, if it is one's."""
        front = getattr(function, "__twinkle__", None)
        return front if isinstance(front, cls) and front.function is function else None

    def add(self, dispatch: LayerDispatch) -> None:
        """Stand in the class, and give instances with the dispatch's mark to it."""
        with self._lock:
            if dispatch not in self.slots:
                self._sweep()
                if None not in self.slots:
                    self.slots.append(None)
                self.slots[self.slots.index(None)] = dispatch
                _marked[dispatch.mark] = dispatch
                self.rewrite()
                dispatch.holders = sys.getrefcount(dispatch.mark)
            put_stand_ins(dispatch, dispatch_marked)
            stands_now = self._stand()
        if stands_now:
            forget_graphs(self.owner)

    def ask(self, ask: Callable[[Any], bool], traced: Callable[[type, str | None], int]) -> None:
        """Stand in the class, with or without a dispatch, and ask about instances that nobody has met.

        Args:
            ask: Called with an instance that has no mark, or one from elsewhere; whether the call is to go
                again, to what is ``forward`` by then.
            traced: Called with its class and mark instead where a compiler traces, and taken for a constant.
        """
        with self._lock:
            self._scope["_tw_left"] = LEFT_ALONE
            self._scope["_tw_compiling"] = torch.compiler.is_compiling
            self._scope["_tw_ask"] = ask
            self._scope["_tw_traced"] = constant(traced)
            self.asks = True
            self.rewrite()
            stands_now = self._stand()
        if stands_now:
            forget_graphs(self.owner)

    def ask_no_more(self) -> None:
        """Leave the class where nothing is left but the question."""
        with self._lock:
            self.asks = False
            self.rewrite()
            self._stand_back()

    def _stand(self) -> bool:
        """Stand in the class, unless something else than its forward does; whether that is new."""
        if vars(self.owner).get("forward") is not self.original:
            return False
        type.__setattr__(self.owner, MARK, None)
        type.__setattr__(self.owner, "forward", self.function)
        return True

    def _stand_back(self) -> None:
        if not (self.asks or any(self.slots)) and vars(self.owner).get("forward") is self.function:
            type.__setattr__(self.owner, "forward", self.original)
            type.__delattr__(self.owner, MARK)

    def stands_in(self, core: type) -> bool:
        """Whether the function is what a class has for its forward, or is inside a wrapper there."""
        return _holds(getattr(core, "forward", None), self.function, 8)

    def let_go(self, caller: LayerDispatch | None = None) -> None:
        """Forget what no module is marked with, and leave the class where nothing is left.

        Args:
            caller: A dispatch that is asked in a call of the function, which holds the mark meanwhile.
        """
        with self._lock:
            if not self._sweep(caller):
                return
            self.rewrite()
            self._stand_back()

    def _sweep(self, caller: LayerDispatch | None = None) -> bool:
        swept = False
        for n, dispatch in enumerate(self.slots):
            if dispatch is None or dispatch.instances:
                continue
            # A copy is not among the instances of the dispatch, but holds the very text of the mark.
            if sys.getrefcount(dispatch.mark) <= dispatch.holders + (dispatch is caller):
                self.slots[n], swept = None, True
                _marked.pop(dispatch.mark, None)  # one with a text like it is met anew
                take_stand_ins(dispatch)
        return swept

    def rewrite(self) -> None:
        """Write the function for the dispatches there are."""
        with self._lock:
            for n, dispatch in enumerate(self.slots):
                if dispatch is not None:
                    self._scope[f"_tw{n}_mark"] = dispatch.mark
                    for name, value in dispatch.names.items():
                        self._scope[_in_slot(name, n)] = value
            self.function.__code__ = self._scope.code(self._text(), self.original.__qualname__)
            if self.on_code is not None:
                self.on_code(self.function)

    def _text(self) -> str:
        lines = [self._form.head("forward")]
        if self.asks or any(self.slots):
            # Not every first argument is of the class: programs call `Class.forward` with what is like it.
            lines += ["    try:", f"        _tw_mark = {self._self}.{MARK}"]
            lines += ["    except _tw_Exception:", "        _tw_mark = None", "    if _tw_mark is None:"]
            lines += [*self._question("        "), f"        return _tw_original({self._form.arguments})"]
        for n, dispatch in enumerate(self.slots):
            if dispatch is not None:
                lines.append(f"    if _tw_mark == _tw{n}_mark:")
                lines += [f"    {line}" for line in _in_slot(dispatch.text, n).splitlines()[1:]]
        if self.asks:
            lines += ["    if _tw_mark != _tw_left:", *self._question("        ")]
        return "\n".join([*lines, f"    return _tw_original({self._form.arguments})", ""])

    def _question(self, indent: str) -> list[str]:
        """The lines that ask about an instance."""
        if not self.asks:
            return []
        again = f"    return _tw_type({self._self}).forward({self._form.arguments})"
        traced = f"    _tw_traced(_tw_type({self._self}), _tw_mark)"
        asked = f"elif _tw_ask({self._self}):"
        return [f"{indent}{line}" for line in ("if _tw_compiling():", traced, asked, again)]


def _in_slot(text: str, number: int) -> str:
    """The names of a dispatch, in a text or as such, for one of several dispatches in a function."""
    return re.sub(r"\b_tw_(?!type\b)", f"_tw{number}_", text)


def new_mark(end: str = "") -> str:
    """A text that no other module of any process is marked with.

    Args:
        end: What it ends with; see :data:`USERS`.
    """
    return f"{_PROCESS}:{next(_numbers)}{end}"


def meaning_of(mark: object) -> LayerDispatch | None:
    """The dispatch that a mark means; None for one that means nothing in this process."""
    return _marked.get(mark) if isinstance(mark, str) else None


def dispatch_marked(module: nn.Module) -> LayerDispatch | None:
    """The dispatch that a module is marked with; None without a mark that means something here."""
    return meaning_of(module.__dict__.get(MARK))


def _holds(wrapper: Any, wanted: Any, depth: int) -> bool:
    """Whether a function is another one, or has it in its closure, defaults or attributes."""
    if wrapper is wanted or depth == 0:
        return wrapper is wanted
    if isinstance(wrapper, functools.partial):
        inside = [wrapper.func, *wrapper.args, *wrapper.keywords.values()]
    elif isinstance(wrapper, FunctionType):
        inside = [*(wrapper.__defaults__ or ()), *vars(wrapper).values()]
        for cell in wrapper.__closure__ or ():
            with contextlib.suppress(ValueError):  # empty
                inside.append(cell.cell_contents)
    else:
        return False
    return any(_holds(one, wanted, depth - 1) for one in inside)


def owner_of_forward(core: type) -> type | None:
    """The class in which a front for ``core`` can stand; None where its forward is no plain function."""
    owner = next((base for base in core.__mro__ if "forward" in vars(base)), None)
    plain = isinstance(own_forward(core), FunctionType) and isinstance(vars(owner)["forward"], FunctionType)
    return owner if plain else None
