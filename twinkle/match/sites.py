"""Ops that are a place inside a larger forward."""

from __future__ import annotations

from typing import Any


def recognise_sites(term: Any, run: Any, function: Any, owner: Any) -> Any:
    return None
