"""How many planted kernels are caught at first use and always; and no right one is.

``python -m pytest tests/proof/test_catches.py -s`` prints the table of ``docs/reliability.md``.
"""

from __future__ import annotations

import functools
import warnings

import pytest
from planted import RIGHT, WRONG, Plant, rejected_by

pytestmark = pytest.mark.usefixtures("clean_registry")

MODES = {"first-use": 1, "always": 16}
MISSED: dict[str, set[str]] = {"first-use": {"norm: from the hundredth call on"}, "always": set()}
"""What no comparison of the calls at hand can see."""


@functools.cache
def caught(mode: str) -> dict[str, str | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {plant.name: rejected_by(plant, MODES[mode]) for plant in WRONG}


@pytest.mark.parametrize("mode", MODES)
def test_planted_kernels_are_caught(mode: str) -> None:
    found = caught(mode)
    assert len(found) == len(WRONG) >= 70, "each has a name of its own"
    missed = {name for name, reason in found.items() if reason is None}
    print(f"\n| `{mode}` | {len(found) - len(missed)} of {len(found)} |")
    assert missed <= MISSED[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("plant", RIGHT, ids=lambda plant: plant.name)
def test_a_right_kernel_stays(plant: Plant, mode: str) -> None:
    assert rejected_by(plant, MODES[mode]) is None
