"""Locating the code in a local repository: a plain package, or the build variant for this machine.

The layouts of the ``kernels`` package are ``build/<variant>/``, ``<variant>/`` and a directory with
``metadata.json`` itself; the code is in ``__init__.py`` there or in ``<python_name>/__init__.py``.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from twinkle.errors import MissingDependencyError, SourceError, suggest
from twinkle.files import DOCUMENT, read_bounded
from twinkle.sources import packages, variants

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Layout", "locate"]


class Layout(NamedTuple):
    """The package to import from a local repository.

    Attributes:
        module_name: The name to import it by.
        directory: The package's directory.
        beside: What else could be imported from the same directory.
    """

    module_name: str
    directory: str
    beside: frozenset[str]


def locate(
    repo: str,
    package: str,
    *,
    device: object,
    described: str,
    where: str | None,
    trace: list[tuple[str, bool, str]],
) -> Layout:
    """Find ``package`` in ``repo``.

    A built variant goes before a plain package of that name (a repository that has both keeps
    the sources of its binaries there).

    Args:
        repo: The directory.
        package: The package's name.
        device: The device the kernel is registered for.
        described: The source in words.
        where: Where it was registered.
        trace: Takes ``(variant, accepted, reason)`` of every build, best first; also when none fits.

    Raises:
        SourceError: There is no such directory, package, or variant that fits.
    """
    _check_directory(repo, package, described, where)
    trace.clear()
    for base in (os.path.join(repo, "build"), repo):
        names = [name for name in _directories(base) if variants.is_variant(name)]
        if not names:
            continue
        trace.extend(variants.choose(names, device=device))
        for name, accepted, _ in trace:
            if accepted:
                return _built(os.path.join(base, name), package, described, where)
        break
    plain = _plain(repo, package)
    if plain is not None:
        if os.path.isfile(os.path.join(repo, "metadata.json")):
            _check_metadata(repo, described, where)
        return plain
    if trace:
        raise SourceError(
            f"{described} has no variant for this machine",
            where=where,
            found="; ".join(f"{name}: {reason}" for name, _, reason in trace),
            expected=variants.wanted(device=device),
        )
    if os.path.isfile(os.path.join(repo, "metadata.json")):
        return _built(repo, package, described, where)
    there = sorted(_importable(repo))
    raise SourceError(
        f"no package {package!r} in {repo}",
        where=where,
        found=", ".join(there) or "no package at all",
        expected=f"{package}/__init__.py",
        fix=suggest(package, there),
    )


def _check_directory(repo: str, package: str, described: str, where: str | None) -> None:
    try:
        os.listdir(repo)
    except FileNotFoundError as error:
        above = repo
        while above != os.path.dirname(above) and not os.path.exists(above):
            above = os.path.dirname(above)
        raise SourceError(
            f"{described}: no such directory",
            where=where,
            found=f"{repo} does not exist ({above} does)",
            expected=f"a directory with the package {package!r}",
            fix=suggest(os.path.relpath(repo, above).split(os.sep)[0], _directories(above)),
        ) from error
    except NotADirectoryError as error:
        parent = os.path.dirname(repo)
        if os.path.basename(parent) == package:
            parent = os.path.dirname(parent)
        raise SourceError(
            f"{described}: repo_path is a file",
            where=where,
            found=repo,
            expected=f"the directory that holds the package {package!r}",
            fix=f"repo_path = {parent!r}" if _plain(parent, package) else None,
        ) from error
    except OSError as error:
        raise SourceError(
            f"{described}: the directory cannot be read", where=where, found=f"{error.strerror}: {repo}"
        ) from error


def _directories(path: str) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    except OSError:
        return []


def _is_package(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, name)) for name in ("__init__.py", "layers.py"))


def _importable(repo: str) -> Iterable[str]:
    for entry in os.scandir(repo):
        if entry.is_dir() and _is_package(entry.path):
            yield entry.name
        elif entry.name.endswith(".py") and entry.name not in ("__init__.py", "setup.py", "conftest.py"):
            yield entry.name.removesuffix(".py")


def _plain(repo: str, package: str) -> Layout | None:
    """The layout of a plain package: ``repo/package/``, ``repo/package.py``, or ``repo`` of that name."""
    inside = os.path.join(repo, *package.split("."))
    real = os.path.realpath(repo)
    if _is_package(inside) or os.path.isfile(inside + ".py"):
        holder, directory = repo, inside if os.path.isdir(inside) else repo
    elif os.path.basename(real) == package and _is_package(real):
        holder, directory = os.path.dirname(real), real
    else:
        return None
    name = packages.name_of(holder, package)
    return Layout(name, os.path.realpath(directory), frozenset(_importable(holder)) - {package})


def _built(variant: str, package: str, described: str, where: str | None) -> Layout:
    """The layout of a build variant, with its metadata read and its dependencies found."""
    python_name = _check_metadata(variant, described, where)
    if python_name is not None and python_name != package:
        raise SourceError(
            f"no package {package!r} in {variant}",
            where=where,
            found=f"{python_name} (metadata.json)",
            expected=package,
            fix=f'package_name = "{python_name}"',
        )
    if os.path.isfile(os.path.join(variant, "__init__.py")):
        name = packages.name_of(variant)
    elif os.path.isfile(os.path.join(variant, package, "__init__.py")):
        name, variant = packages.name_of(variant, package), os.path.join(variant, package)
    else:
        raise SourceError(
            f"{described} has no code",
            where=where,
            found=", ".join(sorted(os.listdir(variant))) or "an empty directory",
            expected=f"__init__.py or {package}/__init__.py in {variant}",
        )
    return Layout(name, os.path.realpath(variant), frozenset())


def _check_metadata(variant: str, described: str, where: str | None) -> str | None:
    """The package's name by ``metadata.json``, or ``None`` when there is no such file.

    Raises:
        SourceError: The file is damaged, or what it depends on is not installed.
    """
    path = os.path.join(variant, "metadata.json")
    try:
        metadata: Any = json.loads(read_bounded(path, DOCUMENT))
        name, depends = metadata.get("name"), metadata.get("python-depends", [])
        if not (name is None or isinstance(name, str)) or not isinstance(depends, list):
            raise ValueError("name is no string, or python-depends no list")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"{described}: metadata.json cannot be read",
            where=where,
            found=f"{error} in {path}",
            expected='{"name": "…", "python-depends": […], …}',
        ) from error
    absent = [depend for depend in depends if isinstance(depend, str) and not _is_installed(depend)]
    if absent:
        raise MissingDependencyError(
            f"{described} needs packages that are not installed",
            where=where,
            found=f"python-depends = {depends} in {path}",
            expected=", ".join(absent),
            fix=f"pip install {shlex.join(absent)}",
        )
    return name.replace("-", "_") if name else None


def _is_installed(dependency: str) -> bool:
    import importlib.metadata
    import importlib.util
    import re

    name = re.split(r"[\s<>=!~;\[]", dependency, maxsplit=1)[0]
    try:
        importlib.metadata.distribution(name)
        return True
    except (importlib.metadata.PackageNotFoundError, ValueError):
        pass
    module = name.replace("-", "_").partition(".")[0]
    return module in sys.modules or (bool(module) and importlib.util.find_spec(module) is not None)
