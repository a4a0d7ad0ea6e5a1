"""Watch: has the thing a kernel is about appeared yet? Import hooks and model construction."""

from __future__ import annotations

from twinkle.hooks.imports import install, uninstall, watch_module

__all__ = ["install", "uninstall", "watch_module"]
