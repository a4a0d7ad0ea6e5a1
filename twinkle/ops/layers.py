"""The embedded layers, as any kernel repository has them: ``package_name = "twinkle.ops"``.

Each replaces the layers of one family as they stand: Llama's norms and MLPs, Gemma's norms, torch's own
``LayerNorm``, Mixtral's experts. Bound with ``match``, as ``twinkle.toml`` beside this file does,
``for_variant`` makes one for the variant and the attribute names of whatever layer was recognised.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from twinkle.ops.catalog import exported

if TYPE_CHECKING:
    from typing import Any

__all__ = sorted(exported("layers"))


def __getattr__(name: str) -> Any:
    # Imported when asked for: registering the kernels of an op with torch takes 15 to 40 ms.
    module = exported("layers").get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(module), name)
