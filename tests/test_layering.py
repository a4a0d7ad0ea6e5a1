"""The imports of the package run one way: from a room to those below it, never back, and in no circle."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

import twinkle

PACKAGE = Path(twinkle.__file__).parent

GROUND = (
    "_version",
    "forks",
    "errors",
    "codegen",
    "_environment",
    "files",
    "modes",
    "devices",
    "targets",
    "where",
    "records",
    "registry",
    "options",
    "session",
    "runtime",
)
"""Standard library only; one of these may import what stands before it."""

ROOMS = (
    "ops",
    "op_names",
    "match",
    "sources",
    "config",
    "hooks",
    "proof",
    "fit",
    "swap",
    "fuse",
    "deferred",
    "capture",
    "report",
    "apply",
)
"""In the order of a kernel's way; one of these may import what stands before it, and the ground."""

ROOF = ("_bootstrap", "kernel", "runner", "_start", "cli", "__init__", "__main__")
"""The doors and the public API, which may import all of it."""

ORDER = (*GROUND, *ROOMS, *ROOF)

NOTHING_BUT = {"ops": {"errors", "codegen", "runtime"}}
"""Rooms that may import less than what stands before them."""


class Import(NamedTuple):
    """One import of ours: the file and line, and the dotted name of what it brings in."""

    file: Path
    line: int
    name: str


def room_of(module: str) -> str:
    """The room of a dotted name below ``twinkle``; the package itself is ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(file: Path, package: Path) -> list[Import]:
    """All imports of ours in a file: at its top, in functions, for types, and by name in a string."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = file.relative_to(package).parts[: -node.level]
                head = ".".join(("twinkle", *base, *((node.module or "").split(".") if node.module else ())))
            else:
                head = node.module or ""
            names = [f"{head}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            names = [text for text in map(_leading_text, _looked_up(node)) if text]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "sys.modules":
            names = [_leading_text(node.slice) or ""]
        found += [
            Import(file, node.lineno, name)
            for name in names
            if name == "twinkle" or name.startswith("twinkle.")
        ]
    return [entry._replace(name=_module_of(entry.name, package)) for entry in found]


def _looked_up(call: ast.Call) -> list[ast.expr]:
    """What a call looks up as a module by its name, if it does."""
    name = ast.unparse(call.func).rpartition(".")[2]
    by_name = name in ("import_module", "find_spec", "__import__") or ast.unparse(call.func) == (
        "sys.modules.get"
    )
    return call.args[:1] if by_name else []


def _leading_text(node: ast.expr) -> str | None:
    """The text of a string, or of an f-string up to its first value."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _module_of(name: str, package: Path) -> str:
    """The name itself, or ``twinkle`` where its second part is no room: ``from twinkle import activate``."""
    room = room_of(name)
    is_room = room and ((package / room).is_dir() or (package / f"{room}.py").is_file())
    return name if is_room else "twinkle"


def arrows_back(package: Path) -> list[str]:
    """Every import that does not run down the order, with its place."""
    found = []
    for file in sorted(package.rglob("*.py")):
        if file.parts[len(package.parts)].startswith("_sitecustomize"):
            continue
        room = file.relative_to(package).parts[0].removesuffix(".py")
        for _, line, name in imports_of(file, package):
            to = room_of(name)
            if to == room:
                continue
            allowed = NOTHING_BUT.get(room, ORDER[: ORDER.index(room)])
            if to not in allowed:
                found.append(f"{file.relative_to(package.parent)}:{line}: {room} imports {name}")
    return found


def test_every_import_runs_down_the_order() -> None:
    assert arrows_back(PACKAGE) == []


def test_every_room_has_its_place_in_the_order() -> None:
    names = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {
        path.stem for path in PACKAGE.glob("*.py")
    }
    assert names == set(ORDER)


def test_the_order_has_no_circle_of_rooms() -> None:
    edges: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        edges.setdefault(room, set()).update(
            room_of(entry.name) for entry in imports_of(file, PACKAGE) if room_of(entry.name) != room
        )
    while edges:
        leaves = {room for room, needs in edges.items() if not needs & edges.keys()}
        assert leaves, f"rooms that import each other in a circle: {sorted(edges)}"
        edges = {room: needs for room, needs in edges.items() if room not in leaves}


@pytest.mark.parametrize(
    "planted",
    [
        "from twinkle.apply.layers import kernelize",
        "def f():\n    from twinkle.apply import layers",
        "TYPE_CHECKING = False\nif TYPE_CHECKING:\n    from twinkle.swap.candidate import Candidate",
        "import sys\nsys.modules.get('twinkle.hooks.imports')",
        "import sys\nsys.modules['twinkle.hooks.imports']",
        "from importlib import import_module\nimport_module(f'twinkle.hooks.{name}')",
        "from ..swap import layers",
        "import twinkle.report",
        "from twinkle import report",
        "import twinkle",
    ],
)
def test_a_planted_import_that_runs_back_is_found(tmp_path: Path, planted: str) -> None:
    package = tmp_path / "twinkle"
    for room in ("ops", "apply", "swap", "hooks", "report"):
        (package / room).mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "ops" / "planted.py").write_text(planted)
    assert len(arrows_back(package)) == 1
