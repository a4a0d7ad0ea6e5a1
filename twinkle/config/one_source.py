"""The check that a kernel has exactly one source, and beside it only keys that mean something there.

The rules are the records of ``twinkle.sources.spec``. That module is imported with the first kernel of a
document, not before: a start without one does not need it.
"""

from __future__ import annotations

from twinkle.config.fields import shown
from twinkle.config.locations import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Protocol

    from twinkle.sources.spec import SourceRule

    Path = tuple[str | int, ...]

    class Wrong(Protocol):
        """The callback for each mistake found in a document."""

        def __call__(
            self, path: Path, what: str, *, found: str | None = None, expected: str, fix: str
        ) -> None:
            """Report the mistake of the key at ``path``."""
            ...


__all__ = ["check_source", "keys_of", "source_spec"]


def check_source(
    path: Path, kept: Mapping[str, Any], given: Mapping[Any, object], kind: str, wrong: Wrong
) -> None:
    """Report through ``wrong`` what cannot be right about where a kernel comes from.

    Args:
        path: Where the spec stands.
        kept: Its values that passed their own check.
        given: All its values.
        kind: ``layer`` or ``function``.
        wrong: Takes a path, what is wrong, and ``found``, ``expected`` and ``fix``.
    """
    from twinkle.sources.spec import named_sources

    named = named_sources(given, kind)
    if len(named) != 1:
        _not_one_source(path, given, kind, named, wrong)
        return
    _check_needs(path, given, named[0], wrong)
    _check_one_of(path, given, wrong)
    _check_one_name(path, kept, given, wrong)
    _check_company(path, given, kind, named[0], wrong)


def source_spec(kept: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The values that a source is built from; ``attributes`` and ``device`` decide on classes and builds."""
    from twinkle.sources.spec import source_keys

    return {key: kept[key] for key in (*source_keys(kind), "attributes", "device") if key in kept}


def _not_one_source(
    path: Path, given: Mapping[Any, object], kind: str, named: list[SourceRule], wrong: Wrong
) -> None:
    from twinkle.sources.spec import SOURCES

    keys = [rule.key for rule in SOURCES if kind in rule.kinds]
    expected = f"one of {', '.join(keys)}"
    if not named:
        wrong(
            path,
            "the kernel has no source",
            found=keys_of(given),
            expected=expected,
            fix=f'add {keys[0]} = "module:name", or repo_path and package_name',
        )
        return
    first, second = named[0].key, named[1].key
    wrong(
        (*path, second),
        f"two sources for one kernel: both {first} and {second}",
        found=_values(given, *(rule.key for rule in named)),
        expected=expected,
        fix=f"keep {first} or {second}, not both",
    )


def _check_needs(path: Path, given: Mapping[Any, object], source: SourceRule, wrong: Wrong) -> None:
    for key, (meaning, example) in source.needs.items():
        if key not in given:
            wrong(
                (*path, source.key),
                f"{source.key} without {key}",
                found=_values(given, source.key),
                expected=f"{key}, {meaning}",
                fix=f'add {key} = "{example}"',
            )


def _check_one_of(path: Path, given: Mapping[Any, object], wrong: Wrong) -> None:
    from twinkle.sources.spec import SOURCES

    for rule in SOURCES:
        both = [key for key in rule.one_of if key in given]
        if len(both) > 1:
            wrong(
                (*path, both[1]),
                f"both {both[0]} and {both[1]}",
                found=_values(given, *both),
                expected="one of them, or neither for the newest",
                fix=f"keep {both[0]} or {both[1]}, not both",
            )


def _check_one_name(path: Path, kept: Mapping[str, Any], given: Mapping[Any, object], wrong: Wrong) -> None:
    inside = kept.get("package_name", "").partition(":")[2]
    if inside and given.get("layer_name", inside) != inside:
        wrong(
            (*path, "layer_name"),
            "two names for one kernel",
            found=_values(given, "package_name", "layer_name"),
            expected="the name in one of them",
            fix="remove layer_name",
        )


def _check_company(
    path: Path, given: Mapping[Any, object], kind: str, source: SourceRule, wrong: Wrong
) -> None:
    """Refuse keys of other sources; keys that no kernel of this kind has are reported as unknown."""
    from twinkle.sources.spec import source_keys

    known = source_keys(kind)
    companions = [key for key in source.companions if key in known]
    for key in known:
        if key not in given or key == source.key or key in companions:
            continue
        if key == "trust_remote_code" and not given[key]:  # says what holds without it
            continue
        wrong(
            (*path, key),
            f"{key} has no meaning beside {source.key}",
            found=_values(given, key),
            expected=f"{', '.join(companions) or 'no other key'} beside {source.key}",
            fix=f"remove {key}",
        )


def _values(given: Mapping[Any, object], *keys: str) -> str:
    return ", ".join(f"{key} = {shown(given[key])}" for key in keys)


def keys_of(given: Mapping[Any, object]) -> str:
    """The keys of a spec, for a message."""
    names = [printable(str(key)[:40]) for key in list(given)[:8]]
    return f"the keys {', '.join(names)}" if names else "no keys"
