"""What the doors and ``twinkle run`` share: which variables open a door, and paths that children can use.

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

import os

__all__ = ["VARIABLES", "absolute"]

VARIABLES = ("TWINKLE_CONFIG", "TWINKLE_LAYERS", "TWINKLE_FUNCTIONS")
"""The variables of which one must be set, and not empty, for the door to open."""


def absolute(path: str) -> str:
    """A path for a variable: child processes, which read it again, may start in another directory.

    ``auto`` stays, and nothing is normalised: ``link/../twinkle.toml`` is another file than
    ``twinkle.toml``.
    """
    path = os.path.expanduser(path)
    return path if path == "auto" or os.path.isabs(path) else os.path.join(os.getcwd(), path)
