"""Fixtures every room's tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twinkle.registry import Registry


@pytest.fixture
def clean_registry() -> Iterator[Registry]:
    """An empty registry; afterwards every function is restored and everything is forgotten."""
    from twinkle.apply import reset
    from twinkle.registry import registry

    reset()
    yield registry
    reset()
