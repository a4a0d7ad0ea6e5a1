"""What every door calls. Standard library only, and nothing that is not needed to start."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from twinkle.config import Settings

__all__ = ["activate", "forget", "is_switched_off"]

# Doors that a user did not type: a bad configuration there must not stop the program.
_INJECTED = ("pth", "sitecustomize")

_active: dict[str, Settings] = {}


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
    if door in _INJECTED and _active:
        return next(iter(_active.values()))  # a second injected door found the same environment
    if wanted in _active:
        return _active[wanted]
    from twinkle.errors import TwinkleError

    try:
        settings = _load(wanted)
        from twinkle.apply.activation import start

        start(settings, door=door)
    except TwinkleError as error:
        if door not in _INJECTED:
            raise
        print(f"twinkle is not active, the program runs as it is: {error}", file=sys.stderr)
        return None
    _active[wanted] = settings
    return settings


def forget() -> None:
    """The next ``activate`` starts anew."""
    _active.clear()


def _load(wanted: str) -> Settings:
    from twinkle import config

    paths = [path for path in wanted.split(os.pathsep) if path]
    return config.load(paths, os.environ)
