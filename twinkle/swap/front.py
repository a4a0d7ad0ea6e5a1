"""The function that stands in a class in the place of its ``forward`` and asks each instance for its mark.

A module with a kernel keeps its class; it has a mark in its ``__dict__``, a short text. Text is plain data:
copies have it, files with it load without Twinkle, and a compiler guards on it by value. It begins with some
letters that are new in each process, so that a mark from a file means nothing in another.

The function keeps the globals, the name and the defaults of the original, which is its ``__wrapped__``. What
it knows besides are cells of its closure, and its code is replaced in place as kernels come and go: whoever
holds it (a wrapper, a bound method) has the newest. Whoever sets ``Class.forward`` afterwards takes it out.
"""

from __future__ import annotations

import secrets
import sys
import threading
import weakref
from inspect import Parameter
from itertools import count
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

from twinkle.codegen import compile_source
from twinkle.swap.code import CallForm
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from twinkle.swap.generated import LayerDispatch

__all__ = ["MARK", "Front", "dispatch_marked", "new_mark", "owner_of_forward"]

MARK = "_tw"
"""The attribute of a module with a kernel, and of the class of its forward, where it is None."""

_SLOTS = 4
_CELLS = ("_tw_original", "_tw_table", *(f"_tw_{kind}{n}" for kind in "fm" for n in range(_SLOTS)))
_PROCESS = secrets.token_hex(4)
_numbers = count(1)
_marked: weakref.WeakValueDictionary[str, LayerDispatch] = weakref.WeakValueDictionary()


class Front:
    """What stands as ``forward`` in one class.

    Args:
        owner: The class that defines the forward.

    Attributes:
        original: The function that stood there.
        function: The one that stands there now.
        slots: The dispatches that marks of instances mean; None where there was one. Each keeps its place,
            which compiled graphs look at.
        made: Every dispatch for the class that is in use or planned, by core class and candidates.
        on_code: Called with the function whenever its code is another.
    """

    def __init__(self, owner: type) -> None:
        self.owner = owner
        self.original: Any = vars(owner)["forward"]
        self.slots: list[LayerDispatch | None] = []
        self.made: weakref.WeakValueDictionary[Any, LayerDispatch] = weakref.WeakValueDictionary()
        self.on_code: Callable[[Any], None] | None = None
        self._lock = threading.RLock()
        self._cells = {name: CellType(None) for name in _CELLS}
        self._cells["_tw_original"].cell_contents = self.original
        self._cells["_tw_table"].cell_contents = {}
        self._form = CallForm(self.original, 1)
        first = self._form.parameters[0]
        self._self = f"{first.name}[0]" if first.kind is Parameter.VAR_POSITIONAL else first.name
        code = self._code()
        cells = tuple(self._cells[name] for name in code.co_freevars)
        made = FunctionType(
            code, self.original.__globals__, self.original.__name__, self.original.__defaults__, cells
        )
        made.__kwdefaults__ = self.original.__kwdefaults__
        made.__dict__.update(self.original.__dict__)
        for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
            setattr(made, name, getattr(self.original, name))
        made.__wrapped__ = self.original  # type: ignore[attr-defined]
        made.__twinkle__ = self  # type: ignore[attr-defined]
        self.function = made

    @classmethod
    def of(cls, core: type) -> Front | None:
        """The front that stands where a class has its forward from, if one does."""
        function: Any = getattr(core, "forward", None)
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
            if vars(self.owner).get("forward") is self.original:
                type.__setattr__(self.owner, MARK, None)
                type.__setattr__(self.owner, "forward", self.function)

    def let_go(self) -> None:
        """Forget what no module is marked with, and leave the class where nothing is left."""
        with self._lock:
            if not self._sweep():
                return
            self.rewrite()
            if not any(self.slots) and vars(self.owner).get("forward") is self.function:
                type.__setattr__(self.owner, "forward", self.original)
                type.__delattr__(self.owner, MARK)

    def _sweep(self) -> bool:
        swept = False
        for n, dispatch in enumerate(self.slots):
            if dispatch is None or dispatch.instances:
                continue
            # A copy is not among the instances of the dispatch, but holds the very text of the mark.
            if sys.getrefcount(dispatch.mark) <= dispatch.holders:
                self.slots[n], swept = None, True
        return swept

    def rewrite(self) -> None:
        """Write the function for the dispatches there are."""
        for n, dispatch in enumerate(self.slots[:_SLOTS]):
            self._cells[f"_tw_f{n}"].cell_contents = dispatch and dispatch.function
            self._cells[f"_tw_m{n}"].cell_contents = dispatch and dispatch.mark
        more = {dispatch.mark: dispatch.function for dispatch in self.slots[_SLOTS:] if dispatch is not None}
        self._cells["_tw_table"].cell_contents = more
        self.function.__code__ = self._code()
        if self.on_code is not None:
            self.on_code(self.function)

    def _code(self) -> Any:
        chosen = "_tw_original"
        if any(self.slots):
            tests = [f"_tw_f{n} if _tw == _tw_m{n} else" for n, d in enumerate(self.slots[:_SLOTS]) if d]
            last = "_tw_table.get(_tw, _tw_original)" if any(self.slots[_SLOTS:]) else "_tw_original"
            chosen = f"(_tw_original if (_tw := {self._self}.{MARK}) is None else {' '.join(tests)} {last})"
        names = ", ".join(_CELLS)
        # What stands after the return never runs: it makes the code have the same cells at all times.
        lines = [f"def _tw_make({names}):", f"    {self._form.head('forward')}"]
        lines += [
            f"        return {chosen}({self._form.arguments})",
            f"        {names}",
            "    return forward",
            "",
        ]
        scope: dict[str, Any] = {}
        compile_source("\n".join(lines), self.original.__qualname__, scope)
        template = scope["_tw_make"](*[None] * len(_CELLS))
        return template.__code__.replace(co_name=self.original.__code__.co_name)


def new_mark() -> str:
    """A text that no other module of any process is marked with."""
    return f"{_PROCESS}:{next(_numbers)}"


def dispatch_marked(module: nn.Module) -> LayerDispatch | None:
    """The dispatch that a module is marked with; None without a mark that means something here."""
    mark = module.__dict__.get(MARK)
    return _marked.get(mark) if isinstance(mark, str) else None


def owner_of_forward(core: type) -> type | None:
    """The class in which a front for ``core`` can stand; None where its forward is no plain function."""
    owner = next((base for base in core.__mro__ if "forward" in vars(base)), None)
    plain = isinstance(own_forward(core), FunctionType) and isinstance(vars(owner)["forward"], FunctionType)
    return owner if plain else None
