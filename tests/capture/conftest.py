"""A machine where captures can be put in, as far as they ask."""

from __future__ import annotations

from typing import Any

import pytest

from twinkle.apply import captures
from twinkle.capture.install import Installed
from twinkle.runtime import runtime

from .passing import begin, passing


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, clean_registry: Any, clean_hooks: None) -> None:
    """A machine whose torch is built for CUDA and has a device, as far as captures ask."""
    monkeypatch.setattr(captures, "begins", lambda: runtime.options.capture != "off")
    monkeypatch.setattr(captures, "has_device", lambda: True)
    runtime.of(Installed).calls_for = passing


@pytest.fixture
def active(device: None) -> None:
    begin(KERNELS="off")
