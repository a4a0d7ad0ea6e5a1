"""The counts of ``docs/reliability.md`` are those of the tests."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DOCUMENT = (HERE.parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")


def table(marker):
    """The rows behind ``<!-- marker -->``, header and rule left out."""
    lines = DOCUMENT.split(f"<!-- {marker} -->\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def cases(path, name):
    """How many cases a test has, read from its ``parametrize`` marks."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"counted_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    count = 1
    for mark in getattr(getattr(module, name), "pytestmark", ()):
        if mark.name == "parametrize":
            count *= len(mark.args[1])
    return count


def hub_faults():
    import importlib.util

    spec = importlib.util.spec_from_file_location("counted_faults", HERE / "test_hub_faults.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Counter(str(value) if action == "status" else action for _, action, value, _ in module.HUB_FAULTS)


OTHERS = table("other faults")


def test_counts_of_the_faults_of_the_hub():
    assert {row[0]: int(row[-1]) for row in table("hub faults")} == hub_faults()


@pytest.mark.parametrize("row", OTHERS, ids=lambda row: row[0])
def test_count_of_other_faults(row):
    file, name = row[1].strip("`").split("::")
    assert cases(HERE / file, name) == int(row[-1])


def test_total():
    total = sum(int(row[-1]) for row in (*table("hub faults"), *OTHERS))
    assert int(re.search(r"\*\*(\d+) cases\*\*", DOCUMENT)[1]) == total


def test_every_test_of_the_faults_is_counted():
    counted = {row[1].strip("`").split("::")[1] for row in OTHERS} | {"test_fault_of_the_hub"}
    tree = ast.parse((HERE / "test_hub_faults.py").read_text())
    tests = {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert tests <= counted
