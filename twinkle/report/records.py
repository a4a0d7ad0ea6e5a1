"""The report as data: one record a binding, with everything a reader needs to judge it."""

from __future__ import annotations

import os
import sys

from twinkle._version import __version__
from twinkle.report import captures, idle, where
from twinkle.runtime import runtime
from twinkle.session import JOB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from twinkle.records import Binding
    from twinkle.registry import Registry

__all__ = ["SCHEMA_VERSION", "snapshot"]

SCHEMA_VERSION = 1


def snapshot(source: Registry | None = None) -> dict[str, Any]:
    """The report as JSON-ready data; ``docs/report.md`` describes the schema.

    Args:
        source: Whose bindings; by default the registry of this process.
    """
    source = source or runtime.registry
    session = runtime.session
    return {
        "schema": SCHEMA_VERSION,
        "twinkle": __version__,
        "versions": _versions(),
        "process": {
            "pid": os.getpid(),
            "job": os.environ.get(JOB),
            "rank": os.environ.get("RANK"),
            "argv": list(getattr(sys, "argv", [])),
        },
        "door": session.door,
        "configs": list(session.configs),
        "bindings": [_binding(binding) for binding in source.bindings],
        "captures": captures.records(),
        "remarks": list(dict.fromkeys([*session.all_remarks(), *_nameless(source)]))
        + ([] if source.bindings else [f"nothing is bound: {why}" for why in idle.nothing_bound()]),
    }


def _binding(binding: Binding) -> dict[str, Any]:
    state, reason, instances = binding.state, binding.reason, binding.instances
    if state == "active" and binding.ran is False:
        state, reason = "pending", "in place, and has not run yet"
    if state == "pending" and not instances:
        most = binding.most_instances
        met = f"was in place on {most} {binding.scope}{'' if most == 1 else 's'}, now gone, and has not run"
        reason = met if most else idle.waits_for(binding)
    elif state == "failed" and not instances:
        reason = idle.mistake_in(binding.target) or reason  # it knows what was meant
    binding.look()
    return {
        "kind": binding.scope,
        "target": binding.target,
        "kernel": binding.kernel,
        "source": binding.source,
        "device": binding.device,
        "mode": binding.mode,
        "state": state,
        "reason": reason,
        "instances": instances,
        "most_instances": max(binding.most_instances, instances),
        "proof": binding.proof,
        "speeds": {at: dict(figures) for at, figures in binding.speeds.items()},
        "load_seconds": binding.load_seconds,
        "notes": [*binding.notes, *where.note(binding)],
        "origin": binding.origin,
    }


def _nameless(source: Registry) -> list[str]:
    """The layers that were bound to a name of no kernel."""
    return [
        f"{entry.target.text} is bound to {entry.kernel_name!r}, and no kernel has that name"
        for entry in source.nameless()
    ]


def _versions() -> dict[str, str]:
    """Versions of what is imported already; nothing is imported for a report."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _PACKAGES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if isinstance(version, str):
            found[name] = version
    return found


_PACKAGES: Iterable[str] = ("torch", "transformers", "kernels", "triton", "wrapt")
