"""What a generated function can name besides its arguments, and the code it gets.

It stands where another function stood, and is read as that one was: annotations and callees are looked up
in its ``__globals__`` and closure, its source by the file and line in its code. So it has the globals and
the cells of the original, whose file, line and name its code bears, and Twinkle's own names are cells more.
"""

from __future__ import annotations

import ast
import re
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from twinkle.codegen import compile_tree, parse_source
from twinkle.match.symbolic.source import function_of_callable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Scope", "dispatch_behind", "is_generated"]

_REST = "_tw"
_OF_PROGRAM = re.compile(r"_tw\d*_guard")
"""The names of objects that guards compare with: a function that is pickled leaves them behind."""
_OURS = re.compile(r"_tw\d*_")
_KERNEL = re.compile(r"_tw\d*_(k\d+|traced_.*)")
"""The names of kernels, in whose place a function that is pickled takes the original."""
_WAYS = re.compile(r"_tw\d*_ways\d+")
"""The names of what finds the way of a call: that of a function that is pickled is the original."""
_QUICK = ("_tw0_k0", "_tw0_k1", "_tw0_k2", "_tw0_k3", "_tw1_k0", "_tw1_k1")
"""The names that have a slot: it is read in 2 ns, and a cell would take the kernel into a pickle."""


class Scope:
    """The names of a generated function: a fixed set of cells, so that its code can be replaced in place.

    Source text calls them ``_tw_name``. Those that a call reads each time are given as ``hot`` and have a
    cell each (1 ns a call for every cell, read or not); the others are attributes of one object.

    Args:
        original: What the function is to be taken for.
        hot: Names with a cell of their own.
        dispatch: What is behind the function, for :func:`dispatch_behind`.
    """

    def __init__(self, original: Callable[..., Any], hot: Iterable[str], dispatch: object = None) -> None:
        self.original = function_of_callable(original)
        self._rest = _Rest(original, dispatch)
        self._hot = {name: CellType(None) for name in hot}
        self._cells = {_REST: CellType(self._rest), **self._hot}
        if self.original is not None:
            names, cells = self.original.__code__.co_freevars, self.original.__closure__ or ()
            self._cells |= zip(names, cells, strict=True)

    def __contains__(self, name: str) -> bool:
        return name in self._hot or hasattr(self._rest, name)

    def __getitem__(self, name: str) -> Any:
        return self._hot[name].cell_contents if name in self._hot else getattr(self._rest, name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self._hot:
            setattr(self._rest, name, value)
        elif self._hot[name].cell_contents is not value:
            self._hot[name].cell_contents = value

    def items(self) -> list[tuple[str, Any]]:
        """The names that were set, and what they stand for."""
        rest = [(name, value) for name, value in self._rest.items() if name.startswith("_tw_")]
        return rest + [(name, cell.cell_contents) for name, cell in self._hot.items()]

    def function(self, text: str, title: str) -> FunctionType:
        """Make a function of source text that defines one named ``forward``."""
        code = self.code(text, title)
        names = {} if self.original is None else self.original.__globals__
        return FunctionType(code, names, "forward", None, tuple(self._cells[n] for n in code.co_freevars))

    def code(self, text: str, title: str) -> CodeType:
        """The code of source text that defines a function named ``forward``.

        All cells are its free variables, whichever it reads. What it names is set already.
        """
        tree = parse_source(text)
        function: Any = tree.body[0]
        # Never reached: it makes the names free variables, whichever of them the text reads.
        function.body.append(parse_source(f"({', '.join(self._cells)},)").body[0])
        outer: Any = parse_source(f"def scope({', '.join(self._cells)}): pass").body[0]
        outer.body = [_Names(self, self._line).visit(function)]
        tree.body = [ast.fix_missing_locations(outer)]
        like = self.original.__code__ if self.original is not None else None
        code = compile_tree(tree, like.co_filename if like else f"<twinkle {title}>")
        for _ in range(2):
            code = next(constant for constant in code.co_consts if isinstance(constant, CodeType))
        if like is None:
            return code
        named = {n: getattr(like, n) for n in ("co_name", "co_qualname") if hasattr(like, n)}
        # What looks up the globals that a function reads goes by these names, whatever its instructions are.
        names = dict.fromkeys((*code.co_names, *like.co_names))
        return code.replace(co_names=tuple(names), **named)

    @property
    def _line(self) -> int | None:
        return None if self.original is None else self.original.__code__.co_firstlineno


class _Rest:
    """The names that have no cell of their own, as attributes.

    A function that is pickled by value takes its cells along (cloudpickle, dill). In the place of this object
    goes one of the standard library, with which the same code runs the original.
    """

    __slots__ = ("__dict__", *_QUICK)

    def __init__(self, original: Callable[..., Any], dispatch: object) -> None:
        self._original = original
        self._dispatch = dispatch

    def items(self) -> Iterator[tuple[str, Any]]:
        """All attributes, and what they stand for."""
        yield from vars(self).items()
        for name in _QUICK:
            if hasattr(self, name):
                yield name, getattr(self, name)

    def __reduce__(self) -> Any:
        original = self._original
        names: dict[str, Any] = {}
        for name, value in self.items():
            names[name] = lambda *values: 0
            if _OF_PROGRAM.match(name):
                continue
            if value is original or _KERNEL.match(name):
                names[name] = original
            elif name.endswith("_pending"):
                names[name] = lambda args, kwargs: original(*args, **kwargs)
            elif _WAYS.match(name):
                names[name] = lambda key: False
            elif name.endswith("_there"):
                names[name] = lambda function, args, kwargs: function(*args, **kwargs)
            elif name.endswith("_instead"):
                names[name] = lambda index, failure, args, kwargs: original(*args, **kwargs)
            elif name.endswith("_odd"):
                names[name] = lambda index, result, *rest: result
            elif name.endswith("_fx"):
                names[name] = SimpleNamespace(_is_fx_tracing_flag=False)
            elif name.endswith("_forced"):
                names[name] = ()
            elif isinstance(value, (set, frozenset)):
                names[name] = set()
            elif isinstance(value, (type, BuiltinFunctionType)):
                names[name] = value
        return SimpleNamespace, (), names


class _Names(ast.NodeTransformer):
    """Turns the names without a cell into attributes, and puts all nodes on one line."""

    def __init__(self, scope: Scope, line: int | None) -> None:
        self.scope = scope
        self.line = line

    def visit(self, node: ast.AST) -> Any:
        if self.line is not None and "lineno" in node._attributes:
            here: Any = node
            here.lineno = here.end_lineno = self.line
            here.col_offset = here.end_col_offset = 0
        return super().visit(node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == _REST:
            # As a method it would be looked up in the class of the object first: 20 ns.
            called = ast.copy_location(ast.Name(f"{_REST}_called", ast.Store()), node)
            node.func = ast.copy_location(ast.NamedExpr(called, node.func), node)
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if not _OURS.match(node.id) or node.id in self.scope._hot or not hasattr(self.scope._rest, node.id):
            return node
        rest = ast.copy_location(ast.Name(_REST, ast.Load()), node)
        return ast.copy_location(ast.Attribute(rest, node.id, node.ctx), node)


def is_generated(function: FunctionType) -> bool:
    """Whether a function was made by :meth:`Scope.function`."""
    return _REST in function.__code__.co_freevars


def dispatch_behind(function: Any) -> Any:
    """What is behind a function that Twinkle generated, or behind its decorators; None for any other."""
    while function is not None:
        if isinstance(function, FunctionType) and is_generated(function):
            cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
            return cells[_REST].cell_contents._dispatch
        function = getattr(function, "__wrapped__", None)
    return None
