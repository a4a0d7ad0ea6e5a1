"""Sources: where the implementation of a kernel is loaded from.

One class a kind of source, each loaded at first use: code in hand (:mod:`~twinkle.sources.code`),
a local package (:mod:`~twinkle.sources.local`), an installed package
(:mod:`~twinkle.sources.installed`) and the Kernel Hub (:mod:`~twinkle.sources.hub.source`).

Standard library only: this package is imported at interpreter start.
"""

from __future__ import annotations

from twinkle.sources.spec import from_spec

__all__ = ["from_spec"]
