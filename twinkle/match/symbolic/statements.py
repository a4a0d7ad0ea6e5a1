"""Statements: branches merged into ``if`` terms, loops into ``loop`` terms, writes into effects."""

from __future__ import annotations

import ast
from typing import Any

from twinkle.match.symbolic.expressions import BINARY, Expressions
from twinkle.match.symbolic.names import is_fresh
from twinkle.match.symbolic.terms import Term

__all__ = ["CONTINUES", "RAISES", "Frame"]

_INTEGER = frozenset(
    {"permute", "index", "nonzero", "one_hot", "where", "sum", "greater", "squeeze", "tuple"}
)
# A statement that only logs or checks says nothing about the result.
_LOGGERS = ("logger", "logging", "warnings")

RAISES = object()
CONTINUES = object()


class Frame(Expressions):
    """One call of a function: its names, and its statements one after the other."""

    def block(self, body: list[ast.stmt]) -> Any:
        """Run statements: a term when all paths return, None when the end is reached."""
        for at, statement in enumerate(body):
            kind = type(statement)
            self.run.step()
            if kind is ast.If:
                done, result = self.branch(statement, body[at + 1 :])  # type: ignore[arg-type]
                if done:
                    return result
                continue
            if kind is ast.Return:
                value = statement.value  # type: ignore[attr-defined]
                return self.run.none if value is None else self.eval(value)
            if kind is ast.Raise:
                return RAISES
            if kind is ast.Continue:
                return CONTINUES
            if kind is ast.With:
                result = self.with_block(statement)  # type: ignore[arg-type]
                if result is not None:
                    return result
                continue
            self.statement(statement)
        return None

    def branch(self, node: ast.If, rest: list[ast.stmt]) -> tuple[bool, Any]:
        """Run an ``if``; returns whether the block ended with it, and the block's result.

        Args:
            node: The statement.
            rest: The statements behind it, which belong to the side that does not leave the block.
        """
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
        if yes is RAISES or no is RAISES:
            self.run.guards.append(test)
        if yes is RAISES:
            self.env = env_no
            return no is not None, no
        if no is RAISES:
            self.env = env_yes
            return yes is not None, yes
        if yes is not None and no is not None:
            if yes is CONTINUES and no is CONTINUES:
                self.merge(test, env_yes, env_no)
                return True, CONTINUES
            if yes is CONTINUES or no is CONTINUES:
                return True, self.run.unknown("a return in a loop")
            return True, self.idioms.choose(test, yes, no)
        # One side leaves: the rest belongs to the other.
        self.env = env_no if yes is not None else env_yes
        left = yes if yes is not None else no
        later = self.block(rest)
        if left is CONTINUES:
            if later is not None and later is not CONTINUES:
                return True, self.run.unknown("a return in a loop")
            if yes is not None:
                self.merge(test, env_yes, self.env)
            else:
                self.merge(test, self.env, env_no)
            return True, CONTINUES
        if later is RAISES:
            return True, left
        if later is CONTINUES:
            return True, self.run.unknown("a return in a loop")
        later = self.run.none if later is None else later
        return True, self.idioms.choose(test, *((left, later) if yes is not None else (later, left)))

    def merge(self, test: Term, yes: dict[str, Term], no: dict[str, Term]) -> None:
        """Bind the names after two branches to what either branch bound them to."""
        merged: dict[str, Term] = {}
        for name in (*yes, *(name for name in no if name not in yes)):
            unset = self.term("unset", name)
            merged[name] = self.idioms.choose(test, yes.get(name, unset), no.get(name, unset))
        self.env = merged

    def with_block(self, node: ast.With) -> Any:
        """Run a ``with`` block: an effect, unless it only cuts the gradients of integers."""
        contexts = [ast.unparse(item.context_expr) for item in node.items]
        if contexts not in (["torch.no_grad()"], ["torch.inference_mode()"]):
            self.run.effect(f"runs under `with {', '.join(contexts)}`")
            return self.block(node.body)
        before = dict(self.env)
        result = self.block(node.body)
        changed = [term for name, term in self.env.items() if before.get(name) is not term]
        # Integer results have no gradient to cut.
        if result is not None or not all(_is_integer(term) for term in changed):
            self.run.effect(f"runs under `with {', '.join(contexts)}`")
        return result

    def statement(self, node: ast.stmt) -> None:
        """Run a statement that computes or binds."""
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
        """Give up on a statement: the names that it binds are unknown."""
        self.run.effect(why)
        for child in ast.walk(node):
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                self.env[child.id] = self.run.unknown(why)
            elif isinstance(child, ast.FunctionDef):
                self.env[child.name] = self.run.unknown(why)

    def augment(self, node: ast.AugAssign) -> None:
        """``target op= value``."""
        if not isinstance(node.target, ast.Name):
            self.run.effect(f"writes to `{ast.unparse(node.target)}`")
            return
        before = self.eval(node.target)
        if before.op in ("input", "attr") or (before.op == "to" and before.args[0].op == "input"):
            self.run.effect(f"writes in place to `{node.target.id}`")
        op = BINARY.get(type(node.op))
        value = self.eval(node.value)
        if isinstance(node.op, ast.Pow):
            self.env[node.target.id] = self.idioms.power(before, value)
        elif op is None:
            self.env[node.target.id] = self.run.unknown("an operator")
        else:
            self.env[node.target.id] = self.idioms.binary(op, before, value)

    def expression(self, node: ast.expr) -> None:
        """Run an expression that is a statement, for its effect."""
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
                    if not is_fresh(owner):
                        self.run.effect(f"writes in place to `{func.value.id}`")
                    self.env[func.value.id] = self.eval(node)
                    return
            self.eval(node)
        self.run.effect(f"does `{_short(node)}`")

    def loop(self, node: ast.For) -> None:
        """Run a ``for``: each name that it carries becomes a ``loop`` term."""
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
        if result is not None and result is not CONTINUES:
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


def _short(node: ast.AST) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 60 else text[:57] + "..."
