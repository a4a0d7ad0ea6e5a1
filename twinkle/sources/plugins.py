"""Bindings that an installed package ships: entry points of the group ``twinkle.kernels``.

An entry point names a TOML document in a package, or what gives the same document in Python::

    [project.entry-points."twinkle.kernels"]
    fast-norms = "fast_norms:twinkle.toml"     # a file beside fast_norms/__init__.py
    fast-mlps = "fast_mlps.bindings:document"  # a dict, or a callable without arguments

The document is that of ``register_kernels``. Nothing here is looked for unless somebody asks.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from twinkle.errors import ConfigError, SourceError, suggest
from twinkle.files import DOCUMENT, read_bounded
from twinkle.sources import lookup
from twinkle.sources.permissions import advice, doubt_about

__all__ = ["GROUP", "Plugin", "PluginInfo", "available", "find", "load"]

GROUP = "twinkle.kernels"


class PluginInfo(NamedTuple):
    """An entry point, as the package's metadata has it; nothing of the package was imported.

    Attributes:
        name: What it is switched on by.
        dist: The distribution that has it.
        version: Of the distribution.
        value: ``package:file.toml`` or ``module:name``.
    """

    name: str
    dist: str
    version: str
    value: str

    @property
    def where(self) -> str:
        """The plugin in words, for messages."""
        return f"plugin {self.name} ({self.dist} {self.version}: {self.value})"


class Plugin(NamedTuple):
    """A loaded plugin.

    Attributes:
        document: What ``register_kernels`` takes.
        base_dir: What a relative ``repo_path`` in it is relative to.
        where: The file it came from, or the plugin in words.
        info: Its entry point.
    """

    document: dict[str, Any]
    base_dir: str
    where: str
    info: PluginInfo


def available() -> list[PluginInfo]:
    """The plugins of the installed distributions, by name; a damaged distribution is passed over."""
    found = []
    for distribution in importlib.metadata.distributions():
        try:
            for entry in distribution.entry_points:
                if entry.group == GROUP:
                    dist = distribution.metadata["Name"] or "unknown"
                    found.append(PluginInfo(entry.name, dist, distribution.version or "?", entry.value))
        except Exception:
            continue
    # The first of two installations of one distribution is the one that is imported.
    unique = {(info.dist, info.name): info for info in reversed(found)}
    return sorted(unique.values())


def find(name: str, *, where: str | None = None) -> PluginInfo:
    """The plugin ``name``, or ``distribution:name`` where several share a name; imports nothing of it.

    Args:
        name: What a configuration says.
        where: Where it says so.

    Raises:
        ConfigError: There is no such plugin, or more than one.
    """
    dist, _, plain = name.rpartition(":")
    there = available()
    matching = [info for info in there if info.name == plain and (not dist or info.dist == dist)]
    if not matching:
        names = [info.name for info in there]
        raise ConfigError(
            f"no plugin {name!r} is installed",
            where=where,
            found=", ".join(names) or "no plugin at all",
            expected=f"a package with the entry point {plain!r} in the group {GROUP}",
            fix=suggest(plain, names),
        )
    if len(matching) > 1:
        raise ConfigError(
            f"several packages have a plugin {name!r}",
            where=where,
            found=", ".join(info.dist for info in matching),
            expected="one of them",
            fix=f"write {matching[0].dist}:{plain}",
        )
    return matching[0]


def load(name: str, *, where: str | None = None) -> Plugin:
    """The document of a plugin.

    Args:
        name: As for :func:`find`.
        where: As for :func:`find`.

    Raises:
        ConfigError: There is no such plugin, or more than one.
        SourceError: It is there and cannot be loaded: the reason in words, with the cause.
    """
    info = find(name, where=where)
    module, _, attribute = info.value.partition(":")
    module, attribute = module.strip(), attribute.partition("[")[0].strip()
    if attribute.endswith(".toml"):
        return _from_file(info, module, attribute)
    return _from_code(info, module, attribute)


def _from_file(info: PluginInfo, package: str, resource: str) -> Plugin:
    directory = _directory_of(package)
    path = os.path.join(directory, resource) if directory else resource
    try:
        if directory is None:
            raise FileNotFoundError(f"no package {package!r}")
        data = read_bounded(path, DOCUMENT, check=lambda status: _refuse_others(info, path, status))
        document = _toml().loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(
            f"{info.where} cannot be read",
            found=f"{type(error).__name__}: {error}",
            expected=f"the TOML document {path}",
            fix=f"reinstall {info.dist}, or switch the plugin off",
        ) from error
    return Plugin(document, os.path.dirname(os.path.abspath(path)), path, info)


def _from_code(info: PluginInfo, module_name: str, attribute: str) -> Plugin:
    place = _file_of(module_name)
    if place is not None:
        _refuse_others(info, place)
    try:
        module = importlib.import_module(module_name)
        found = lookup.find(module, attribute, homes=("",)) if attribute else lookup.MISSING
        if callable(found):
            found = found()
    except (Exception, SystemExit) as error:
        raise SourceError(
            f"{info.where} raised",
            found=lookup.failure(error),
            fix=f"switch the plugin off, or another version of {info.dist}",
        ) from error
    if not isinstance(found, Mapping):
        raise SourceError(
            f"{info.where} gives no document",
            found=f"no {attribute!r}" if found is lookup.MISSING else repr(found),
            expected="a dict as register_kernels takes it, or a function that returns one",
        )
    file = getattr(module, "__file__", None)
    base_dir = os.path.dirname(os.path.abspath(file)) if file else os.getcwd()
    return Plugin(dict(found), base_dir, info.where, info)


def _refuse_others(info: PluginInfo, path: str, status: os.stat_result | None = None) -> None:
    """Raise where somebody else could have written the document or code of a plugin.

    Raises:
        SourceError: With the command that ends it.
    """
    doubt = doubt_about(path, status)
    if doubt is not None:
        raise SourceError(
            f"{info.where}: a plugin that others can write is not used",
            found=str(doubt),
            expected="files and directories of this user, of root, or of the owner of Python",
            fix=doubt.fix + advice(os.path.dirname(path)),
        )


def _file_of(module: str) -> str | None:
    """The file of the package a module is in, without running any of it; None where there is none."""
    top = module.partition(".")[0]
    try:
        spec = sys.modules[top].__spec__ if top in sys.modules else importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return None
    places = [spec.origin, *(spec.submodule_search_locations or ())] if spec is not None else []
    return next((place for place in places if place and os.path.exists(place)), None)


def _directory_of(package: str) -> str | None:
    """The directory of a package, without running any of it."""
    top, *inner = package.split(".")
    spec = sys.modules[top].__spec__ if top in sys.modules else importlib.util.find_spec(top)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        directory = os.path.join(place, *inner)
        if os.path.isdir(directory):
            return directory
    return None


def _toml() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib
