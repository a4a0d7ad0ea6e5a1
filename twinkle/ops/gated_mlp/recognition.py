"""What tells the code of a gated MLP, and what must hold of its instances."""

from __future__ import annotations

from twinkle.ops.gated_mlp.halves import rewritten

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["check", "core", "rewritten"]

# What may lie between the result of a projection and the product.
_BETWEEN = ("index", "chunk", "split", "tensor_split", "to", "clamp", "reshape", "unbind", "unflatten")
_CUTS = ("slice", "split", "tensor_split", "unbind")
_PROJECTIONS = ("gate", "up", "gate_up", "down")


def core(code: Any) -> bool:
    """A product with an activation in it, of layers of the module, of halves of an input or of two inputs."""
    if code.size > 150 or "loop" in code.ops:
        return False
    if not (code.layer_calls or "chunk" in code.ops):
        inputs = sum(part.op == "input" for part in code.parts)
        if inputs < 2 and code.ops.isdisjoint(_CUTS):
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
    found: bool = code.calls_layer(term) or term.op == "input"
    return found


def check(instance: Any) -> None:
    """Which projections have a bias, and their widths."""
    facts = instance.facts
    layers = {role: instance.get(facts[role]) for role in _PROJECTIONS if role in facts}
    facts["biases"] = tuple(role for role, layer in layers.items() if layer.bias is not None)
    if "down" in layers:
        facts["hidden_size"], facts["intermediate_size"] = (
            layers["down"].out_features,
            layers["down"].in_features,
        )
    _check_halves(instance, layers.get("gate_up"))
    if "chunk_dim" in facts and facts["chunk_dim"] != -1:
        instance.refuse(f"it is split along dimension {facts['chunk_dim']}")
    if "factor" in facts and isinstance(facts["factor"], str):
        kind = type(instance.get(facts["factor"])).__name__
        if kind not in ("Parameter", "Tensor", "float", "int"):
            instance.refuse(f"{facts['factor']} is {kind}, not a number or a tensor")


def _check_halves(instance: Any, layer: Any) -> None:
    """Refuse an instance whose fused projection is not as wide as the halves that its code takes."""
    half = instance.facts.pop("half", None)
    if half is None:
        return
    if layer is None:
        instance.refuse("its input is cut by slices, which are halves on an even width alone")
    width = layer.out_features
    if isinstance(half, str) and half != "even":
        path = half.removeprefix("self.")
        half = instance.rest_on(path)
    if width % 2 or half not in ("even", width // 2):
        instance.refuse(f"its halves are {half} wide, and its projection is {width}")
