"""How many functions one call of a kernel calls on the host: each is a part of a microsecond.

Measured by ``benchmarks/host.py`` in a process of its own, with launches that do nothing, and without what
torch's own Python calls. The bounds are what there is now: whoever adds a call raises them in sight of all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "host.py"

MOST = {
    "rms_norm": (5, 18, 12, 35),
    "layer_norm": (7, 24, 15, 47),
    "residual_norm (RMS)": (7, 25, 15, 44),
    "residual_norm (layer)": (11, 31, 19, 55),
    "modulated_norm": (17, 31, 25, 56),
    "group_norm": (8, 24, 16, 48),
    "rotary": (14, 28, 22, 44),
    "qk_norm_rotary": (5, 33, 13, 64),
    "gated activation": (6, 17, 13, 33),
    "activation": (6, 15, 13, 27),
}
"""Of each op: calls in Python and in C of a forward that records a graph, and of it and its backward."""


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, int]]:
    """From op, way and step to the calls in Python and in C."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("TWINKLE_", "TRITON_"))}
    answer = subprocess.run(
        [sys.executable, str(SCRIPT), "--stubbed", "--counts"], env=environ, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)["after"]


def test_every_op_is_counted(counts):
    assert {key.split("/")[0] for key in counts} == {*MOST}


@pytest.mark.parametrize("op", MOST)
def test_a_call_calls_no_more_functions(counts, op):
    forward, both = counts[f"{op}/kernel/forward"], counts[f"{op}/kernel/both"]
    found = (forward["python"], forward["c"], both["python"], both["c"])
    assert all(own <= most for own, most in zip(found, MOST[op], strict=True)), (found, MOST[op])
