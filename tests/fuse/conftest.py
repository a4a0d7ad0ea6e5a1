"""Where the fused kernels run in tests, and how often they did."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
import torch

from twinkle.fuse import forward, group_norm_silu, modulated_norm, qk_norm_rotary, residual_norm
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from twinkle.registry import Registry


@pytest.fixture
def device(clean_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the ops of places run, and nothing but these is wanted."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if where.type == "cpu":
        from twinkle.ops import launch

        monkeypatch.setenv("TRITON_INTERPRET", "1")
        from twinkle.ops.modulated_norm import triton as _
        from twinkle.ops.qk_norm_rotary import triton as _  # noqa: F401, F811
        from twinkle.ops.rms_norm.triton_kernels import mean_square

        if type(mean_square).__name__ != "InterpretedFunction":
            pytest.skip("the kernels were imported for a GPU before")
        monkeypatch.setattr(launch, "DEVICE_TYPES", frozenset({"cpu"}))
    runtime.options.kernels = forward.OPS
    runtime.options.verify = "auto"
    return where


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kernel ran, proofs included."""
    places = {
        "residual_norm": residual_norm,
        "qk_norm_rotary": qk_norm_rotary,
        "modulated_norm": modulated_norm,
        "group_norm": group_norm_silu,
    }
    counts = dict.fromkeys(places, 0)
    for op, module in places.items():

        def run(*args: Any, _op: str = op, _run: Any = module.run) -> Any:
            counts[_op] += 1
            return _run(*args)

        monkeypatch.setattr(module, "run", run)
    return counts
