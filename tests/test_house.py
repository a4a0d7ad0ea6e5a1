"""What holds for every file of the package: lengths of functions, state, words that one place reads."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

import twinkle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGE = Path(twinkle.__file__).parent

LONGEST = 60
"""Lines of a function's body, from its first statement after the docstring to its last, comments and blank
lines between them included. The signature and the docstring do not count: they grow with what a function is
told and with what is said of it, not with what it does."""

HEAVY = ("ops", "match", "proof", "fit", "swap", "fuse", "deferred")
"""Rooms that a program enters at its first kernel, and not at its start, but for records of ops."""


def _is_kernel_or_reference(path: str) -> bool:
    """Whether a file is outside the limit of lines: kernels, what launches them, and references.

    A kernel in triton's language is one function by its nature, its launch binds every argument of it, and a
    reference is read from top to bottom against the formula that it stands for.
    """
    name = PurePosixPath(path).name
    return name == "reference.py" or name.startswith("triton")


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def _docstring(node: ast.AST) -> ast.Constant | None:
    """The docstring of a module, class or function, as a node."""
    if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    first = node.body[0] if node.body else None
    if not isinstance(first, ast.Expr) or not isinstance(first.value, ast.Constant):
        return None
    return first.value if isinstance(first.value.value, str) else None


def long_functions(path: str, text: str) -> list[str]:
    """Functions with a body of more than ``LONGEST`` lines."""
    if _is_kernel_or_reference(path):
        return []
    found = []
    for function in _functions(ast.parse(text)):
        body = function.body[1:] if _docstring(function) else function.body
        lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
        if lines > LONGEST:
            found.append(f"{path}:{function.lineno}: {function.name} has {lines} lines")
    return found


def format_skips(path: str, text: str) -> list[str]:
    """Comments that turn the formatter off."""
    return [
        f"{path}:{token.start[0]}: {token.string}"
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
        and "".join(token.string.split()).startswith(("#fmt:skip", "#fmt:off", "#yapf:"))
    ]


def forgetting(path: str, text: str) -> list[str]:
    """Functions of a module named ``forget``: what a module keeps belongs to the runtime."""
    return [
        f"{path}:{node.lineno}: forget"
        for node in ast.parse(text).body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == "forget"
    ]


def global_statements(path: str, text: str) -> list[str]:
    """Functions that rebind a name of their module."""
    return [
        f"{path}:{node.lineno}: global {name}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Global)
        for name in node.names
    ]


def _imported_at_top(tree: ast.Module) -> set[str]:
    """The modules outside the package that the statements of a module import when it is executed."""
    return {
        name.partition(".")[0]
        for node in tree.body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }


def own_type_checking(path: str, text: str) -> list[str]:
    """``TYPE_CHECKING = False`` in a module of a heavy room that loads ``torch`` or ``typing`` anyhow.

    The name is set by hand only to spare the interpreter's start the import of ``typing``. A module that
    imports torch or typing at its top is not imported at that time, or gains nothing by it.
    """
    if path.partition("/")[0] not in HEAVY:
        return []
    tree = ast.parse(text)
    if not _imported_at_top(tree) & {"torch", "typing", "triton", "transformers"}:
        return []
    return [
        f"{path}:{node.lineno}: TYPE_CHECKING is typing's here"
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(to, ast.Name) and to.id == "TYPE_CHECKING" for to in node.targets)
    ]


def op_targets_read(path: str, text: str) -> list[str]:
    """Text that begins with ``match:``, outside docstrings and outside ``targets.py``.

    ``targets.parse_target`` reads such a target and ``targets.Op`` writes it; all else holds an ``Op``. A
    comparison with ``match`` alone is the same reading, after a split at the colon.
    """
    if path == "targets.py":
        return []
    tree = ast.parse(text)
    docstrings = {id(constant) for node in ast.walk(tree) if (constant := _docstring(node)) is not None}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            reads = str(node.value).startswith("match:")
        else:
            reads = isinstance(node, ast.Compare) and _equals(node, "match")
        if reads:
            found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    return found


def _equals(comparison: ast.Compare, text: str) -> bool:
    """Whether a comparison asks for equality, and one of its sides is the text."""
    sides = (comparison.left, *comparison.comparators)
    return all(isinstance(operator, (ast.Eq, ast.NotEq)) for operator in comparison.ops) and any(
        isinstance(side, ast.Constant) and side.value == text for side in sides
    )


def undocumented(path: str, text: str) -> list[str]:
    """Public modules without a docstring."""
    parts = PurePosixPath(path).with_suffix("").parts
    private = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return [] if private or ast.get_docstring(ast.parse(text)) else [f"{path}: no docstring"]


_LOCK_MODULES = ("_thread", "threading", "multiprocessing", "os")
_LOCKS = {"Lock", "RLock", "Condition", "Semaphore", "BoundedSemaphore", "register_at_fork"}


def locks_of_their_own(path: str, text: str) -> list[str]:
    """Locks that ``forks.lock`` has not made: held at a fork, they would be held in the child for ever."""
    if path == "forks.py":
        return []
    found = []
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module in (
            "_thread",
            "threading",
            "multiprocessing",
            "os",
        ):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [node.attr] if node.value.id in _LOCK_MODULES else []
        found += [f"{path}:{node.lineno}: {name}" for name in names if name in _LOCKS]
    return found


def private_names_in_tests(path: str, text: str) -> list[str]:
    """Private names of our modules that a test imports, reads, or replaces through ``setattr``.

    A name that an import binds to one of our modules stands for it in the whole file; modules whose
    own name is private (``twinkle._start``) are no private names.
    """
    tree = ast.parse(text)
    modules: set[str] = set()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "twinkle":
            for alias in node.names:
                if _is_private(alias.name) and node.module != "twinkle":
                    found.append(f"{path}:{node.lineno}: {alias.name}")
                elif _is_module(f"{node.module}.{alias.name}"):
                    modules.add(alias.asname or alias.name)
        elif isinstance(node, ast.Import):
            modules |= {alias.asname for alias in node.names if alias.asname and _is_module(alias.name)}
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, ast.Attribute) and _names_module(node.value, modules):
            name = node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr") and len(node.args) > 1:
            first, second = node.args[:2]
            if isinstance(second, ast.Constant) and _names_module(first, modules):
                name = str(second.value)
        elif isinstance(node, ast.Constant) and str(node.value).startswith("twinkle."):
            module, _, last = str(node.value).rpartition(".")
            name = last if _is_module(module) and not _is_module(str(node.value)) else ""
        if _is_private(name):
            found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and name.isidentifier() and not name.startswith("__")


def _is_module(name: str) -> bool:
    """Whether a dotted name is that of a module of the package."""
    room, *rest = name.split(".")
    place = PACKAGE.joinpath(*rest)
    return room == "twinkle" and (place.is_dir() or place.with_suffix(".py").is_file())


def _names_module(node: ast.expr, modules: set[str]) -> bool:
    """Whether an expression is one of the names, or the dotted name of a module of ours."""
    return ast.unparse(node) in modules or _is_module(ast.unparse(node))


CHECKS = (
    long_functions,
    format_skips,
    forgetting,
    global_statements,
    own_type_checking,
    op_targets_read,
    undocumented,
    locks_of_their_own,
)

PLANTED = {
    long_functions: [
        ("fit/planted.py", "def f(x):\n    'What it does.'\n" + "    x += 1\n" * 61),
        ("fit/planted.py", "class A:\n    async def f(self, x):\n" + "        x += 1\n" * 61),
        ("ops/planted/op.py", "def f(x):\n    def g(y):\n" + "        y += 1\n" * 61),
    ],
    format_skips: [
        ("fit/planted.py", "x = [1,2]  # fmt: skip\n"),
        ("fit/planted.py", "# fmt:off\nx = [1,2]\n"),
    ],
    forgetting: [("fit/planted.py", "def forget():\n    pass\n")],
    global_statements: [("fit/planted.py", "def f():\n    global _kept\n    _kept = 1\n")],
    own_type_checking: [
        ("fit/planted.py", "import torch\nTYPE_CHECKING = False\n"),
        ("ops/planted/op.py", "from torch.nn import functional\nTYPE_CHECKING = False\n"),
        ("match/planted.py", "from typing import Any\nTYPE_CHECKING = False\n"),
    ],
    op_targets_read: [
        ("fit/planted.py", "def f(x):\n    return x.startswith('match:')\n"),
        ("config/planted.py", "def f(x):\n    return x.removeprefix('match:')\n"),
        ("config/planted.py", "def f(x):\n    return f'match:{x}'\n"),
        ("config/planted.py", "def f(x):\n    return x[:6] == 'match:'\n"),
        ("config/planted.py", "def f(x):\n    return x.partition(':')[0] == 'match'\n"),
    ],
    private_names_in_tests: [
        ("fit/test_planted.py", "from twinkle.proof import cache_key\ncache_key._PACKAGE\n"),
        ("fit/test_planted.py", "from twinkle.proof import cache_key as key\nsetattr(key, '_PACKAGE', 1)\n"),
        ("fit/test_planted.py", "from twinkle.proof import cache_key\npatch.setattr(cache_key, '_A', 1)\n"),
        ("fit/test_planted.py", "from twinkle.proof.cache_key import _PACKAGE\n"),
        ("fit/test_planted.py", "import twinkle.proof.cache_key\ntwinkle.proof.cache_key._PACKAGE\n"),
        ("fit/test_planted.py", "patch.setattr('twinkle.proof.cache_key._PACKAGE', 1)\n"),
    ],
    undocumented: [("fit/planted.py", "x = 1\n"), ("fit/__init__.py", "")],
    locks_of_their_own: [
        ("fit/planted.py", "import threading\nlock = threading.RLock()\n"),
        ("fit/planted.py", "from _thread import RLock\nlock = RLock()\n"),
        ("fit/planted.py", "from threading import Condition as C\n"),
        ("fit/planted.py", "import os\nos.register_at_fork(after_in_child=print)\n"),
    ],
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_package_holds_to_it(check: Callable[[str, str], list[str]]) -> None:
    found = [
        offence
        for file in sorted(PACKAGE.rglob("*.py"))
        for offence in check(file.relative_to(PACKAGE).as_posix(), file.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("check", "path", "text"),
    [(check, *planted) for check, several in PLANTED.items() for planted in several],
)
def test_a_planted_offender_is_found(check: Callable[[str, str], list[str]], path: str, text: str) -> None:
    assert len(check(path, text)) >= 1


def test_every_check_has_a_planted_offender() -> None:
    assert set(PLANTED) == {*CHECKS, private_names_in_tests}


def test_tests_reach_into_no_private_names_of_modules() -> None:
    tests = Path(__file__).parent
    found = [
        offence
        for file in sorted(tests.rglob("*.py"))
        for offence in private_names_in_tests(
            file.relative_to(tests).as_posix(), file.read_text(encoding="utf-8")
        )
    ]
    assert found == []


@pytest.mark.parametrize(
    ("check", "path", "text"),
    [
        (long_functions, "ops/planted/triton.py", "def f(x):\n" + "    x += 1\n" * 61),
        (long_functions, "ops/planted/op.py", "def f(x):\n    '''" + "Words.\n" * 90 + "'''\n    return x\n"),
        (forgetting, "fit/planted.py", "class A:\n    def forget(self):\n        pass\n"),
        (own_type_checking, "ops/planted/recognition.py", "TYPE_CHECKING = False\n"),
        (op_targets_read, "fit/planted.py", "def f():\n    'match:rms_norm is read elsewhere.'\n"),
        (private_names_in_tests, "doors/test_planted.py", "from twinkle import _start\n_start.main()\n"),
        (private_names_in_tests, "doors/test_planted.py", "'twinkle._bootstrap' in sys.modules\n"),
        (undocumented, "apply/_planted.py", "x = 1\n"),
        (locks_of_their_own, "fit/planted.py", "import threading\nthreading.get_ident()\n"),
    ],
)
def test_what_is_allowed_is_not_found(check: Callable[[str, str], list[str]], path: str, text: str) -> None:
    assert check(path, text) == []
