"""Near misses: what a term almost is, and the first difference.

A term counts as near an op when it holds the heart of that op (a reciprocal root of a mean of squares,
a product with an activation between two layers, a rotation); which form is nearest is counted.
"""

from __future__ import annotations

from typing import Any

from twinkle.match import templates
from twinkle.match.recognition import NearMiss
from twinkle.match.symbolic.execute import Run
from twinkle.match.symbolic.idioms import ACTIVATIONS
from twinkle.match.symbolic.terms import Term, walk
from twinkle.match.unify import attribute_path, difference

__all__ = ["NearMiss", "hearts", "near_misses"]


# The share of a form's operations that must agree: below it the two only share their heart.
_NEAR = 0.4


def hearts(term: Term) -> tuple[str, ...]:
    """The ops whose heart the term holds."""
    parts = walk(term)
    if len(parts) > 600:
        return ()
    return tuple(op for op, near in _HEARTS.items() if near(parts))


def near_misses(term: Term, run: Run) -> tuple[NearMiss, ...]:
    """The nearest form of every op whose heart the term holds."""
    return tuple(found for op in hearts(term) if (found := _nearest(op, term, run)) is not None)


def _nearest(op: str, term: Term, run: Run) -> NearMiss | None:
    best = None
    for template in templates.templates(op):
        found = difference(template.term, term, templates.ROLES[op])
        if found is not None:
            share = found.agreed / len(walk(template.term))
            if best is None or share > best[0]:
                best = (share, template, found)
    if best is None:
        # Equal to the last operation, and it does more than compute.
        return NearMiss(op, next(iter(templates.templates(op))).form, "; ".join(run.effects) or "unknown")
    share, template, found = best
    if share < _NEAR:
        return None
    return NearMiss(op, template.form, f"expected {found.expected}, found {found.found}")


def _ops(parts: list[Term]) -> set[str]:
    return {part.op for part in parts}


def _norm(parts: list[Term]) -> bool:
    ops = _ops(parts)
    roots = "rsqrt" in ops or "sqrt" in ops or "pow" in ops
    return ("rms_norm" in ops and len(parts) < 60) or (roots and {"mean", "pow2"} <= ops and len(parts) < 200)


def _centred(parts: list[Term]) -> bool:
    ops = _ops(parts)
    roots = "rsqrt" in ops or "sqrt" in ops
    if "layer_norm" in ops and len(parts) < 60:
        return True
    return roots and ("var" in ops or {"mean", "sub"} <= ops) and len(parts) < 80


def _layer_call(term: Any) -> bool:
    return isinstance(term, Term) and term.op == "call" and attribute_path(term.args[0]) is not None


def _gated(parts: list[Term]) -> bool:
    if len(parts) > 150 or "loop" in _ops(parts):
        return False
    layers = [part for part in parts if _layer_call(part)]
    return len(layers) >= 2 and any(
        part.op == "mul" and any(_activated(side) for side in part.args) for part in parts
    )


def _activated(term: Any) -> bool:
    while isinstance(term, Term) and term.op in ("clamp", "to"):
        term = term.args[0]
    if not isinstance(term, Term):
        return False
    if term.op in ACTIVATIONS:
        return _inner_call(term.args[0])
    return _layer_call(term) and len(term.args[1]) == 1 and _inner_call(term.args[1][0])


def _inner_call(term: Any) -> bool:
    while isinstance(term, Term) and term.op in (
        "index",
        "chunk",
        "split",
        "to",
        "clamp",
        "reshape",
        "unbind",
        "mul",
    ):
        if term.op == "mul":
            return any(_inner_call(side) for side in term.args)
        term = term.args[0]
    return _layer_call(term)


def _rotation(parts: list[Term]) -> bool:
    if len(parts) > 300 or any(_layer_call(part) for part in parts):
        return False
    if any(part.op == "view_as_complex" for part in parts):
        return True
    for part in parts:
        if part.op in ("cat", "stack") and part.args[0].op == "tuple":
            items = part.args[0].args
            if len(items) in (2, 4) and any(item.op in ("neg", "sub") for item in items):
                return True
    return False


def _experts(parts: list[Term]) -> bool:
    ops = _ops(parts)
    return ("index_add" in ops and "loop" in ops) or ("bmm" in ops and len(parts) < 120)


_HEARTS = {
    "rms_norm": lambda parts: _norm(parts) and not _centred(parts),
    "layer_norm": _centred,
    "gated_mlp": _gated,
    "rotary": _rotation,
    "experts": _experts,
}
