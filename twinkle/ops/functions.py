"""The embedded functions, as any kernel repository has them: ``package_name = "twinkle.ops"``.

``ApplyRotaryPosEmb``, ``RMSNormFunction`` and their like are what ``twinkle.toml`` beside this file binds
with ``match``: their ``for_variant`` makes one for the variant and the arguments of whatever function was
recognised.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from twinkle.ops.catalog import exported

if TYPE_CHECKING:
    from typing import Any

__all__ = sorted(exported("functions"))


def __getattr__(name: str) -> Any:
    # Imported when asked for, as in layers.py.
    module = exported("functions").get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(module), name)
