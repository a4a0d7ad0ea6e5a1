"""Twinkle: faster PyTorch and transformers programs, unchanged."""

from __future__ import annotations

__version__ = "0.1.0"
