"""Symbolic execution: what a function computes, as one term.

Locals are substituted, helpers and methods inlined, branches merged into ``if`` terms, loops into
``loop`` terms. What cannot be followed becomes an ``unknown`` term, and what a call does besides
returning a value (writing an attribute, writing in place to an argument) is listed in ``effects``:
a function with effects is never a mere computation.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
from types import FunctionType, ModuleType
from typing import Any

from twinkle.match import source
from twinkle.match.idioms import Idioms
from twinkle.match.terms import Arena, Ref, Term

__all__ = ["Run", "Unsupported", "execute"]

_BINARY = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.MatMult: "matmul",
    ast.BitAnd: "bitand",
    ast.BitOr: "bitor",
    ast.BitXor: "bitxor",
    ast.LShift: "lshift",
    ast.RShift: "rshift",
}
_COMPARE = {
    ast.Eq: "eq",
    ast.NotEq: "ne",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Is: "is",
    ast.IsNot: "isnot",
    ast.In: "in",
    ast.NotIn: "notin",
}
_NEGATED = {"ne": "eq", "isnot": "is", "notin": "in"}
_TENSORS = frozenset(
    {"cat", "stack", "matmul", "linear", "to", "index", "reshape", "tuple", "list", "zeros_like"}
)
_INTEGER = frozenset(
    {"permute", "index", "nonzero", "one_hot", "where", "sum", "greater", "squeeze", "tuple"}
)
# A statement that only logs or checks says nothing about the result.
_LOGGERS = ("logger", "logging", "warnings")

_RAISES = object()
_CONTINUES = object()


class Unsupported(Exception):
    """The source holds something that this executor does not follow."""


class Run:
    """One execution: the arena, and what happened besides computing.

    Args:
        arena: Where the terms are made.
        inline: How many statements a helper may have to be inlined.
        assume: Parameters that are taken as ``"given"`` (not None) or ``"absent"`` (None).
        instance: Read plain values (functions, flags, numbers) of ``self`` from this object.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        inline: int = 60,
        assume: dict[str, str] | None = None,
        instance: Any = None,
    ) -> None:
        self.arena = arena
        self.idioms = Idioms(arena)
        self.inline = inline
        self.assume = assume or {}
        self.instance = instance
        self.effects: list[str] = []
        self.calls: list[tuple[str, Term]] = []
        self.guards: list[Term] = []
        self.inlined: list[tuple[FunctionType, list[Term]]] = []
        self.none = self.idioms.none
        self.cls: type | None = None
        self.depth = 0
        self.loops = 0

    def function(self, function: FunctionType, args: list[Term], kwargs: dict[str, Term]) -> Term:
        """The term of a call of ``function``.

        Raises:
            NoSource: Its source is not there.
            Unsupported: Its parameters cannot be bound.
        """
        node = source.parse(function)
        env = _Frame(self, function).bind(node, args, kwargs)
        result = env.block(node.body)
        if result is _RAISES:
            return self.arena.term("raises")
        return self.none if result is None or result is _CONTINUES else result

    def embed(self, value: Any, called: str | None = None) -> Term:
        """A Python object as a term; ``called`` is its name where it was found."""
        if value is None or isinstance(value, bool | int | float | str) or value is Ellipsis:
            return self.idioms.const(value)
        kind = type(value)
        if kind.__module__ == "torch" and kind.__name__ == "dtype":
            return self.arena.term("dtype", str(value).removeprefix("torch."))
        if isinstance(value, tuple | list) and len(value) <= 16:
            return self.arena.term("tuple", *(self.embed(item) for item in value))
        return self.arena.term("py", Ref(value, called if isinstance(value, dict) else None))

    def apply(self, value: Any, args: list[Term]) -> Term:
        """The term of a call of any Python object."""

        def caller() -> None: ...

        return _Frame(self, caller).call(self.embed(value), args, {})  # type: ignore[arg-type]

    def unknown(self, why: str) -> Term:
        """Something that is not followed; never equal to anything."""
        return self.arena.term("unknown", Ref(object()), why)

    def effect(self, what: str) -> None:
        """Note what happens besides computing."""
        if what not in self.effects:
            self.effects.append(what)


def execute(
    function: FunctionType, arena: Arena, *, owner: type | None = None, **options: Any
) -> tuple[Term, Run]:
    """What ``function`` returns, with its parameters as inputs.

    Args:
        function: A function, or the method of ``owner``.
        arena: Where the terms are made.
        owner: The class whose attributes ``self.name`` may be methods of.
        options: Those of :class:`Run`.

    Raises:
        NoSource: Its source is not there.
    """
    run = Run(arena, **options)
    run.cls = owner
    parameters = list(inspect.signature(function, follow_wrapped=False).parameters.values())
    args: list[Term] = []
    kwargs: dict[str, Term] = {}
    for at, parameter in enumerate(parameters):
        if owner is not None and at == 0:
            term = arena.term("self")
        elif run.assume.get(parameter.name) == "absent":
            term = run.none
        else:
            term = arena.term("input", parameter.name)
        if parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[parameter.name] = term
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            args.append(term)
    return run.function(function, args, kwargs), run


def _is_form(value: Any) -> bool:
    return hasattr(type(value), "__dataclass_fields__") and not isinstance(value, type)


class _Frame:
    """The local names of one call."""

    def __init__(self, run: Run, function: FunctionType) -> None:
        self.run = run
        self.idioms = run.idioms
        self.term = run.arena.term
        self.function = function
        self.env: dict[str, Term] = {}
        cells = function.__closure__ or ()
        self.free = dict(zip(function.__code__.co_freevars, cells, strict=False))

    def bind(self, node: ast.FunctionDef, args: list[Term], kwargs: dict[str, Term]) -> _Frame:
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
        return self

    # -- statements -------------------------------------------------------------------------------

    def block(self, body: list[ast.stmt]) -> Any:
        """Run statements: a term when all paths return, None when the end is reached."""
        for at, statement in enumerate(body):
            kind = type(statement)
            if kind is ast.If:
                done, result = self.branch(statement, body[at + 1 :])  # type: ignore[arg-type]
                if done:
                    return result
                continue
            if kind is ast.Return:
                value = statement.value  # type: ignore[attr-defined]
                return self.run.none if value is None else self.eval(value)
            if kind is ast.Raise:
                return _RAISES
            if kind is ast.Continue:
                return _CONTINUES
            if kind is ast.With:
                result = self.with_block(statement)  # type: ignore[arg-type]
                if result is not None:
                    return result
                continue
            self.statement(statement)
        return None

    def branch(self, node: ast.If, rest: list[ast.stmt]) -> tuple[bool, Any]:
        test = self.truth(node.test)
        if test.op == "const":
            result = self.block(node.body if test.args[0] else node.orelse)
            return result is not None, result
        before = self.env
        self.env = dict(before)
        yes = self.block(node.body)
        env_yes, self.env = self.env, dict(before)
        no = self.block(node.orelse)
        env_no = self.env
        if yes is None and no is None:
            self.merge(test, env_yes, env_no)
            return False, None
        if yes is _RAISES or no is _RAISES:
            self.run.guards.append(test)
        if yes is _RAISES:
            self.env = env_no
            return no is not None, no
        if no is _RAISES:
            self.env = env_yes
            return yes is not None, yes
        if yes is not None and no is not None:
            if yes is _CONTINUES and no is _CONTINUES:
                self.merge(test, env_yes, env_no)
                return True, _CONTINUES
            if yes is _CONTINUES or no is _CONTINUES:
                return True, self.run.unknown("a return in a loop")
            return True, self.idioms.choose(test, yes, no)
        # One side leaves: the rest belongs to the other.
        self.env = env_no if yes is not None else env_yes
        left = yes if yes is not None else no
        later = self.block(rest)
        if left is _CONTINUES:
            if later is not None and later is not _CONTINUES:
                return True, self.run.unknown("a return in a loop")
            if yes is not None:
                self.merge(test, env_yes, self.env)
            else:
                self.merge(test, self.env, env_no)
            return True, _CONTINUES
        if later is _RAISES:
            return True, left
        if later is _CONTINUES:
            return True, self.run.unknown("a return in a loop")
        later = self.run.none if later is None else later
        return True, self.idioms.choose(test, *((left, later) if yes is not None else (later, left)))

    def merge(self, test: Term, yes: dict[str, Term], no: dict[str, Term]) -> None:
        merged: dict[str, Term] = {}
        for name in (*yes, *(name for name in no if name not in yes)):
            unset = self.term("unset", name)
            merged[name] = self.idioms.choose(test, yes.get(name, unset), no.get(name, unset))
        self.env = merged

    def with_block(self, node: ast.With) -> Any:
        shown = [ast.unparse(item.context_expr) for item in node.items]
        if shown not in (["torch.no_grad()"], ["torch.inference_mode()"]):
            self.run.effect(f"runs under `with {', '.join(shown)}`")
            return self.block(node.body)
        before = dict(self.env)
        result = self.block(node.body)
        changed = [term for name, term in self.env.items() if before.get(name) is not term]
        # Integer results have no gradient to cut.
        if result is not None or not all(_is_integer(term) for term in changed):
            self.run.effect(f"runs under `with {', '.join(shown)}`")
        return result

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            value = self.eval(node.value)
            for target in node.targets:
                self.assign(target, value)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.assign(node.target, self.eval(node.value))
        elif isinstance(node, ast.AugAssign):
            self.augment(node)
        elif isinstance(node, ast.Expr):
            self.expression(node.value)
        elif isinstance(node, ast.For):
            self.loop(node)
        elif isinstance(
            node, ast.Assert | ast.Pass | ast.Import | ast.ImportFrom | ast.Global | ast.Nonlocal
        ):
            for alias in getattr(node, "names", ()):
                if isinstance(alias, ast.alias):
                    name = alias.asname or alias.name.partition(".")[0]
                    self.env[name] = self.run.unknown(f"import {alias.name}")
        else:
            self.havoc(node, f"`{type(node).__name__.lower()}` is not followed")

    def havoc(self, node: ast.AST, why: str) -> None:
        self.run.effect(why)
        for child in ast.walk(node):
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                self.env[child.id] = self.run.unknown(why)
            elif isinstance(child, ast.FunctionDef):
                self.env[child.name] = self.run.unknown(why)

    def assign(self, target: ast.expr, value: Term) -> None:
        if isinstance(target, ast.Name):
            self.env[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            self.unpack(target.elts, value)
        elif isinstance(target, ast.Starred):
            self.assign(target.value, value)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            base = self.eval(target.value)
            if not _is_fresh(base):
                self.run.effect(f"writes to `{ast.unparse(target)}`")
            self.env[target.value.id] = self.term("setitem", base, self.subscript(target.slice), value)
        else:
            self.run.effect(f"writes to `{ast.unparse(target)}`")

    def unpack(self, targets: list[ast.expr], value: Term) -> None:
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

    def augment(self, node: ast.AugAssign) -> None:
        if not isinstance(node.target, ast.Name):
            self.run.effect(f"writes to `{ast.unparse(node.target)}`")
            return
        before = self.eval(node.target)
        if before.op in ("input", "attr") or (before.op == "to" and before.args[0].op == "input"):
            self.run.effect(f"writes in place to `{node.target.id}`")
        op = _BINARY.get(type(node.op))
        value = self.eval(node.value)
        if isinstance(node.op, ast.Pow):
            self.env[node.target.id] = self.idioms.power(before, value)
        elif op is None:
            self.env[node.target.id] = self.run.unknown("an operator")
        else:
            self.env[node.target.id] = self.idioms.binary(op, before, value)

    def expression(self, node: ast.expr) -> None:
        if isinstance(node, ast.Constant):
            return
        if isinstance(node, ast.Call):
            func = node.func
            root: ast.expr = func
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in _LOGGERS:
                return
            if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name):
                owner = self.env.get(func.value.id)
                if owner is not None and func.attr == "append" and owner.op in ("list", "carry"):
                    item = self.eval(node.args[0])
                    self.env[func.value.id] = self.term("append", owner, item)
                    return
                if owner is not None and func.attr.endswith("_") and not func.attr.startswith("_"):
                    if not _is_fresh(owner):
                        self.run.effect(f"writes in place to `{func.value.id}`")
                    self.env[func.value.id] = self.eval(node)
                    return
            self.eval(node)
        self.run.effect(f"does `{_short(node)}`")

    def loop(self, node: ast.For) -> None:
        if node.orelse or any(isinstance(child, ast.Break | ast.Return) for child in ast.walk(node)):
            self.havoc(node, "a loop with a second way out is not followed")
            return
        over = self.eval(node.iter)
        run = self.run
        run.loops += 1
        level = run.loops
        before = dict(self.env)
        stored = {
            child.id
            for statement in node.body
            for child in ast.walk(statement)
            if isinstance(child, ast.Name)
            and (isinstance(child.ctx, ast.Store) or _mutated(statement, child.id))
        }
        stored -= {child.id for child in ast.walk(node.target) if isinstance(child, ast.Name)}
        carried = [name for name in before if name in stored]
        for at, name in enumerate(carried):
            self.env[name] = self.term("carry", level, at, before[name])
        self.assign(node.target, self.term("each", level, over))
        result = self.block(node.body)
        run.loops -= 1
        if result is not None and result is not _CONTINUES:
            self.havoc(node, "a loop that returns is not followed")
            return
        after = self.env
        self.env = before
        finals = self.term("tuple", *(after[name] for name in carried))
        for at, name in enumerate(carried):
            if after[name].op != "carry":
                self.env[name] = self.term("loop", over, level, at, finals)
        for name in after:
            if name not in before:
                self.env[name] = run.unknown(f"{name} after a loop")

    # -- expressions ------------------------------------------------------------------------------

    def eval(self, node: ast.expr) -> Term:
        """The term of an expression."""
        method = getattr(self, "eval_" + type(node).__name__, None)
        if method is None:
            return self.run.unknown(f"`{type(node).__name__}`")
        return method(node)  # type: ignore[no-any-return]

    def eval_Constant(self, node: ast.Constant) -> Term:
        return self.run.embed(node.value) if not isinstance(node.value, bytes) else self.run.unknown("bytes")

    def eval_Name(self, node: ast.Name) -> Term:
        name = node.id
        if name in self.env:
            return self.env[name]
        if name in self.free:
            try:
                return self.run.embed(self.free[name].cell_contents)
            except ValueError:
                return self.run.unknown(f"{name} (empty cell)")
        if name in self.function.__globals__:
            return self.run.embed(self.function.__globals__[name], name)
        if hasattr(builtins, name):
            return self.term("py", Ref(getattr(builtins, name)))
        return self.run.unknown(f"{name} is not defined")

    def eval_Tuple(self, node: ast.Tuple) -> Term:
        return self.idioms.tuple([self.eval(item) for item in node.elts])

    def eval_List(self, node: ast.List) -> Term:
        items = self.idioms.tuple([self.eval(item) for item in node.elts]).args
        return self.term("list", *items)

    def eval_Starred(self, node: ast.Starred) -> Term:
        return self.term("star", self.eval(node.value))

    def eval_UnaryOp(self, node: ast.UnaryOp) -> Term:
        value = self.eval(node.operand)
        if isinstance(node.op, ast.USub):
            return self.idioms.simplify("neg", [value])
        if isinstance(node.op, ast.Not):
            return self.idioms.negate(self.decide(value))
        return self.term(type(node.op).__name__.lower(), value)

    def eval_BinOp(self, node: ast.BinOp) -> Term:
        left, right = self.eval(node.left), self.eval(node.right)
        if isinstance(node.op, ast.Pow):
            return self.idioms.power(left, right)
        op = _BINARY.get(type(node.op))
        if op == "mul" and left.op == "list" and right.op == "const" and isinstance(right.args[0], int):
            return self.term("list", *(left.args * right.args[0]))
        return self.run.unknown("an operator") if op is None else self.idioms.binary(op, left, right)

    def eval_BoolOp(self, node: ast.BoolOp) -> Term:
        is_and = isinstance(node.op, ast.And)
        parts: list[Term] = []
        for value in node.values:
            part = self.decide(self.eval(value))
            if part.op == "const":
                if bool(part.args[0]) is is_and:
                    continue
                return part if not parts else self._bool(is_and, [*parts, part])
            parts.extend(part.args if part.op == ("and" if is_and else "or") else [part])
        return self._bool(is_and, parts)

    def _bool(self, is_and: bool, parts: list[Term]) -> Term:
        if not parts:
            return self.idioms.const(is_and)
        return parts[0] if len(parts) == 1 else self.term("and" if is_and else "or", *parts)

    def eval_Compare(self, node: ast.Compare) -> Term:
        left = self.eval(node.left)
        tests: list[Term] = []
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            right = self.eval(comparator)
            tests.append(self.compare(_COMPARE[type(op)], left, right))
            left = right
        return (
            self._bool(True, [test for test in tests if test.args != (True,)]) if len(tests) > 1 else tests[0]
        )

    def compare(self, op: str, left: Term, right: Term) -> Term:
        if op in _NEGATED:
            return self.idioms.negate(self.compare(_NEGATED[op], left, right))
        if right.op == "list":
            right = self.term("tuple", *right.args)
        if op == "is" and right is self.run.none:
            if left is right:
                return self.idioms.const(True)
            known = left.op in _TENSORS or left.op in (
                "const",
                "add",
                "mul",
                "sub",
                "div",
                "self",
                "py",
                "dtype",
            )
            if known or (left.op == "input" and self.run.assume.get(left.args[0]) == "given"):
                return self.idioms.const(False)
        if left.op == right.op == "const":
            a, b = left.args[0], right.args[0]
            try:
                result = {"eq": a == b, "is": a is b}.get(op)
                if result is None and op != "in":
                    result = {"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[op]
                if result is not None:
                    return self.idioms.const(bool(result))
            except TypeError:
                pass
        if (
            op == "in"
            and right.op == "tuple"
            and left.op == "const"
            and all(i.op == "const" for i in right.args)
        ):
            return self.idioms.const(any(item is left for item in right.args))
        if op in ("gt", "ge"):
            return self.term({"gt": "lt", "ge": "le"}[op], right, left)
        return self.term(op, left, right)

    def truth(self, node: ast.expr) -> Term:
        return self.decide(self.eval(node))

    def decide(self, value: Term) -> Term:
        """A value as a condition."""
        if value.op in ("tuple", "list"):
            return self.idioms.const(bool(value.args))
        if value.op == "const" and not isinstance(value.args[0], bool):
            return self.idioms.const(bool(value.args[0]))
        return value

    def eval_IfExp(self, node: ast.IfExp) -> Term:
        test = self.truth(node.test)
        if test.op == "const":
            return self.eval(node.body if test.args[0] else node.orelse)
        return self.idioms.choose(test, self.eval(node.body), self.eval(node.orelse))

    def eval_ListComp(self, node: ast.ListComp) -> Term:
        if len(node.generators) != 1 or node.generators[0].ifs:
            return self.run.unknown("a comprehension")
        over = self.eval(node.generators[0].iter)
        before = dict(self.env)
        self.run.loops += 1
        self.assign(node.generators[0].target, self.term("each", self.run.loops, over))
        item = self.eval(node.elt)
        self.run.loops -= 1
        self.env = before
        return self.term("comprehension", over, item)

    def eval_GeneratorExp(self, node: ast.GeneratorExp) -> Term:
        return self.eval_ListComp(node)  # type: ignore[arg-type]

    def eval_JoinedStr(self, node: ast.JoinedStr) -> Term:
        return self.run.unknown("a formatted string")

    def eval_NamedExpr(self, node: ast.NamedExpr) -> Term:
        value = self.eval(node.value)
        self.assign(node.target, value)
        return value

    def subscript(self, node: ast.expr) -> Term:
        if isinstance(node, ast.Slice):
            parts = [
                self.run.none if part is None else self.eval(part)
                for part in (node.lower, node.upper, node.step)
            ]
            return self.idioms.slice(*parts)
        if isinstance(node, ast.Tuple):
            return self.term("tuple", *(self.subscript(item) for item in node.elts))
        return self.eval(node)

    def eval_Slice(self, node: ast.Slice) -> Term:
        return self.subscript(node)

    def eval_Subscript(self, node: ast.Subscript) -> Term:
        base, index = self.eval(node.value), self.subscript(node.slice)
        if base.op in ("tuple", "list") and index.op == "slice":
            bounds = [part.args[0] if part.op == "const" else _RAISES for part in index.args]
            if _RAISES not in bounds and all(arg.op != "star" for arg in base.args):
                window: Any = slice(*bounds)
                return self.term(base.op, *base.args[window])
        return self.idioms.index(base, index)

    def eval_Attribute(self, node: ast.Attribute) -> Term:
        return self.attribute(self.eval(node.value), node.attr)

    def attribute(self, base: Term, name: str) -> Term:
        if base.op == "py":
            value = base.args[0].value
            if isinstance(value, ModuleType | type) or _is_form(value):
                try:
                    return self.run.embed(getattr(value, name))
                except AttributeError:
                    return self.run.unknown(f"no attribute {name}")
        if base.op == "self":
            found = self._instance_value(name)
            return found if found is not None else self.term("attr", base, name)
        if name == "dtype":
            return self.idioms.dtype_of(base)
        if name == "shape":
            return self.idioms.shape(base)
        if name == "device":
            return self.term("device_of", base)
        if name == "ndim":
            return self.term("ndim", base)
        return self.term("attr", base, name)

    def _instance_value(self, name: str) -> Term | None:
        if self.run.instance is None:
            return None
        value = getattr(self.run.instance, name, None)
        if (
            isinstance(value, bool | int | float | str | functools.partial)
            or source.function_of(value) is not None
        ):
            return self.run.embed(value)
        # torch's own functions are builtins, not functions with a source.
        return self.run.embed(value) if type(value).__name__ == "builtin_function_or_method" else None

    # -- calls ------------------------------------------------------------------------------------

    def eval_Call(self, node: ast.Call) -> Term:
        args = list(self.idioms.tuple([self.eval(arg) for arg in node.args]).args)
        kwargs: dict[str, Term] = {}
        for keyword in node.keywords:
            kwargs[keyword.arg or "**"] = self.eval(keyword.value)
        func = node.func
        if isinstance(func, ast.Attribute):
            base = self.eval(func.value)
            return self.method(base, func.attr, args, kwargs)
        return self.call(self.eval(func), args, kwargs)

    def method(self, base: Term, name: str, args: list[Term], kwargs: dict[str, Term]) -> Term:
        if base.op == "self":
            return self.own_method(base, name, args, kwargs)
        if base.op == "py":
            return self.call(self.attribute(base, name), args, kwargs)
        if base.op == "attr" and not self.idioms.knows(name):
            return self.call(self.term("attr", base, name), args, kwargs)
        if self.idioms.knows(name):
            return self.idioms.call(name, [base, *args], kwargs)
        return self.opaque(self.term("attr", base, name), args, kwargs)

    def own_method(self, base: Term, name: str, args: list[Term], kwargs: dict[str, Term]) -> Term:
        static = inspect.getattr_static(self.run.cls, name, None) if self.run.cls is not None else None
        if isinstance(static, staticmethod):
            return self.call(self.run.embed(static.__func__), args, kwargs)
        if isinstance(static, classmethod):
            return self.opaque(self.term("attr", base, name), args, kwargs)
        if isinstance(static, FunctionType):
            function, foreign = source.unwrap(static)
            if foreign is None and isinstance(function, FunctionType):
                inlined = self.inlined(function, [base, *args], kwargs)
                if inlined is not None:
                    return inlined
            return self.opaque(self.term("attr", base, name), args, kwargs)
        return self.call(self.attribute(base, name), args, kwargs)

    def call(self, callee: Term, args: list[Term], kwargs: dict[str, Term]) -> Term:
        if callee.op == "py":
            return self.python_call(callee.args[0].value, callee, args, kwargs)
        return self.opaque(callee, args, kwargs)

    def opaque(self, callee: Term, args: list[Term], kwargs: dict[str, Term]) -> Term:
        named = tuple((name, kwargs[name]) for name in sorted(kwargs))
        made = self.term("call", callee, tuple(args), named)
        if callee.op == "attr":
            self.run.calls.append((callee.args[1], made))
        return made

    def python_call(self, value: Any, callee: Term, args: list[Term], kwargs: dict[str, Term]) -> Term:
        if isinstance(value, functools.partial):
            args = [*map(self.run.embed, value.args), *args]
            kwargs = {**{name: self.run.embed(given) for name, given in value.keywords.items()}, **kwargs}
            return self.call(self.run.embed(value.func), args, kwargs)
        function = source.function_of(value)
        module = getattr(value, "__module__", None) or ""
        name = getattr(value, "__name__", "")
        owner = getattr(value, "__objclass__", None)
        is_torch = module.startswith("torch") or (module == "" and owner is not None) or _is_torch(value)
        if is_torch and self.idioms.knows(name):
            return self.idioms.call(name, args, kwargs)
        if value in _FOLDED and len(args) == 1 and not kwargs:
            only = args[0]
            if value is len and only.op in ("tuple", "list"):
                return self.idioms.const(len(only.args))
            if value is len and only.op == "shape":
                return self.term("ndim", only.args[0])
            if value in (tuple, list) and only.op in ("tuple", "list"):
                return self.term(value.__name__, *only.args)
            if value is int and only.op == "floordiv":
                return only
            if value is int and only.op == "const" and isinstance(only.args[0], int | float):
                return self.idioms.const(int(only.args[0]))
        if value is getattr and len(args) >= 2 and args[1].op == "const":
            return self.attribute(args[0], args[1].args[0])
        if function is not None and not is_torch:
            plain, foreign = source.unwrap(function)
            if foreign is None:
                inlined = self.inlined(plain, args, kwargs)
                if inlined is not None:
                    return inlined
        return self.opaque(callee, args, kwargs)

    def inlined(self, function: FunctionType, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        """The result of a helper, None when it is better kept as a call."""
        run = self.run
        if run.depth >= 6 or "**" in kwargs:
            return None
        try:
            node = source.parse(function)
        except source.NoSource:
            return None
        statements, plain = _size(node)
        if statements > run.inline or not plain:
            return None
        effects, calls, loops = list(run.effects), len(run.calls), run.loops
        run.depth += 1
        try:
            result = run.function(function, args, kwargs)
        except Unsupported:
            run.effects, run.loops = effects, loops
            return None
        finally:
            run.depth -= 1
        if run.effects != effects or result.op == "unknown":
            run.effects = effects
            del run.calls[calls:]
            return None
        if run.depth == 0:
            run.inlined.append((function, [*args, *kwargs.values()]))
        return result


_FOLDED = (len, tuple, list, int)


def _is_torch(value: Any) -> bool:
    if type(value).__name__ != "builtin_function_or_method":
        return False
    owner = getattr(value, "__self__", None)
    return str(getattr(owner, "__name__", "")).startswith("torch") or "torch" in type(owner).__module__


def _is_fresh(term: Term) -> bool:
    while True:
        if term.op in ("zeros_like", "zeros", "empty_like", "new_zeros", "setitem", "index_add"):
            return True
        if term.op == "carry":
            term = term.args[2]
        elif term.op == "if":
            return _is_fresh(term.args[1]) and _is_fresh(term.args[2])
        elif term.op == "call":
            return term.args[0].op == "py" and "zeros" in term.args[0].args[0].name
        else:
            return False


def _is_integer(term: Term) -> bool:
    while term.op in _INTEGER:
        if term.op in ("nonzero", "one_hot", "greater", "where"):
            return True
        if not term.args or not isinstance(term.args[0], Term):
            return False
        term = term.args[0]
    return term.op == "unset"


def _mutated(statement: ast.stmt, name: str) -> bool:
    for child in ast.walk(statement):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            func = child.value.func
            if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == name:
                return func.attr == "append" or (func.attr.endswith("_") and not func.attr.startswith("_"))
        targets = child.targets if isinstance(child, ast.Assign) else ()
        for target in targets:
            if (
                isinstance(target, ast.Subscript)
                and isinstance(target.value, ast.Name)
                and target.value.id == name
            ):
                return True
    return False


_sizes: dict[ast.FunctionDef, tuple[int, bool]] = {}


def _size(node: ast.FunctionDef) -> tuple[int, bool]:
    """How many statements a function has, and whether this executor follows all of their kinds."""
    found = _sizes.get(node)
    if found is None:
        children = list(ast.walk(node))
        odd = any(
            isinstance(child, ast.Yield | ast.YieldFrom | ast.Await | ast.While | ast.Try)
            for child in children
        )
        found = _sizes[node] = (sum(isinstance(child, ast.stmt) for child in children) - 1, not odd)
    return found


def _short(node: ast.AST) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 60 else text[:57] + "..."
