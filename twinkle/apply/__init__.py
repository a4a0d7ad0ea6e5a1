"""The way through the rooms: what is registered is matched, loaded, proved and put in place."""

from __future__ import annotations

__all__ = ["reset"]


def reset() -> None:
    """Restore every function, cancel every watch and forget every registration.

    Models that were kernelized keep their kernels; ``unkernelize_model`` takes those out.
    """
    import sys

    from twinkle.apply.options import options
    from twinkle.registry import offers, registry
    from twinkle.report.records import session

    activation = sys.modules.get("twinkle.apply.activation")
    if activation is not None:
        activation.deactivate()
    functions = sys.modules.get("twinkle.apply.functions")
    if functions is not None:
        functions.unapply()
    for name in ("embedded", "fitting", "found", "models"):
        room = sys.modules.get(f"twinkle.apply.{name}")
        if room is not None:
            room.forget()
    registry.clear()
    offers.clear()
    session.clear()
    options.reset()
