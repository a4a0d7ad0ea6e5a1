"""Where triton's kernels run in tests: on a GPU, else in triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device on which the embedded kernels run in this test; skips where there is no triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    from twinkle.ops import launch

    # Read when a kernel is defined, so the modules below must not have been imported without it.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    import twinkle.ops.gated_mlp.triton
    import twinkle.ops.layer_norm.triton
    import twinkle.ops.linear_bias.triton
    import twinkle.ops.modulated_norm.triton
    import twinkle.ops.qk_norm_rotary.triton
    import twinkle.ops.residual_norm.triton  # noqa: F401
    from twinkle.ops.rms_norm.triton import reduce_partial
    from twinkle.ops.rms_norm.triton_kernels import mean_square

    if type(mean_square).__name__ != "InterpretedFunction":
        pytest.skip("the kernels were imported for a GPU before")
    monkeypatch.setattr(launch, "DEVICE_TYPES", frozenset({"cpu"}))
    try:
        reduce_partial(torch.ones(2, 4), torch.empty(4))
    except Exception as error:  # triton 3.6 with numpy 2.4, say
        pytest.skip(f"triton's interpreter does not work here: {error!r}")
    yield torch.device("cpu")


@pytest.fixture
def half(kernels: torch.device) -> torch.dtype:
    """Where to test roundings: the interpreter rounds to float16, but truncates to bfloat16."""
    return torch.bfloat16 if kernels.type == "cuda" else torch.float16


@pytest.fixture
def unplanned(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call is replayed: a test that puts a function in the place of one that launches sees every call."""
    from twinkle.ops import plans
    from twinkle.runtime import runtime

    runtime.of(plans.Kept).close()
    monkeypatch.setattr(plans, "replay_of", lambda call, inputs: (call(*inputs), None, False))


@pytest.fixture
def every_size() -> Iterator[None]:
    """Small inputs go the way of large ones on a CPU: the logits of tiny models are deferred."""
    from twinkle.ops.plain import at_every_size

    with at_every_size():
        yield
