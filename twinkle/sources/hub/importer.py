"""Import the variant of a kernel from its directory, once for the process."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder
from typing import TYPE_CHECKING, Any, NamedTuple

from twinkle.errors import MissingDependencyError, SourceError
from twinkle.runtime import runtime
from twinkle.sources.hub.kernels_package import read_metadata
from twinkle.sources.hub.verified import ExtensionLoader, SourceLoader
from twinkle.sources.locks import NamedLocks

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import ModuleType

__all__ = ["Locked", "import_variant"]


class Locked(NamedTuple):
    """What the private copy of a locked variant was made from.

    Attributes:
        origin: The variant in the cache.
        digests: The SHA-256 of each of its files.
    """

    origin: Path
    digests: Mapping[str, str]


class _Imported:
    """The modules of the variants imported in this process, by directory."""

    def __init__(self) -> None:
        self.modules: dict[str, ModuleType] = {}


def import_variant(
    variant_dir: Path,
    *,
    dependencies: Mapping[str, ModuleType],
    what: str,
    where: str | None,
    locked: Locked | None = None,
) -> ModuleType:
    """The module of a variant.

    The module is shared with ``kernels`` in both directions where that keeps loaded kernels by path:
    a kernel whose operators are registered with torch must not run twice. A module name that another
    variant already took (two repositories with one metadata id) is left alone and another one used, so
    that each has the submodules of its own.

    Args:
        variant_dir: ``snapshots/<commit>/build/<variant>``.
        dependencies: The kernels it loads with ``kernels.get_kernel_dep``.
        what: The kernel, for messages.
        where: Where the registration stands.
        locked: For the private copy of a locked variant, what it is a copy of. Such a one is never taken from
            ``kernels``, which does not check what it imports.

    Raises:
        MissingDependencyError: It imports a module that is not installed.
        SourceError: It raises on import.
    """
    key = str(variant_dir)
    modules = runtime.of(_Imported).modules
    with runtime.of(NamedLocks).of(f"variant {key}"):
        module = modules.get(key)
        if module is None and locked is None:
            module = _loaded_by_kernels(variant_dir)
        if module is None:
            module = _execute(variant_dir, dependencies, what, where, locked)
        modules[key] = module
        return module


def _execute(
    variant_dir: Path,
    dependencies: Mapping[str, ModuleType],
    what: str,
    where: str | None,
    locked: Locked | None,
) -> ModuleType:
    metadata = read_metadata(variant_dir)
    init = variant_dir / "__init__.py"
    if not init.is_file():
        init = variant_dir / str(metadata.get("name", "")).replace("-", "_") / "__init__.py"
    if not init.is_file():
        raise SourceError(
            f"{what} has no module to import",
            where=where,
            found=f"no __init__.py in {variant_dir}",
            fix="take another version of the kernel, or tell its publisher",
        )
    name = _module_name(metadata, variant_dir)
    digests = None if locked is None else locked.digests
    _use_sources_only(variant_dir, digests)
    spec = importlib.util.spec_from_file_location(
        name,
        init,
        loader=SourceLoader(name, str(init), variant_dir, digests),
        submodule_search_locations=[str(init.parent)],
    )
    if spec is None or spec.loader is None:
        raise SourceError(f"{what} cannot be imported", where=where, found=f"no loader for {init}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _dependencies(dependencies):
            spec.loader.exec_module(module)
    except BaseException as error:
        # Half of it must not stay: a retry imports from scratch.
        for loaded in [n for n in sys.modules if n == name or n.startswith(f"{name}.")]:
            del sys.modules[loaded]
        if not isinstance(error, (Exception, SystemExit)):
            raise
        raise _import_failed(error, name, what, where) from error
    _tell_kernels(variant_dir if locked is None else locked.origin, module)
    return module


def _import_failed(error: BaseException, name: str, what: str, where: str | None) -> SourceError:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and missing.partition(".")[0] != name:
        package = missing.partition(".")[0]
        return MissingDependencyError(
            f"{what} imports a package that is not installed",
            where=where,
            found=f"no module named {missing}",
            fix=f"install the package that provides {package}: pip install {package}",
        )
    return SourceError(
        f"{what} raises when it is imported",
        where=where,
        found=f"{type(error).__name__}: {error}",
        fix="take another version of the kernel, or tell its publisher",
    )


def _module_name(metadata: Mapping[str, Any], variant_dir: Path) -> str:
    identity = metadata.get("id")
    if isinstance(identity, str) and identity.isidentifier() and not _is_taken(identity):
        return identity
    name = str(identity or metadata.get("name") or "kernel").replace("-", "_")
    name = "".join(letter if letter.isalnum() or letter == "_" else "_" for letter in name)
    return f"_twinkle_{name}_{hashlib.sha256(str(variant_dir).encode()).hexdigest()[:12]}"


def _is_taken(name: str) -> bool:
    if any(loaded == name or loaded.startswith(f"{name}.") for loaded in tuple(sys.modules)):
        return True
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        return importlib.util.find_spec(name) is not None
    return False


def _use_sources_only(variant_dir: Path, digests: Mapping[str, str] | None) -> None:
    """Let submodules of a variant, too, be compiled from their sources, and checked where it is locked."""
    extension: Any = ExtensionFileLoader
    if digests is not None:
        extension = partial(ExtensionLoader, root=variant_dir, digests=digests)
    source = partial(SourceLoader, root=variant_dir, digests=digests)
    folders = [variant_dir, *(path for path in variant_dir.rglob("*") if path.is_dir())]
    for folder in folders:
        if folder.name != "__pycache__":
            loaders: Any = ((extension, EXTENSION_SUFFIXES), (source, [".py"]))
            sys.path_importer_cache[str(folder)] = FileFinder(str(folder), *loaders)


def _loaded_by_kernels(variant_dir: Path) -> ModuleType | None:
    """The module that ``kernels`` itself loaded from the same directory, when all of it is from there."""
    registry = getattr(sys.modules.get("kernels.importer"), "_loaded_kernels", None)
    loaded = registry.get(variant_dir) if isinstance(registry, dict) else None
    module: ModuleType | None = getattr(loaded, "module", None)
    if module is None:
        return None
    prefix = f"{module.__name__}."
    for name, submodule in tuple(sys.modules.items()):
        file = getattr(submodule, "__file__", None)
        if name.startswith(prefix) and file and not str(file).startswith(str(variant_dir)):
            return None
    return module


def _tell_kernels(variant_dir: Path, module: ModuleType) -> None:
    importer = sys.modules.get("kernels.importer")
    registry = getattr(importer, "_loaded_kernels", None)
    if importer is None or not isinstance(registry, dict):
        return
    with contextlib.suppress(Exception):  # a courtesy to `kernels`, of no use to the kernel itself
        metadata = importer.Metadata.read_from_file(variant_dir / "metadata.json")
        registry.setdefault(
            variant_dir, importer.LoadedKernel(metadata=metadata, module=module, repo_info=None)
        )


def _dependencies(dependencies: Mapping[str, ModuleType]) -> contextlib.AbstractContextManager[Any]:
    try:
        use = importlib.import_module("kernels.deps").use_kernel_deps
    except (ImportError, AttributeError):
        return contextlib.nullcontext()
    manager: contextlib.AbstractContextManager[Any] = use(dict(dependencies))
    return manager
