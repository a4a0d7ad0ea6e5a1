"""What tells the code of a gated MLP, and what must hold of its instances."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["check", "core"]

# What may lie between the result of a projection and the product.
_BETWEEN = ("index", "chunk", "split", "to", "clamp", "reshape", "unbind")
_PROJECTIONS = ("gate", "up", "gate_up", "down")


def core(code: Any) -> bool:
    """A product with an activation in it, between two layers of the module."""
    if code.size > 150 or "loop" in code.ops or len(code.layer_calls) < 2:
        return False
    return any(part.op == "mul" and any(_activated(code, side) for side in part.args) for part in code.parts)


def _activated(code: Any, term: Any) -> bool:
    while code.is_term(term) and term.op in ("clamp", "to"):
        term = term.args[0]
    if not code.is_term(term):
        return False
    if code.is_activation(term):
        return _projected(code, term.args[0])
    return code.calls_layer(term) and len(term.args[1]) == 1 and _projected(code, term.args[1][0])


def _projected(code: Any, term: Any) -> bool:
    while code.is_term(term) and term.op in (*_BETWEEN, "mul"):
        if term.op == "mul":
            return any(_projected(code, side) for side in term.args)
        term = term.args[0]
    found: bool = code.calls_layer(term)
    return found


def check(instance: Any) -> None:
    """Which projections have a bias, and their widths."""
    facts = instance.facts
    layers = {role: instance.get(facts[role]) for role in _PROJECTIONS if role in facts}
    facts["biases"] = tuple(role for role, layer in layers.items() if layer.bias is not None)
    last = list(layers.values())[-1]
    facts["hidden_size"], facts["intermediate_size"] = last.out_features, last.in_features
