"""Puts the sitecustomize door into the wheel, where ``twinkle run`` finds it when no ``.pth`` is read."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Hook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds ``sitecustomize_template/sitecustomize.py`` to a wheel; an editable install reads it in place."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Extend what goes into the wheel; called once a build."""
        if version == "standard":
            source = "sitecustomize_template/sitecustomize.py"
            build_data["force_include"][source] = "twinkle/_sitecustomize/sitecustomize.py"
