"""What tells the code of an RMSNorm, and what must hold of its instances."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Any

    from twinkle.ops.rms_norm.reference import RMSNormVariant

__all__ = ["check", "core", "may_be_missing", "may_be_none", "possible", "spellings", "written_alike"]


def core(code: Any) -> bool:
    """A root of a mean of squares, with no mean subtracted before; torch's ``rms_norm``; a Euclidean norm."""
    squares = "pow2" in code.ops and not code.ops.isdisjoint(("mean", "sum"))
    squares = squares and not code.ops.isdisjoint(("rsqrt", "sqrt", "pow"))
    divided = {"vector_norm", "div"} <= code.ops and code.size < 60
    found = ("rms_norm" in code.ops and code.size < 60) or (squares and code.size < 200) or divided
    return found and not code.centred


def spellings(variant: RMSNormVariant) -> tuple[dict[str, Any], ...]:
    """Arguments of the definition that are not there where the width of the input says what they would."""
    if variant.compute in ("fused", "fused_float32"):
        return ({}, {"normalized_shape": None})
    if variant.scale != "none":
        widths: tuple[dict[str, Any], ...] = ({"scale": None, "width": None}, {"scale": None})
        if variant.scale == "norm_multiplied":
            return ({}, *widths)
        powers = tuple({**width, "math_root": root} for width in widths for root in (False, True))
        # A number that an instance has is no inverse of anything.
        return powers if variant.scale == "norm_inverse" else ({}, *powers)
    if variant.statistic == "sum":
        return ({"width": None}, {})
    return ({},)


def possible(variant: RMSNormVariant, operations: Collection[str]) -> bool:
    """Whether a variant can be the code in which there are these operations."""
    if variant.compute in ("fused", "fused_float32"):
        return "rms_norm" in operations
    measure = {"mean": "mean", "sum": "sum", "norm": "vector_norm"}[variant.statistic]
    if measure not in operations:
        return False
    if variant.statistic == "mean" and variant.eps_place == "mean":
        return True  # the common ones: near misses are told from them
    least, casts = variant.eps_place == "least", variant.compute != "input"
    if variant.weight in ("one_plus", "offset") and "add" not in operations:
        return False
    return least == ("clamp" in operations) and casts == ("to" in operations)


def written_alike(variant: RMSNormVariant) -> tuple[str, ...]:
    """The roles that only ``__init__`` tells apart: a product with a number and one with a weight."""
    return ("weight", "scale") if variant.statistic == "norm" and variant.eps_place == "least" else ()


def may_be_none(variant: RMSNormVariant) -> tuple[str, ...]:
    """The roles whose attribute may hold None."""
    plain = variant.compute in ("fused", "fused_float32") and variant.weight_cast == "none"
    weight = ("weight",) if variant.nullable != "no" or (plain and variant.weight == "plain") else ()
    bias = ("bias",) if variant.bias else ()
    return ("group_size", *weight, *bias, *(("eps",) if variant.compute == "fused" else ()))


def may_be_missing(variant: RMSNormVariant) -> tuple[str, ...]:
    """The roles whose attribute an instance may lack."""
    return ("weight",) if variant.optional_weight else ()


def check(instance: Any) -> None:
    """The width of a norm with a weight."""
    facts = instance.facts
    path = facts.get("width")
    if path is not None and type(instance.get(path) if isinstance(path, str) else path) is not int:
        instance.refuse(f"{path} is no whole number")
    if facts.get("with_weight", True) and facts.get("weight"):
        facts["hidden_size"] = instance.get(facts["weight"]).shape[-1]
