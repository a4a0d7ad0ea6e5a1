"""Is a term an instance of a template, and if not, where do the two part?

A template is a term with holes. A hole is bound to what a role may be (an input, an attribute of
the module, a number, an activation), the same hole everywhere to the same term; operands of ``+`` and
``*`` are tried in both orders.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from twinkle.match.symbolic.idioms import ACTIVATIONS
from twinkle.match.symbolic.terms import COMMUTATIVE, Ref, Term, show

__all__ = ["Difference", "attribute_path", "difference", "is_given", "shape_key", "unify"]

Bindings = dict[str, Term]
_LEAVES = frozenset({"input", "hole", "attr", "const", "self", "py", "float", "table"})


class Difference(NamedTuple):
    """The first place where a term is not what a template says.

    Attributes:
        expected: What the template has there.
        found: What the code has there.
        agreed: How many operations agreed elsewhere.
    """

    expected: str
    found: str
    agreed: int


def shape_key(term: Any, cache: dict[int, int] | None = None) -> int:
    """A hash that is equal for a template and every term that it unifies with."""
    cache = {} if cache is None else cache
    if isinstance(term, tuple):
        return hash(tuple(shape_key(item, cache) for item in term))
    if not isinstance(term, Term):
        return hash((type(term).__name__, str(term)))
    known = cache.get(id(term))
    if known is None:
        known = cache[id(term)] = _shape_key(term, cache)
    return known


def _shape_key(term: Term, cache: dict[int, int]) -> int:
    op, args = term.op, term.args
    if op in _LEAVES or (op == "index" and args[0].op in _LEAVES and args[1].op == "const"):
        return 1
    if op in ACTIVATIONS:
        return hash(("call", (shape_key(args[0], cache),), hash(())))
    if op == "call":
        return hash(("call", tuple(shape_key(arg, cache) for arg in args[1]), shape_key(args[2], cache)))
    if op in ("rms_norm", "layer_norm"):
        args = (args[0], *args[2:])
    keys = [shape_key(arg, cache) for arg in args]
    if op in COMMUTATIVE:
        keys.sort()
    return hash((op, tuple(keys)))


def attribute_path(term: Term) -> str | None:
    """``a.b`` for ``self.a.b``."""
    names: list[str] = []
    while term.op == "attr":
        names.append(term.args[1])
        term = term.args[0]
    return ".".join(reversed(names)) if term.op == "self" and names else None


def is_given(term: Term) -> bool:
    """Whether a term is an argument, or an attribute of one: ``weight``, ``self.eps`` of a method."""
    while term.op == "attr":
        term = term.args[0]
    return term.op == "input"


def may_bind(kind: str, term: Term) -> bool:
    """Whether a hole of that kind may be bound to the term."""
    if kind == "input":
        return term.op == "input"
    if kind == "attr":
        return attribute_path(term) is not None
    if kind in ("given", "given number"):
        return is_given(term) or (kind == "given number" and term.op == "const")
    if kind == "constant":
        if term.op == "float":
            return may_bind("attr", term.args[0])
        return term.op != "input" and may_bind("scalar", term)
    if kind == "scalar":
        if term.op == "index" and term.args[1].op == "const":
            return may_bind("attr", term.args[0])
        return term.op in ("const", "input") or attribute_path(term) is not None
    if kind == "callable":
        if term.op == "index":
            return term.args[0].op == "py" and may_bind("scalar", term.args[1])
        return term.op == "py" or attribute_path(term) is not None
    if kind == "table":
        return term.op == "table"
    return kind == "any"


def unify(template: Term, term: Term, kinds: dict[str, str]) -> Bindings | None:
    """What the holes of ``template`` stand for in ``term``.

    Args:
        template: A term with holes.
        term: A term.
        kinds: What each hole may be bound to: ``input``, ``attr``, ``scalar``, ``constant`` (a scalar that
            is no argument), ``callable``, ``table`` (what a canonical form keeps as a whole), ``given`` and
            ``given number`` (what a function is given, see :func:`is_given`) or ``any``.

    Returns:
        The bindings, or None when the term is no instance.
    """
    return _solve(((template, term), None), {}, frozenset(), kinds)


def _solve(
    work: Any, bound: Bindings, done: frozenset[tuple[int, int]], kinds: dict[str, str]
) -> Bindings | None:
    while work is not None:
        (left, right), work = work
        if isinstance(left, tuple):
            if not isinstance(right, tuple) or len(left) != len(right):
                return None
            for pair in zip(reversed(left), reversed(right), strict=True):
                work = (pair, work)
            continue
        if not isinstance(left, Term):
            if isinstance(right, Term) or type(left) is not type(right) or left != right:
                return None
            continue
        if not isinstance(right, Term):
            return None
        if left.op == "hole":
            name = left.args[0]
            if name in bound:
                if bound[name] is not right:
                    return None
            elif may_bind(kinds[name], right):
                bound = {**bound, name: right}
            else:
                return None
            continue
        if (id(left), id(right)) in done:
            continue
        if left.op == "call" and right.op in ACTIVATIONS:
            work = _activation(left, right, work)
            if work is False:
                return None
            continue
        if left.op != right.op or len(left.args) != len(right.args):
            return None
        done = done | {(id(left), id(right))}
        if left.op in COMMUTATIVE:
            (a, b), (c, d) = left.args, right.args
            first = _solve(((a, c), ((b, d), work)), bound, done, kinds)
            if first is not None:
                return first
            work = ((a, d), ((b, c), work))
            continue
        for pair in zip(reversed(left.args), reversed(right.args), strict=True):
            work = (pair, work)
    return bound


def _activation(left: Term, right: Term, work: Any) -> Any:
    callee, args, named = left.args
    if callee.op != "hole" or len(args) != 1 or named:
        return False
    function = Term("function", (right.op, *(arg.args[0] for arg in right.args[1:])))
    return ((callee, _function(function)), ((args[0], right.args[0]), work))


_functions: dict[tuple[Any, ...], Term] = {}


def _function(term: Term) -> Term:
    # A torch function in place of a module; interned, so that two uses are one binding.
    return _functions.setdefault(term.args, Term("py", (Ref(term.args),)))


def difference(template: Term, term: Term, kinds: dict[str, str]) -> Difference | None:
    """The first place, in the order of evaluation, where ``term`` leaves ``template``."""
    walker = _Walker(kinds)
    walker.walk(template, term)
    if walker.first is None:
        return None
    return Difference(*walker.first, walker.agreed)


class _Walker:
    def __init__(self, kinds: dict[str, str]) -> None:
        self.kinds = kinds
        self.bound: Bindings = {}
        self.first: tuple[str, str] | None = None
        self.agreed = 0
        self.seen: set[tuple[int, int]] = set()

    def walk(self, left: Any, right: Any) -> None:
        if isinstance(left, tuple) and isinstance(right, tuple) and len(left) == len(right):
            for a, b in zip(left, right, strict=True):
                self.walk(a, b)
            return
        if not isinstance(left, Term) or not isinstance(right, Term):
            if type(left) is not type(right) or left != right:
                self.differ(left, right)
            return
        if (id(left), id(right)) in self.seen:
            return
        self.seen.add((id(left), id(right)))
        if left.op == "hole":
            known = self.bound.get(left.args[0])
            if known is None and may_bind(self.kinds[left.args[0]], right):
                self.bound[left.args[0]] = right
                self.agreed += 1
            elif known is not right:
                self.differ(known if known is not None else left, right)
            return
        if left.op == "call" and right.op in ACTIVATIONS:
            self.agreed += 1
            self.walk(left.args[1][0] if left.args[1] else left, right.args[0])
            return
        if left.op != right.op or len(left.args) != len(right.args):
            self.differ(left, right)
            return
        rights = list(right.args)
        if left.op in COMMUTATIVE and self._better_swapped(left, rights):
            rights.reverse()
        for a, b in zip(left.args, rights, strict=True):
            self.walk(a, b)
        self.agreed += 1

    def _better_swapped(self, left: Term, rights: list[Any]) -> bool:
        cache: dict[int, int] = {}
        straight = sum(
            shape_key(a, cache) == shape_key(b, cache) for a, b in zip(left.args, rights, strict=True)
        )
        swapped = sum(
            shape_key(a, cache) == shape_key(b, cache) for a, b in zip(left.args, rights[::-1], strict=True)
        )
        if straight == swapped:
            straight = sum(a.op == b.op for a, b in zip(left.args, rights, strict=True))
            swapped = sum(a.op == b.op for a, b in zip(left.args, rights[::-1], strict=True))
        return swapped > straight

    def differ(self, left: Any, right: Any) -> None:
        if self.first is None:
            self.first = (show(left, 4), show(right, 4))
