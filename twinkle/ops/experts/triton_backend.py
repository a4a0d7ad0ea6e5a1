"""Mixture of experts by Triton: the layer of the op, whose steps go by the device of their tensors."""

from __future__ import annotations

from twinkle.ops.experts.layer import layer_class, supports

__all__ = ["layer_class", "supports"]
