"""A kernel has exactly one source, and beside it only the keys that mean something there.

``from_spec`` of twinkle.sources holds to the same rules; here every mistake of a document is found
at once, at the line of its key.
"""

from __future__ import annotations

from twinkle.config.fields import shown
from twinkle.config.locations import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Protocol

    Path = tuple[str | int, ...]

    class Wrong(Protocol):
        """Notes one mistake."""

        def __call__(
            self, path: Path, what: str, *, found: str | None = None, expected: str, fix: str
        ) -> None:
            """Note it."""
            ...


__all__ = ["SOURCE_KEYS", "check_source", "keys_of"]

_IMPLEMENTATIONS = {"layers": ("layer_impl",), "functions": ("func_impl", "repo")}

# What may stand beside each source; nothing may stand beside the others.
_BESIDE: dict[str, tuple[str, ...]] = {
    "repo_path": ("package_name", "layer_name"),
    "package_name": ("layer_name",),
    "repo_id": ("layer_name", "version", "revision", "trust_remote_code"),
}
_OF_A_SOURCE = ("package_name", "layer_name", "version", "revision", "trust_remote_code")

SOURCE_KEYS = {
    "layers": ("layer_impl", "repo_path", "repo_id", *_OF_A_SOURCE),
    "functions": (
        *("func_impl", "repo", "repo_path", "repo_id"),
        *(key for key in _OF_A_SOURCE if key != "layer_name"),
    ),
}


def check_source(
    path: Path, kept: Mapping[str, Any], given: Mapping[Any, object], section: str, wrong: Wrong
) -> None:
    """Note through ``wrong`` what is not right about where the kernel comes from.

    Args:
        path: Where the spec stands.
        kept: Its values that passed their own check.
        given: All its values.
        section: ``layers`` or ``functions``.
        wrong: Takes a path, what is wrong, and ``found``, ``expected`` and ``fix``.
    """
    ways = (*_IMPLEMENTATIONS[section], "repo_path", "repo_id")
    found = [key for key in ways if key in given]
    expected = f"one of {', '.join((*ways, 'package_name'))}"
    if len(found) > 1:
        wrong(
            (*path, found[1]),
            f"two sources for one kernel: both {found[0]} and {found[1]}",
            found=", ".join(f"{key} = {shown(given[key])}" for key in found),
            expected=expected,
            fix=f"keep {found[0]} or {found[1]}, not both",
        )
        return
    if not found and "package_name" not in given:
        wrong(
            path,
            "the kernel has no source",
            found=keys_of(given),
            expected=expected,
            fix=f'add {ways[0]} = "module:name", or repo_path and package_name',
        )
        return
    way = found[0] if found else "package_name"
    if way == "repo_path" and "package_name" not in given:
        wrong(
            (*path, "repo_path"),
            "repo_path without package_name",
            found=f"repo_path = {shown(given['repo_path'])}",
            expected="package_name, the package in that folder",
            fix='add package_name = "the_package"',
        )
    if "version" in given and "revision" in given:
        wrong(
            (*path, "revision"),
            "both version and revision",
            found=f"version = {shown(given['version'])}, revision = {shown(given['revision'])}",
            expected="one of them, or neither for the newest",
            fix="keep version or revision, not both",
        )
    inside = kept.get("package_name", "").partition(":")[2]
    if inside and given.get("layer_name", inside) != inside:
        wrong(
            (*path, "layer_name"),
            "two names for one kernel",
            found=f"package_name = {shown(given['package_name'])}, layer_name = {shown(given['layer_name'])}",
            expected="the name in one of them",
            fix="remove layer_name",
        )
    beside = (way, *_BESIDE.get(way, ()))
    for key in _OF_A_SOURCE:
        if key not in given or key in beside or (key == "trust_remote_code" and not given[key]):
            continue
        if key not in SOURCE_KEYS[section]:
            continue  # reported as unknown
        wrong(
            (*path, key),
            f"{key} has no meaning beside {way}",
            found=f"{key} = {shown(given[key])}",
            expected=f"{', '.join(beside[1:]) or 'no other key'} beside {way}",
            fix=f"remove {key}",
        )


def keys_of(given: Mapping[Any, object]) -> str:
    """The keys of a spec, for a message."""
    names = [printable(str(key)[:40]) for key in list(given)[:8]]
    return f"the keys {', '.join(names)}" if names else "no keys"
