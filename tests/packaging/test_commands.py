"""The commands of the README, the pins and the metadata say the same."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def block(name: str) -> str:
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"<!-- command: {name} -->\n+```\w*\n(.*?)\n```", text, re.DOTALL)
    assert found, f"README.md has no block marked <!-- command: {name} -->"
    return found.group(1)


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in pairs}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_ci_runs_the_test_command_of_the_readme(tmp_path):
    script = (ROOT / ".ci/run").read_text()
    # The script up to the point where it would make the environment, and what it found by then.
    head = script[: script.index("scratch=")].replace('cd "$(dirname "$0")/.."', f'cd "{ROOT}"')
    (tmp_path / "run").write_text(head + '\nprintf "%s\\n" "$command"\n')
    done = subprocess.run(["bash", tmp_path / "run"], capture_output=True, text=True, check=True)
    assert done.stdout == block("test") + "\n"


@pytest.mark.parametrize("name", ["run", "test"])
def test_command_of_the_readme_installs_the_pinned_set(name):
    assert "-c constraints.txt" in block(name)


def test_test_command_checks_style_types_and_tests():
    command = block("test")
    places = [command.index(word) for word in ("ruff check", "ruff format --check", "mypy", "pytest")]
    assert places == sorted(places)


def test_every_installed_requirement_is_pinned():
    from importlib import metadata

    try:
        root = metadata.distribution("twinkle-kernel")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is not installed here")
    assert root.version
    missing, seen, todo = (
        [],
        set(),
        [("twinkle-kernel", "test"), ("twinkle-kernel", "all"), ("twinkle-kernel", "")],
    )
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name != "twinkle-kernel" and name not in pinned():
            missing.append(name)
        for line in metadata.distribution(name).requires or []:
            todo += needed(line, extra)
    assert sorted(set(missing)) == []


def needed(line: str, extra: str) -> list[tuple[str, str]]:
    """The distributions a requirement asks for here, with the extras of each."""
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
        return []
    name = normal(requirement.name)
    return [(name, "")] + [(name, wanted) for wanted in requirement.extras]


def test_pins_name_no_build_of_one_platform():
    assert [name for name, version in pinned().items() if "+" in version] == []
