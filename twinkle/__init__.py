"""Twinkle: faster PyTorch and transformers programs, unchanged.

``import twinkle`` imports nothing but this file; the names below arrive at first use.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from twinkle import kernel as kernel
    from twinkle import report as report
    from twinkle._bootstrap import activate as activate
    from twinkle._version import __version__ as __version__

__all__ = ["__version__", "activate", "kernel", "report"]


def __getattr__(name: str) -> object:
    if name == "activate":
        from twinkle._bootstrap import activate

        return activate
    if name == "__version__":
        from twinkle._version import __version__

        return __version__
    if name in ("kernel", "report"):
        from importlib import import_module

        return import_module(f"twinkle.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
