"""The names of one call of a function, and the binding of values to them."""

from __future__ import annotations

import ast
import builtins
from typing import TYPE_CHECKING

from twinkle.match import reads
from twinkle.match.symbolic.terms import Ref, Term

if TYPE_CHECKING:
    from types import FunctionType
    from typing import Any, Protocol

    from twinkle.match.reads import Read
    from twinkle.match.symbolic.idioms import Idioms
    from twinkle.match.symbolic.terms import Arena

    class Execution(Protocol):
        """The execution that a call is a part of (``Run`` in ``execute.py``), as its names need it."""

        arena: Arena
        idioms: Idioms
        inline: int
        assume: dict[str, Any]
        instance: Any
        calls: list[tuple[str, Term]]
        losses: list[Term]
        effects: list[str]
        guards: list[Term]
        reads: dict[Read | None, None]
        none: Term
        cls: type | None
        inside: list[FunctionType]
        loops: int

        def step(self) -> None:
            """Count a statement."""
            ...

        def function(self, function: FunctionType, args: list[Term], kwargs: dict[str, Term]) -> Term:
            """The term of a call of ``function``."""
            ...

        def embed(self, value: Any, called: str | None = None) -> Term:
            """A Python object as a term."""
            ...

        def unknown(self, why: str) -> Term:
            """A term for what is not followed."""
            ...

        def effect(self, what: str) -> None:
            """Record an effect."""
            ...


__all__ = ["Names", "TooLarge", "Unsupported", "is_fresh"]


class Unsupported(Exception):
    """The source has a construct that the executor does not follow."""


class TooLarge(Unsupported):
    """Following the source takes more steps than it is worth."""


class Names:
    """The local names of one call of ``function``, and the terms that they stand for."""

    def __init__(self, run: Execution, function: FunctionType) -> None:
        self.run = run
        self.idioms = run.idioms
        self.term = run.arena.term
        self.function = function
        self.env: dict[str, Term] = {}
        cells = function.__closure__ or ()
        self.free = dict(zip(function.__code__.co_freevars, cells, strict=False))

    def bind(self, node: ast.FunctionDef, args: list[Term], kwargs: dict[str, Term]) -> None:
        """Bind the parameters to what is given, as Python does."""
        spec = node.args
        names = [arg.arg for arg in (*spec.posonlyargs, *spec.args)]
        kwargs = dict(kwargs)
        if any(arg.op == "star" for arg in args) or None in kwargs:
            raise Unsupported("a starred argument")
        for name, arg in zip(names, args, strict=False):
            self.env[name] = arg
        if len(args) > len(names):
            if spec.vararg is None:
                raise Unsupported("too many arguments")
            self.env[spec.vararg.arg] = self.term("tuple", *args[len(names) :])
        elif spec.vararg is not None:
            self.env[spec.vararg.arg] = self.run.unknown("*" + spec.vararg.arg)
        defaults = dict(zip(reversed(names), reversed(self.function.__defaults__ or ()), strict=False))
        defaults.update(self.function.__kwdefaults__ or {})
        for name in (*names, *(arg.arg for arg in spec.kwonlyargs)):
            if name in kwargs:
                self.env[name] = kwargs.pop(name)
            elif name not in self.env:
                if name not in defaults:
                    raise Unsupported(f"no argument for {name}")
                self.env[name] = self.run.embed(defaults[name])
        if kwargs and spec.kwarg is None:
            raise Unsupported("unexpected keyword arguments")
        if spec.kwarg is not None:
            self.env[spec.kwarg.arg] = self.term("kwargs", spec.kwarg.arg)

    def assign(self, target: ast.expr, value: Term) -> None:
        """``target = value``."""
        if isinstance(target, ast.Name):
            self.env[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            self.unpack(target.elts, value)
        elif isinstance(target, ast.Starred):
            self.assign(target.value, value)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            base = self.eval(target.value)
            if not is_fresh(base):
                self.run.effect(f"writes to `{ast.unparse(target)}`")
            self.env[target.value.id] = self.term("setitem", base, self.subscript(target.slice), value)
        else:
            self.run.effect(f"writes to `{ast.unparse(target)}`")

    def unpack(self, targets: list[ast.expr], value: Term) -> None:
        """Bind each target to its element of ``value``."""
        star = next((i for i, target in enumerate(targets) if isinstance(target, ast.Starred)), None)
        if value.op == "if" and value.args[1].op == value.args[2].op == "tuple":
            sides = (value.args[1].args, value.args[2].args)
            if len(sides[0]) == len(sides[1]) == len(targets) and star is None:
                for target, yes, no in zip(targets, *sides, strict=True):
                    self.assign(target, self.idioms.choose(value.args[0], yes, no))
                return
        for at, target in enumerate(targets):
            if star is None or at < star:
                index = self.idioms.const(at)
            elif at > star:
                index = self.idioms.const(at - len(targets))
            else:
                start = self.idioms.const(at or None)
                stop = self.idioms.const(at + 1 - len(targets) or None)
                index = self.idioms.slice(start, stop, self.run.none)
            self.assign(target, self.idioms.index(value, index))

    def eval(self, node: ast.expr) -> Term:
        """The term of an expression."""
        method = getattr(self, "_eval_" + type(node).__name__, None)
        if method is None:
            return self.run.unknown(f"`{type(node).__name__}`")
        return method(node)  # type: ignore[no-any-return]

    def _eval_Name(self, node: ast.Name) -> Term:
        name = node.id
        if name in self.env:
            return self.env[name]
        if name in self.free:
            try:
                value = self.free[name].cell_contents
            except ValueError:
                return self.run.unknown(f"{name} (empty cell)")
            self.run.reads[reads.of_cell(self.function, name, self.free[name])] = None
            return self.run.embed(value)
        if name in self.function.__globals__:
            value = self.function.__globals__[name]
            self.run.reads[reads.of_global(self.function, name, value)] = None
            return self.run.embed(value, name)
        if hasattr(builtins, name):
            return self.term("py", Ref(getattr(builtins, name)))
        return self.run.unknown(f"{name} is not defined")

    def subscript(self, node: ast.expr) -> Term:
        """The term of an index: the expression between brackets."""
        if isinstance(node, ast.Slice):
            parts = [
                self.run.none if part is None else self.eval(part)
                for part in (node.lower, node.upper, node.step)
            ]
            return self.idioms.slice(*parts)
        if isinstance(node, ast.Tuple):
            return self.term("tuple", *(self.subscript(item) for item in node.elts))
        return self.eval(node)


def is_fresh(term: Term) -> bool:
    """Whether a term is a tensor that the call itself made, so that a write to it changes nothing else."""
    while True:
        if term.op in ("zeros_like", "zeros", "empty_like", "new_zeros", "setitem", "index_add"):
            return True
        if term.op == "carry":
            term = term.args[2]
        elif term.op == "if":
            return is_fresh(term.args[1]) and is_fresh(term.args[2])
        elif term.op == "call":
            return term.args[0].op == "py" and "zeros" in term.args[0].args[0].name
        else:
            return False
