"""The report as data: one record a binding, with everything a reader needs to judge it."""

from __future__ import annotations

import os
import sys

from twinkle import __version__
from twinkle.registry import Registry, registry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["SCHEMA_VERSION", "Session", "session", "snapshot"]

SCHEMA_VERSION = 1


class Session:
    """How Twinkle came into this process.

    Attributes:
        door: ``api``, ``run``, ``pth``, ``sitecustomize``, or empty when nothing activated it.
        configs: The configuration files that were read.
        remarks: What a reader should know that belongs to no binding.
    """

    def __init__(self) -> None:
        self.door = ""
        self.configs: tuple[str, ...] = ()
        self.remarks: list[str] = []

    def remark(self, text: str) -> None:
        """Add a remark once."""
        if text not in self.remarks:
            self.remarks.append(text)

    def clear(self) -> None:
        """Forget it all."""
        self.door = ""
        self.configs = ()
        self.remarks = []


session = Session()


def snapshot(source: Registry = registry) -> dict[str, object]:
    """The report as JSON-ready data; ``docs/report.md`` describes the schema."""
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
                "kind": binding.kind,
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
        "remarks": [*session.remarks, *_bypassed()],
    }


def _bypassed() -> list[str]:
    """Modules that came in without our finder being asked, and past whom."""
    imports = sys.modules.get("twinkle.hooks.imports")
    if imports is None:
        return []
    past = "was imported past Twinkle's finder"
    found = [f"{module} {past}: {whom}" for module, whom in imports.bypassed().items()]
    return found + [f"{module} {past}, and is as it was" for module in imports.missed()]


def _versions() -> dict[str, str]:
    """Versions of what is imported already; nothing is imported for a report."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _PACKAGES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if isinstance(version, str):
            found[name] = version
    return found


_PACKAGES: Iterable[str] = ("torch", "transformers", "kernels", "triton", "wrapt")
