"""What tells the code of a mixture of experts, and what must hold of its instances."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["check", "core"]


def core(code: Any) -> bool:
    """Rows added up by index in a loop, or batched products."""
    return {"index_add", "loop"} <= code.ops or ("bmm" in code.ops and code.size < 120)


def check(instance: Any) -> None:
    """Parameters of three dimensions, all on one device; and what transformers would run for them."""
    facts = instance.facts
    if getattr(instance.get(facts["gate_up"]), "ndim", 0) != 3:
        instance.refuse(f"{facts['gate_up']} has not three dimensions")
    if instance.rest_on("_is_expert_parallel", False):
        instance.refuse("its experts are spread over several devices")
    # transformers may run another implementation of the same sum than the one in the source.
    facts["implementation"] = instance.rest_on_choice("config._experts_implementation")
