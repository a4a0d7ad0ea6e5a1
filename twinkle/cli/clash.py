"""Notices the other distribution that installs an import package named ``twinkle``."""

from __future__ import annotations

import os
import sys

__all__ = ["clash"]

# Whichever of the two was installed last has overwritten files of the other.
_RIVAL = "twinkle-kit"


def clash(paths: list[str] | None = None) -> str | None:
    """What is wrong, in words, when that distribution is installed; it is found by its folder's name.

    Args:
        paths: Where to look; ``sys.path`` by default.
    """
    prefix = _RIVAL.replace("-", "_") + "-"
    for folder in sys.path if paths is None else paths:
        try:
            names = os.listdir(folder or os.curdir)
        except OSError:
            continue
        for name in names:
            if name.startswith(prefix) and name.endswith(".dist-info"):
                return (
                    f"{_RIVAL} is installed in {folder}, and its import package is called `twinkle` too: the "
                    "two overwrite each other's files. Keep them in separate environments; here, "
                    f"`pip uninstall {_RIVAL} twinkle-kernel` and `pip install twinkle-kernel` mend it."
                )
    return None
