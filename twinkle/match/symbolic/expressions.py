"""Expressions: the operators, comparisons and conditions of Python as terms."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from twinkle.match.symbolic.calls import Calls

if TYPE_CHECKING:
    from twinkle.match.symbolic.terms import Term

__all__ = ["BINARY", "Expressions"]

BINARY = {
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
_OPEN = object()


class Expressions(Calls):
    """A call that follows expressions as well: the third layer of a frame."""

    def _eval_Constant(self, node: ast.Constant) -> Term:
        return self.run.embed(node.value) if not isinstance(node.value, bytes) else self.run.unknown("bytes")

    def _eval_Tuple(self, node: ast.Tuple) -> Term:
        return self.idioms.tuple([self.eval(item) for item in node.elts])

    def _eval_List(self, node: ast.List) -> Term:
        items = self.idioms.tuple([self.eval(item) for item in node.elts]).args
        return self.term("list", *items)

    def _eval_Starred(self, node: ast.Starred) -> Term:
        return self.term("star", self.eval(node.value))

    def _eval_UnaryOp(self, node: ast.UnaryOp) -> Term:
        value = self.eval(node.operand)
        if isinstance(node.op, ast.USub):
            return self.idioms.simplify("neg", [value])
        if isinstance(node.op, ast.Not):
            return self.idioms.negate(self.decide(value))
        return self.term(type(node.op).__name__.lower(), value)

    def _eval_BinOp(self, node: ast.BinOp) -> Term:
        left, right = self.eval(node.left), self.eval(node.right)
        if isinstance(node.op, ast.Pow):
            return self.idioms.power(left, right)
        op = BINARY.get(type(node.op))
        if op == "mul" and left.op == "list" and right.op == "const" and isinstance(right.args[0], int):
            return self.term("list", *(left.args * right.args[0]))
        return self.run.unknown("an operator") if op is None else self.idioms.binary(op, left, right)

    def _eval_BoolOp(self, node: ast.BoolOp) -> Term:
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

    def _eval_Compare(self, node: ast.Compare) -> Term:
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
        """The term of one comparison; a constant where the outcome is known."""
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
            named = left.op in ("input", "hole")
            if known or (named and self.run.assume.get(left.args[0]) == "given"):
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
        """The condition that an expression is."""
        return self.decide(self.eval(node))

    def decide(self, value: Term) -> Term:
        """The condition that a value is; a constant where its truth is known."""
        if value.op in ("tuple", "list"):
            return self.idioms.const(bool(value.args))
        if value.op == "const" and not isinstance(value.args[0], bool):
            return self.idioms.const(bool(value.args[0]))
        return value

    def _eval_IfExp(self, node: ast.IfExp) -> Term:
        test = self.truth(node.test)
        if test.op == "const":
            return self.eval(node.body if test.args[0] else node.orelse)
        return self.idioms.choose(test, self.eval(node.body), self.eval(node.orelse))

    def _eval_ListComp(self, node: ast.ListComp) -> Term:
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

    def _eval_GeneratorExp(self, node: ast.GeneratorExp) -> Term:
        return self._eval_ListComp(node)  # type: ignore[arg-type]

    def _eval_JoinedStr(self, node: ast.JoinedStr) -> Term:
        return self.run.unknown("a formatted string")

    def _eval_NamedExpr(self, node: ast.NamedExpr) -> Term:
        value = self.eval(node.value)
        self.assign(node.target, value)
        return value

    def _eval_Slice(self, node: ast.Slice) -> Term:
        return self.subscript(node)

    def _eval_Subscript(self, node: ast.Subscript) -> Term:
        base, index = self.eval(node.value), self.subscript(node.slice)
        if base.op in ("tuple", "list") and index.op == "slice":
            bounds = [part.args[0] if part.op == "const" else _OPEN for part in index.args]
            if _OPEN not in bounds and all(arg.op != "star" for arg in base.args):
                window: Any = slice(*bounds)
                return self.term(base.op, *base.args[window])
        return self.idioms.index(base, index)

    def _eval_Attribute(self, node: ast.Attribute) -> Term:
        return self.attribute(self.eval(node.value), node.attr)
