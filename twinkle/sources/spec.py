"""From the keys of a registration to the source they mean, or the error they are.

Standard library only: this module is imported at interpreter start. Nothing is imported or
downloaded here, and no path is touched: a source loads at first use.
"""

from __future__ import annotations

import os
from _collections_abc import Mapping  # typing's and collections' would be imported for this alone

from twinkle.errors import ConfigError
from twinkle.sources.code import is_dotted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from twinkle.records import Source

__all__ = ["from_spec"]

_IMPLEMENTATIONS = {"layer": ("layer_impl",), "function": ("func_impl", "repo")}
_NAME = {"layer": "layer_name", "function": "func_name"}


def from_spec(
    spec: Mapping[str, object],
    *,
    kind: str,
    default_name: str,
    base_dir: str | None,
    trust_remote_code: object = False,
    where: str | None = None,
) -> Source:
    """The source that the keys of one registration describe.

    Args:
        spec: ``layer_impl``, ``func_impl``, ``repo``, ``repo_path``, ``package_name``,
            ``layer_name``, ``func_name``, ``repo_id``, ``version``, ``revision``,
            ``trust_remote_code``, ``attributes`` and ``device``; ``None`` is as good as absent,
            and other keys are not read.
        kind: ``"layer"`` or ``"function"``.
        default_name: What the implementation is called when no name is given.
        base_dir: What a relative ``repo_path`` is relative to; ``None`` is the working directory.
        trust_remote_code: The setting that holds where the registration says nothing.
        where: Where the registration stands, for messages.

    Raises:
        ConfigError: The keys cannot be right together, whatever the machine.
    """
    where = where or None
    given = {key: value for key, value in spec.items() if value is not None}
    implementation = _the_one_source(given, kind, where)
    _check_company(given, implementation, kind, where)
    if implementation in ("layer_impl", "func_impl", "repo"):
        from twinkle.sources.code import CodeSource, RepoSource

        if implementation == "repo":
            return RepoSource(given["repo"], kind=kind, where=where)
        return CodeSource(
            given[implementation],
            kind=kind,
            attributes=_attributes(given, kind, where),
            where=where,
        )
    name = _text(given, _NAME[kind], where) or default_name.rpartition(".")[2]
    if implementation == "repo_id":
        return _hub(
            given,
            name,
            kind=kind,
            base_dir=base_dir,
            trust_remote_code=trust_remote_code,
            where=where,
        )
    package = _text(given, "package_name", where)
    if implementation == "repo_path":
        if package is None:
            raise ConfigError(
                "repo_path without package_name",
                where=where,
                found=f"repo_path = {given['repo_path']!r}",
                expected="package_name, the package in that directory",
                fix='add package_name = "…"',
            )
        package, name = _parted(given, package, name, kind=kind, where=where)
        return _local(given, package, name, kind=kind, base_dir=base_dir, where=where)
    assert package is not None
    return _installed(given, package, name, kind=kind, where=where)


def _the_one_source(given: Mapping[str, object], kind: str, where: str | None) -> str:
    """Which of the keys says where the implementation is; exactly one must."""
    candidates = (*_IMPLEMENTATIONS[kind], "repo_path", "repo_id")
    found = [key for key in candidates if key in given]
    expected = f"one of {', '.join((*candidates, 'package_name'))}"
    if len(found) > 1:
        raise ConfigError(
            f"two sources for one kernel: both {found[0]} and {found[1]}",
            where=where,
            found=", ".join(found),
            expected=expected,
            fix=f"keep {found[0]} or {found[1]}, not both",
        )
    if found:
        return found[0]
    if "package_name" in given:
        return "package_name"
    foreign = [key for other in _IMPLEMENTATIONS.values() for key in other if key in given]
    if foreign:
        raise ConfigError(
            f"{foreign[0]} has no meaning for a {kind}",
            where=where,
            found=foreign[0],
            expected=expected,
        )
    raise ConfigError(
        "the kernel has no source", where=where, found=", ".join(given) or "nothing", expected=expected
    )


_COMPANY = {
    "layer_impl": (),
    "func_impl": (),
    "repo": (),
    "repo_path": ("package_name",),
    "package_name": ("package_name",),
    "repo_id": ("version", "revision", "trust_remote_code"),
}


def _check_company(given: Mapping[str, object], implementation: str, kind: str, where: str | None) -> None:
    """Refuse the keys that say nothing about a source of this kind."""
    allowed = _COMPANY[implementation]
    names = () if implementation in ("layer_impl", "func_impl", "repo") else (_NAME[kind],)
    for key in ("package_name", "version", "revision", "trust_remote_code", "layer_name", "func_name"):
        if key not in given or key in allowed or key in names:
            continue
        if key == "trust_remote_code" and not given[key]:
            continue
        raise ConfigError(
            f"{key} has no meaning beside {implementation}",
            where=where,
            found=f"{key} = {given[key]!r}",
            expected=", ".join((implementation, *(a for a in allowed if a != implementation), *names)),
            fix=f"remove {key}",
        )


def _hub(
    given: Mapping[str, object],
    name: str,
    *,
    kind: str,
    base_dir: str | None,
    trust_remote_code: object,
    where: str | None,
) -> Source:
    repo_id = _text(given, "repo_id", where)
    assert repo_id is not None
    if repo_id.startswith((".", "/", "~")):
        raise ConfigError(
            "repo_id is a path",
            where=where,
            found=repr(repo_id),
            expected='"publisher/name" of a repository of the Hub',
            fix="for a directory use repo_path and package_name",
        )

    from twinkle.sources.hub.source import HubSource

    written: dict[str, Any] = {key: given.get(key) for key in ("revision", "version")}
    source: Source = HubSource(
        repo_id,
        name,
        kind=kind,
        **written,
        trust_remote_code=given.get("trust_remote_code", trust_remote_code),
        where=where,
        base_dir=base_dir,
    )
    return source


def _local(
    given: Mapping[str, object],
    package: str,
    name: str,
    *,
    kind: str,
    base_dir: str | None,
    where: str | None,
) -> Source:
    value = given["repo_path"]
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise ConfigError(
            "malformed repo_path", where=where, found=repr(value), expected="the path of a directory"
        )

    from twinkle.sources.local import LocalSource

    return LocalSource(
        os.path.normpath(os.path.join(base_dir or os.getcwd(), os.path.expanduser(path))),
        package,
        name,
        kind=kind,
        device=given.get("device"),
        attributes=_attributes(given, kind, where),
        where=where,
    )


def _installed(
    given: Mapping[str, object], package: str, name: str, *, kind: str, where: str | None
) -> Source:
    module, attribute = _parted(given, package, name, kind=kind, where=where)

    from twinkle.sources.installed import InstalledSource

    return InstalledSource(
        module, attribute, kind=kind, attributes=_attributes(given, kind, where), where=where
    )


def _parted(
    given: Mapping[str, object], package: str, name: str, *, kind: str, where: str | None
) -> tuple[str, str]:
    """``package:name`` says both; the name by itself stands in ``layer_name`` or ``func_name``."""
    module, colon, attribute = package.partition(":")
    named = _text(given, _NAME[kind], where)
    if colon and named is not None and named != attribute:
        raise ConfigError(
            f"two names for one kernel: package_name says {attribute!r}, {_NAME[kind]} says {named!r}",
            where=where,
            found=f"package_name = {package!r}, {_NAME[kind]} = {named!r}",
            expected="the name in one of them",
        )
    _check_module(module, "package_name", where)
    name = attribute if colon else name
    _check_module(name, "package_name" if colon else _NAME[kind], where)
    return module, name


def _attributes(given: Mapping[str, object], kind: str, where: str | None) -> dict[str, object]:
    attributes = given.get("attributes")
    if attributes is None or (kind == "layer" and _is_table(attributes)):
        return dict(attributes or {})  # type: ignore[call-overload, no-any-return]
    raise ConfigError(
        "malformed attributes" if kind == "layer" else "attributes have no meaning for a function",
        where=where,
        found=repr(attributes),
        expected='a table of names and values, such as { offset = 0.0, casting_mode = "llama" }',
    )


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and key.isidentifier() for key in value)


def _text(given: Mapping[str, object], key: str, where: str | None) -> str | None:
    value = given.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"malformed {key}", where=where, found=repr(value), expected="a string")
    return value.strip()


def _check_module(text: str, key: str, where: str | None) -> None:
    if not is_dotted(text):
        raise ConfigError(
            f"malformed {key}",
            where=where,
            found=repr(text),
            expected="Python names joined by dots",
            fix=f"did you mean {text.replace('-', '_')!r}?" if "-" in text else None,
        )
