"""What every door calls. Standard library only, and nothing that is not needed to start."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from twinkle.config import Settings

__all__ = ["activate", "is_switched_off"]

# Doors that a user did not type: a bad configuration there must not stop the program.
_INJECTED = ("pth", "sitecustomize")


def is_switched_off() -> bool:
    """``TWINKLE_DISABLE=1`` or ``TWINKLE_USE_KERNELS=0``: every door stays shut, and nothing is imported."""
    disable = os.environ.get("TWINKLE_DISABLE", "").strip().lower()
    use = os.environ.get("TWINKLE_USE_KERNELS", "").strip().lower()
    return disable in ("1", "true", "yes", "on") or use in ("0", "false", "no", "off")


def activate(config: str | None = None, *, door: str = "api") -> Settings | None:
    """Read the configuration, register what it asks for and watch for its targets.

    Args:
        config: A path, several joined by the path separator, or ``"auto"``; ``TWINKLE_CONFIG``
            when not given, and ``"auto"`` when that is not set either.
        door: Who calls: ``api``, ``run``, ``pth`` or ``sitecustomize``.

    Returns:
        The settings in force; ``None`` when Twinkle is switched off, or when an injected door met
        a bad configuration (which it says on stderr).

    Raises:
        ConfigError: The configuration cannot be right; nothing was registered.
    """
    if is_switched_off():
        return None
    wanted = config if config is not None else os.environ.get("TWINKLE_CONFIG") or "auto"
    from twinkle.apply.activation import Activation, start
    from twinkle.errors import TwinkleError
    from twinkle.runtime import runtime

    active = runtime.of(Activation).settings
    if door in _INJECTED and active:
        return next(iter(active.values()))  # a second injected door found the same environment
    if wanted in active:
        return active[wanted]
    try:
        settings = _load(wanted)
        start(settings, door=door)
    except TwinkleError as error:
        if door not in _INJECTED:
            raise
        print(f"twinkle is not active, the program runs as it is: {error}", file=sys.stderr)
        return None
    active[wanted] = settings
    return settings


def _load(wanted: str) -> Settings:
    from twinkle import config

    paths = [path for path in wanted.split(os.pathsep) if path]
    return config.load(paths, os.environ)
