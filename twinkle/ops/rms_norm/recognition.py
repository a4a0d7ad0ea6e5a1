"""What tells the code of an RMSNorm, and what must hold of its instances."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from twinkle.ops.rms_norm.reference import RMSNormVariant

__all__ = ["check", "core", "may_be_missing", "may_be_none"]


def core(code: Any) -> bool:
    """A root of a mean of squares, with no mean subtracted before; or torch's own ``rms_norm``."""
    squares = {"mean", "pow2"} <= code.ops and not code.ops.isdisjoint(("rsqrt", "sqrt", "pow"))
    found = ("rms_norm" in code.ops and code.size < 60) or (squares and code.size < 200)
    return found and not code.centred


def may_be_none(variant: RMSNormVariant) -> tuple[str, ...]:
    """The roles whose attribute may hold None."""
    weight = ("weight",) if variant.compute == "fused" else ()
    return ("group_size", *weight, *(("eps",) if variant.name == "fused" else ()))


def may_be_missing(variant: RMSNormVariant) -> tuple[str, ...]:
    """The roles whose attribute an instance may lack."""
    return ("weight",) if variant.optional_weight else ()


def check(instance: Any) -> None:
    """The width of a norm with a weight."""
    facts = instance.facts
    if facts.get("with_weight", True) and facts.get("weight"):
        facts["hidden_size"] = instance.get(facts["weight"]).shape[-1]
