"""The sources a kernel may have: one record each, with its keys and how it is built.

The configuration checks a registration by these records (``twinkle.config.one_source``), and
:func:`from_spec` builds what was checked. A new source is its class, a record in :data:`SOURCES`, and
in ``twinkle.config.fields`` what the value of a new key may be.

Standard library only: this module is imported at interpreter start. Nothing is imported or
downloaded here, and no path is touched: a source loads at first use.
"""

from __future__ import annotations

import os

from twinkle.errors import ConfigError
from twinkle.sources.code import is_dotted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from typing import Any

    from twinkle.records import Source

__all__ = ["SOURCES", "Registration", "SourceRule", "from_spec", "named_sources", "source_keys"]


class Registration:
    """The checked keys of one kernel, and what holds where they say nothing.

    Attributes:
        keys: The keys that were given; none of them is ``None``.
        kind: ``"layer"`` or ``"function"``.
        default_name: What the implementation is called when no name is given.
        base_dir: What a relative ``repo_path`` is relative to; ``None`` is the working directory.
        trust_remote_code: The setting that holds where the registration says nothing.
        where: Where the registration stands, for messages.
    """

    __slots__ = ("base_dir", "default_name", "keys", "kind", "trust_remote_code", "where")

    def __init__(
        self,
        keys: Mapping[str, Any],
        *,
        kind: str,
        default_name: str,
        base_dir: str | None,
        trust_remote_code: object = False,
        where: str | None = None,
    ) -> None:
        self.keys = keys
        self.kind = kind
        self.default_name = default_name
        self.base_dir = base_dir
        self.trust_remote_code = trust_remote_code
        self.where = where

    @property
    def name(self) -> str:
        """The name of the implementation where it is: that of a method without its class."""
        name: str = self.keys.get("layer_name") or self.default_name.rpartition(".")[2]
        return name

    @property
    def attributes(self) -> Mapping[str, object]:
        """What a layer class expects on ``self`` and its target lacks."""
        attributes: Mapping[str, object] = self.keys.get("attributes", {})
        return attributes


class SourceRule:
    """One kind of source: what a registration says of it, and how it is built.

    Attributes:
        key: The key that names the source.
        build: Makes the source of a checked registration.
        kinds: The kinds of kernels that may come from it.
        needs: The keys that must stand beside ``key``: what each names, and an example.
        beside: The other keys that may stand beside ``key``.
        one_of: Keys of which only one may be given.
    """

    __slots__ = ("beside", "build", "key", "kinds", "needs", "one_of")

    def __init__(
        self,
        key: str,
        build: Callable[[Registration], Source],
        *,
        kinds: tuple[str, ...] = ("layer", "function"),
        needs: Mapping[str, tuple[str, str]] | None = None,
        beside: tuple[str, ...] = (),
        one_of: tuple[str, ...] = (),
    ) -> None:
        self.key = key
        self.build = build
        self.kinds = kinds
        self.needs = needs or {}
        self.beside = beside
        self.one_of = one_of

    @property
    def companions(self) -> tuple[str, ...]:
        """The keys that have a meaning beside this source."""
        return (*self.needs, *self.beside)


# --- how each is built ----------------------------------------------------------------------------


def _code(registration: Registration) -> Source:
    from twinkle.sources.code import CodeSource

    return CodeSource(
        registration.keys["layer_impl" if registration.kind == "layer" else "func_impl"],
        kind=registration.kind,
        attributes=registration.attributes,
        where=registration.where,
    )


def _repo_object(registration: Registration) -> Source:
    from twinkle.sources.code import RepoSource

    return RepoSource(registration.keys["repo"], kind=registration.kind, where=registration.where)


def _local(registration: Registration) -> Source:
    from twinkle.sources.local import LocalSource

    package, name = _package_and_name(registration)
    path = os.path.expanduser(registration.keys["repo_path"])
    return LocalSource(
        os.path.normpath(os.path.join(registration.base_dir or os.getcwd(), path)),
        package,
        name,
        kind=registration.kind,
        device=registration.keys.get("device"),
        attributes=registration.attributes,
        where=registration.where,
    )


def _hub(registration: Registration) -> Source:
    from twinkle.sources.hub.source import HubSource

    keys = registration.keys
    return HubSource(
        keys["repo_id"],
        registration.name,
        kind=registration.kind,
        revision=keys.get("revision"),
        version=keys.get("version"),
        trust_remote_code=keys.get("trust_remote_code", registration.trust_remote_code),
        where=registration.where,
        base_dir=registration.base_dir,
    )


def _installed(registration: Registration) -> Source:
    from twinkle.sources.installed import InstalledSource

    package, name = _package_and_name(registration)
    return InstalledSource(
        package,
        name,
        kind=registration.kind,
        attributes=registration.attributes,
        where=registration.where,
    )


def _package_and_name(registration: Registration) -> tuple[str, str]:
    """The package and the name in it: ``package:name`` says both.

    Raises:
        ConfigError: The name is that of the kernel, and no name that Python could have for it.
    """
    package, _, inside = registration.keys["package_name"].partition(":")
    name = inside or registration.name
    if not is_dotted(name):
        raise ConfigError(
            "malformed layer_name",
            where=registration.where,
            found=repr(name),
            expected="Python names joined by dots",
            fix=f"did you mean {name.replace('-', '_')!r}?" if "-" in name else "give layer_name",
        )
    return package, name


# --- the table ------------------------------------------------------------------------------------

SOURCES = (
    SourceRule("layer_impl", _code, kinds=("layer",)),
    SourceRule("func_impl", _code, kinds=("function",)),
    SourceRule("repo", _repo_object, kinds=("function",)),
    SourceRule(
        "repo_path",
        _local,
        needs={"package_name": ("the package in that folder", "the_package")},
        beside=("layer_name",),
    ),
    SourceRule(
        "repo_id",
        _hub,
        beside=("layer_name", "version", "revision", "trust_remote_code"),
        one_of=("version", "revision"),
    ),
    SourceRule("package_name", _installed, beside=("layer_name",)),
)
"""Every source, in the order in which messages list them."""

# A function has the name of its target, or that of ``package:name``.
_ONLY_FOR = {"layer_name": "layer"}


def source_keys(kind: str) -> tuple[str, ...]:
    """The keys that say where a kernel of this kind comes from: first those that name a source."""
    rules = [rule for rule in SOURCES if kind in rule.kinds]
    companions = [key for rule in rules for key in rule.companions if _ONLY_FOR.get(key, kind) == kind]
    return tuple(dict.fromkeys((*(rule.key for rule in rules), *companions)))


def named_sources(keys: Collection[str], kind: str) -> list[SourceRule]:
    """The sources that a registration names; exactly one when it is right.

    A key that another source needs (``package_name`` beside ``repo_path``) names a source only
    where no other key does.
    """
    needed = {key for rule in SOURCES for key in rule.needs}
    named = [rule for rule in SOURCES if kind in rule.kinds and rule.key in keys]
    return [rule for rule in named if rule.key not in needed] or named


def from_spec(
    spec: Mapping[str, Any],
    *,
    kind: str,
    default_name: str,
    base_dir: str | None,
    trust_remote_code: object = False,
    where: str | None = None,
) -> Source:
    """The source of a registration whose keys were checked (``twinkle.config.validate``).

    Args:
        spec: The keys of :func:`source_keys`, ``attributes`` and ``device``, as far as they were given.
        kind: ``"layer"`` or ``"function"``.
        default_name: What the implementation is called when no name is given.
        base_dir: What a relative ``repo_path`` is relative to; ``None`` is the working directory.
        trust_remote_code: The setting that holds where the registration says nothing.
        where: Where the registration stands, for messages.

    Raises:
        ConfigError: The implementation in hand, the version or the name cannot be right.
    """
    (rule,) = named_sources(spec, kind)
    return rule.build(
        Registration(
            spec,
            kind=kind,
            default_name=default_name,
            base_dir=base_dir,
            trust_remote_code=trust_remote_code,
            where=where or None,
        )
    )
