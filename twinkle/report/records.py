"""The report as data: one record a binding, with everything a reader needs to judge it."""

from __future__ import annotations

import os
import sys

from twinkle._version import __version__
from twinkle.runtime import runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from twinkle.registry import Registry

__all__ = ["SCHEMA_VERSION", "snapshot"]

SCHEMA_VERSION = 1


def snapshot(source: Registry | None = None) -> dict[str, object]:
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
            "rank": os.environ.get("RANK"),
            "argv": list(getattr(sys, "argv", [])),
        },
        "door": session.door,
        "configs": list(session.configs),
        "bindings": [
            {
                "kind": binding.scope,
                "target": binding.target,
                "kernel": binding.kernel,
                "source": binding.source,
                "device": binding.device,
                "mode": binding.mode,
                "state": binding.state,
                "reason": binding.reason,
                "instances": binding.instances,
                "proof": binding.proof,
                "load_seconds": binding.load_seconds,
                "notes": list(binding.notes),
                "origin": binding.origin,
            }
            for binding in source.bindings
        ],
        "remarks": session.all_remarks(),
    }


def _versions() -> dict[str, str]:
    """Versions of what is imported already; nothing is imported for a report."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _PACKAGES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if isinstance(version, str):
            found[name] = version
    return found


_PACKAGES: Iterable[str] = ("torch", "transformers", "kernels", "triton", "wrapt")
