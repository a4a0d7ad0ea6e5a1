"""``twinkle check``: read a configuration and print what it binds."""

from __future__ import annotations

import argparse
import os
import sys

from twinkle import config
from twinkle.errors import TwinkleError
from twinkle.targets import Name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from twinkle.config import Settings
    from twinkle.config.entries import Records

    Row = tuple[str, str, str, str]

__all__ = ["main"]

_EPILOG = """\
examples:
  twinkle check                       what TWINKLE_CONFIG and the other variables say
  twinkle check twinkle.toml          a file, with the variables on top
  twinkle check --load twinkle.toml   and load each kernel and each target, as a program would

The exit code is 0 when all of it is right, 1 when something could not be loaded, 2 when the
configuration is wrong.
"""
_SETTINGS = (
    "mode",
    "device",
    "use_fallback",
    "strict",
    "verify",
    "kernels",
    "sizes",
    "trust_remote_code",
    "plugins",
    "disable",
    "log",
    "report",
)


def main(words: Sequence[str]) -> int:
    """Print what a configuration binds.

    Raises:
        ConfigError: It cannot be right.
    """
    parser = argparse.ArgumentParser(
        prog="twinkle check",
        description="Read a configuration and print what it binds.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", nargs="*", metavar="FILE", help="a twinkle.toml, or `auto`; the later one wins"
    )
    parser.add_argument("--load", action="store_true", help="load each kernel and import each target as well")
    options = parser.parse_args(words)

    settings = config.load(options.config, os.environ, cwd=os.getcwd())
    if settings.off:
        print("Twinkle is switched off by TWINKLE_DISABLE or TWINKLE_USE_KERNELS; nothing was read.")
        return 0
    bound = list(_records(settings))
    rows = [row for records in bound for row in _rows(records)]
    print(f"{', '.join(settings.paths) or 'no file'}: right")
    for name in _SETTINGS:
        print(f"  {name:<19}{_shown(getattr(settings, name))}")
    _table(rows)
    for entry, reason in settings.left_out():
        print(f"  left out: {entry.name}: {reason}")
    for warning in settings.warnings:
        print(f"  note: {warning}")
    if not options.load:
        return 0
    # Last, so that it hides nothing: a program here finds its own modules, a console script does not.
    sys.path.append(os.getcwd())
    return max([_load(records) for records in bound])


def _records(settings: Settings) -> Iterator[Records]:
    """The records of the configuration, then those of each of its plugins."""
    yield settings.records()
    if not settings.plugins:
        return
    from twinkle.sources import plugins

    for name in settings.plugins:
        plugin = plugins.load(name, where=settings.origins.get("plugins"))
        checked = config.validate(
            plugin.document, where=plugin.where, base_dir=plugin.base_dir, allow_objects=True
        )
        yield checked.records(trust_remote_code=settings.trust_remote_code)


def _rows(records: Records) -> Iterator[Row]:
    layers, targets, functions = records
    for layer in layers:
        named = [target.target.text for target in targets if target.kernel_name == layer.name]
        for target in named or [f"classes with kernel_layer_name = {layer.name!r}"]:
            when = f"{layer.device or 'any device'}, {layer.mode or 'any mode'}"
            yield target, layer.source.describe(), when, layer.origin
    for function in functions:
        when = f"{function.device or 'any device'}, {function.mode or 'any mode'}"
        yield function.target.text, function.source.describe(), when, function.origin


def _table(rows: list[Row]) -> None:
    if not rows:
        print("  binds nothing by name")
        return
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        print(f"  {cells[0]}  <-  {cells[1]}  {cells[2]}  {row[3]}")


def _shown(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _load(records: Records) -> int:
    layers, targets, functions = records
    failed = 0
    for name, source in [(kernel.name, kernel.source) for kernel in layers] + [
        (kernel.name, kernel.source) for kernel in functions
    ]:
        failed += not _try(f"kernel {name}", source.load)
    for target in targets:
        if isinstance(target.target, Name):
            failed += not _try(f"target {target.target}", _find, target.target)
    for function in functions:
        if isinstance(function.target, Name):
            failed += not _try(f"target {function.target}", _find, function.target)
    return 1 if failed else 0


def _find(target: Name) -> None:
    from importlib import import_module

    found: object = import_module(target.module)
    for part in target.name.split("."):
        found = getattr(found, part)


def _try(what: str, action: Callable[..., object], *arguments: object) -> bool:
    try:
        action(*arguments)
    except TwinkleError as error:
        print(f"  {what}: {error}", file=sys.stderr)
    except Exception as error:  # an import of somebody else's code may raise anything
        print(f"  {what}: {type(error).__name__}: {error}", file=sys.stderr)
    else:
        print(f"  {what}: loads")
        return True
    return False
