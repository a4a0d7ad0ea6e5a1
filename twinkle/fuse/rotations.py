"""Recognises the rotary embeddings that a fused kernel can compute."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from twinkle.fuse.norms import hooked
from twinkle.match.structure import recognise
from twinkle.match.symbolic.source import function_of_callable
from twinkle.swap.placed import placed_as

if TYPE_CHECKING:
    from twinkle.ops.rotary.reference import RotaryVariant

__all__ = ["plain_rotation", "rotation_of", "rotation_variant"]


def rotation_of(function: Any) -> RotaryVariant | str:
    """The rotary embedding that ``function(q, k, cos, sin)`` is, or in words why it is none.

    Of a function that Twinkle replaced by an embedded kernel, the original counts.
    """
    placed = placed_as(function)
    if placed is not None and not placed.chosen_by_twinkle:
        return "the rotation has a kernel of its own"
    function = plain_rotation(function)
    if isinstance(function, nn.Module) and hooked(function):
        return "the rotation has hooks or a forward of its own"
    name = getattr(function, "__name__", type(function).__name__)
    found = recognise(function) if function_of_callable(function) is not None else None
    if found is None or found.op != "rotary":
        return f"{name} is not recognised as a rotary embedding"
    if found.variant.broadcast == "given":
        return f"{name} makes its tables by itself"
    facts = dict(found.facts)
    plain: Any = function_of_callable(function)
    parameters = list(inspect.signature(plain, follow_wrapped=False).parameters.values())
    if [parameter.name for parameter in parameters[:4]] != [
        facts.pop(r, None) for r in ("q", "k", "cos", "sin")
    ]:
        return f"{name} takes other arguments than q, k, cos and sin, or in another order"
    axis = facts.pop("unsqueeze_dim", 1)
    if isinstance(axis, str):
        axis = next((p.default for p in parameters if p.name == axis), None)
    facts.pop("slice_last", None)
    if axis != 1 or facts:
        return f"{name} depends on more than q, k, cos and sin"
    variant: RotaryVariant = found.variant
    return variant


def rotation_variant(function: Any) -> RotaryVariant | None:
    """The rotary embedding of queries and keys that a function is, whatever arguments it takes."""
    plain = function_of_callable(plain_rotation(function))
    found = recognise(plain) if plain is not None else None
    return None if found is None or found.op != "rotary" or found.variant.tensors != 2 else found.variant


def plain_rotation(function: Any) -> Any:
    """The original of a function that Twinkle replaced, or the function itself."""
    placed = placed_as(function)
    return function if placed is None else placed.original
