"""Tests that compare numbers pass on another processor: what they expect does not follow from this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PARTS = {
    "ops": ("ops/test_cpu_variants.py", "deferred/test_few_logits.py", "ops/test_layer_norm.py"),
    "loss": ("ops/test_causal_lm_loss.py", "deferred/test_deferred_logits.py", "deferred/test_loss_proof.py"),
}
# Torch and oneDNN without vector instructions, on one thread: other orders of every sum and product, and no
# bfloat16 of the processor's own. Any machine can be this one.
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_numbers_are_compared_alike_without_vector_instructions(part: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    files = [str(TESTS / file) for file in PARTS[part]]
    options = ("-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow", "--no-header")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=TESTS.parent,
        env=environment | PLAIN,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
