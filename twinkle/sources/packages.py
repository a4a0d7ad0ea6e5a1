"""The packages of local repositories, importable under names that say where they are.

``/home/me/kernels/my_kernels`` is ``twinkle.sources.packages.repo__shome_sme_skernels.my_kernels``:
the name holds the path, so that

- two repositories with a package of the same name live side by side, without ``sys.path``;
- what is pickled by that name is found again by any process that has Twinkle and the path, with
  no registration there: unpickling imports this module, and that puts the finder in place.

Bytecode is neither read nor written: a file edited within a second of its last change is never
stale, and nothing is left in the repository.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import importlib.util
import json
import os
import sys
from typing import TYPE_CHECKING

from twinkle import forks
from twinkle.codegen import compile_tree, parse_source
from twinkle.files import DOCUMENT, read_bounded
from twinkle.runtime import runtime
from twinkle.sources.permissions import refuse_writable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import CodeType, ModuleType
    from typing import Any

__all__ = ["Imports", "directory_of", "generation", "importing", "name_of", "restore", "unload"]

# A module with a __path__ is a package: its submodules are found by the finder below.
__path__: list[str] = []

SOURCE = 64 << 20
"""The most bytes of a module's source."""

_PREFIX = __name__ + "."
_ESCAPES = {"_": "__", "/": "_s", ".": "_d", "-": "_h"}
_UNESCAPES = {code: char for char, code in _ESCAPES.items()}


class Imports:
    """The imports of local packages that are under way, and how often each package was forgotten.

    Attributes:
        lock: Held while ``sys.modules`` and the tables here change, never while code of a package runs.
        threads: The threads that import a package now.
        generations: How often a package was taken out of ``sys.modules``.
    """

    def __init__(self) -> None:
        self.lock = forks.lock()
        self.threads: dict[str, int] = {}
        self.generations: dict[str, int] = {}

    def in_child(self) -> None:
        """Begin anew after a fork: of the threads only the forking one lives on."""
        self.threads.clear()


def name_of(directory: str, package: str | None = None) -> str:
    """The module name of ``package`` in ``directory``, or of ``directory`` as a package itself."""
    path = _encode(os.path.realpath(directory))
    return f"{_PREFIX}package_{path}" if package is None else f"{_PREFIX}repo_{path}.{package}"


def directory_of(name: str) -> str:
    """The directory that a name of :func:`name_of` stands for.

    Raises:
        ValueError: It is no such name.
    """
    kind, _, path = name.removeprefix(_PREFIX).partition(".")[0].partition("_")
    if not name.startswith(_PREFIX) or kind not in ("repo", "package"):
        raise ValueError(f"not the name of a local package: {name!r}")
    return _decode(path)


@contextlib.contextmanager
def importing(name: str) -> Iterator[None]:
    """Guard the import of a package: when it raises, nothing of it stays half-imported.

    No lock of ours is held meanwhile (import locks do that work; a second one could be waited for
    by the thread that this import waits for).
    """
    package = _package_of(name)
    state = runtime.of(Imports)
    with state.lock:
        state.threads[package] = state.threads.get(package, 0) + 1
        before = set(_loaded(package))
    try:
        yield
    except BaseException:
        with state.lock:
            # With another thread in the same package, what is new may be that thread's.
            if state.threads[package] == 1:
                _drop(loaded for loaded in _loaded(package) if loaded not in before)
        raise
    finally:
        with state.lock:
            state.threads[package] = state.threads.get(package, 1) - 1


def generation(name: str) -> int:
    """How often the package of ``name`` was reloaded: objects of an earlier generation are stale."""
    return runtime.of(Imports).generations.get(_package_of(name), 0)


def unload(name: str) -> dict[str, ModuleType]:
    """Take the package of ``name`` out of ``sys.modules``; returns what was taken out."""
    state = runtime.of(Imports)
    with state.lock:
        package = _package_of(name)
        taken = {loaded: sys.modules[loaded] for loaded in _loaded(package)}
        _drop(iter(taken))
        state.generations[package] = state.generations.get(package, 0) + 1
    return taken


def restore(taken: dict[str, ModuleType]) -> None:
    """Put back what :func:`unload` took out."""
    with runtime.of(Imports).lock:
        for name, module in taken.items():
            sys.modules[name] = module
            parent, _, last = name.rpartition(".")
            if parent in sys.modules:
                setattr(sys.modules[parent], last, module)


def _package_of(name: str) -> str:
    parts = name.removeprefix(_PREFIX).split(".")
    return _PREFIX + ".".join(parts[: 2 if parts[0].startswith("repo_") else 1])


def _loaded(package: str) -> list[str]:
    inside = package + "."
    return [name for name in list(sys.modules) if name == package or name.startswith(inside)]


def _drop(names: Iterator[str]) -> None:
    for name in list(names):
        module = sys.modules.pop(name, None)
        parent, _, last = name.rpartition(".")
        holder = sys.modules.get(parent)
        if holder is not None and holder.__dict__.get(last) is module:
            holder.__dict__.pop(last, None)


def _encode(path: str) -> str:
    def escaped(char: str) -> str:
        if char.isascii() and char.isalnum():
            return char
        return _ESCAPES.get(char) or f"_x{ord(char):x}_"

    return "".join(map(escaped, path))


def _decode(text: str) -> str:
    path, index = [], 0
    while index < len(text):
        if text[index] != "_":
            path.append(text[index])
            index += 1
        elif text[index : index + 2] in _UNESCAPES:
            path.append(_UNESCAPES[text[index : index + 2]])
            index += 2
        else:
            end = text.index("_", index + 1)
            path.append(chr(int(text[index + 2 : end], 16)))
            index = end + 1
    return "".join(path)


class _KernelLoader(importlib.machinery.SourceFileLoader):
    """Compiles the source itself, and reads ``import my_kernels`` in ``my_kernels`` as itself."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = read_bounded(path, SOURCE)
        package = _package_of(self.name)
        own_name = _own_name(package)
        if own_name and own_name.encode() in source:
            tree = _OwnImports(own_name, package).visit(parse_source(source, path))
            return compile_tree(ast.fix_missing_locations(tree), path)
        code: CodeType = compile(source, path, "exec", dont_inherit=True)
        return code


class _OwnImports(ast.NodeTransformer):
    """Points absolute imports of a package by itself at the name it has here."""

    def __init__(self, own_name: str, package: str) -> None:
        self._own_name = own_name
        self._package = package
        self._holder, _, self._last = package.rpartition(".")

    def _renamed(self, module: str | None) -> str | None:
        first, dot, rest = (module or "").partition(".")
        return self._package + dot + rest if first == self._own_name else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        """``from my_kernels.x import y``."""
        renamed = self._renamed(node.module) if not node.level else None
        if renamed is not None:
            node.module = renamed
        return node

    def visit_Import(self, node: ast.Import) -> list[ast.stmt]:
        """``import my_kernels.x as y``, and ``import my_kernels.x``, which binds ``my_kernels``."""
        statements: list[ast.stmt] = []
        for alias in node.names:
            renamed = self._renamed(alias.name)
            if renamed is None or alias.asname:
                name = ast.alias(name=renamed or alias.name, asname=alias.asname)
                statements.append(ast.Import(names=[name]))
                continue
            if renamed != self._package:
                call = ast.Call(
                    func=ast.Name(id="__import__", ctx=ast.Load()),
                    args=[ast.Constant(value=renamed)],
                    keywords=[],
                )
                statements.append(ast.Expr(value=call))
            itself = ast.alias(name=self._last, asname=self._own_name)
            statements.append(ast.ImportFrom(module=self._holder, names=[itself], level=0))
        return [ast.copy_location(statement, node) for statement in statements]


def _own_name(package: str) -> str | None:
    """What a package calls itself: its directory's name, or what its metadata.json says."""
    first, _, name = package.removeprefix(_PREFIX).partition(".")
    if first.startswith("repo_"):
        return name
    try:
        path = os.path.join(directory_of(package), "metadata.json")
        written = json.loads(read_bounded(path, DOCUMENT))["name"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return written.replace("-", "_") if isinstance(written, str) else None


class _Finder:
    """Finder of the modules below this one; any other import costs one comparison."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(_PREFIX):
            return None
        parts = fullname.removeprefix(_PREFIX).split(".")
        if len(parts) == 1:
            return _root(fullname)
        for entry in path or ():
            # A new one each time: a FileFinder remembers the listing of its directory.
            spec = importlib.machinery.FileFinder(entry, *_LOADERS).find_spec(fullname)
            if spec is not None:
                if len(parts) == 2 and parts[0].startswith("repo_"):
                    refuse_writable(_place(spec))
                return spec
        return None


_LOADERS: tuple[Any, ...] = (
    (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES),
    (_KernelLoader, importlib.machinery.SOURCE_SUFFIXES),
)


def _root(fullname: str) -> importlib.machinery.ModuleSpec | None:
    """The spec of a repository (a package with nothing to run) or of a directory that is a package."""
    try:
        directory = directory_of(fullname)
    except ValueError:
        return None
    if not os.path.isdir(directory):
        raise ModuleNotFoundError(f"the local kernel directory {directory} is gone", name=fullname)
    if fullname.startswith(_PREFIX + "repo_"):
        spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = [directory]
        return spec
    refuse_writable(directory)
    entry = os.path.join(directory, "__init__.py")
    return importlib.util.spec_from_file_location(
        fullname, entry, loader=_KernelLoader(fullname, entry), submodule_search_locations=[directory]
    )


def _place(spec: importlib.machinery.ModuleSpec) -> str:
    if spec.submodule_search_locations:
        return next(iter(spec.submodule_search_locations))
    return spec.origin or ""


def _install() -> None:
    """Stand before the path finder, which would find the same files and read their bytecode.

    Not at the front: hooks that watch imports are asked first, for these as for all others.
    """

    def is_ours(finder: object) -> bool:
        return (getattr(finder, "__module__", ""), getattr(finder, "__name__", "")) == (__name__, "_Finder")

    finders = [finder for finder in sys.meta_path if not is_ours(finder)]
    path_finder = importlib.machinery.PathFinder
    finders.insert(finders.index(path_finder) if path_finder in finders else len(finders), _Finder)
    sys.meta_path[:] = finders


_install()
forks.in_child(lambda: runtime.of(Imports).in_child())
