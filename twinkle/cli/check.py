"""``twinkle check``: read a configuration and print what it binds."""

from __future__ import annotations

import argparse
import os
import sys

from twinkle import config
from twinkle.errors import TwinkleError, say
from twinkle.targets import Name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType
    from typing import Any

    from twinkle.config import Settings
    from twinkle.config.entries import Records
    from twinkle.records import FunctionKernel, Kernel, LayerKernel

    Row = tuple[str, str, str, str]

__all__ = ["main"]

_EPILOG = """\
examples:
  twinkle check                       what TWINKLE_CONFIG and the other variables say
  twinkle check twinkle.toml          a file, with the variables on top
  twinkle check --load twinkle.toml   and load each kernel and each target, and see whether they fit

The exit code is 0 when all that was looked at is right, 1 when a binding cannot work (--load), 2 when the
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
    "capture",
    "capture_memory",
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

    settings = config.load(options.config, cwd=os.getcwd())
    if settings.off:
        print("Twinkle is switched off by TWINKLE_DISABLE or TWINKLE_USE_KERNELS; nothing was read.")
        return 0
    bound = list(_records(settings))
    rows = [row for records in bound for row in _rows(records)]
    name_of_all = ", ".join(settings.paths) or "no file"
    print(name_of_all)
    for name in _SETTINGS:
        print(f"  {name:<19}{_shown(getattr(settings, name))}")
    _table(rows)
    for entry, reason in settings.left_out():
        print(f"  left out: {entry.name}: {reason}")
    for warning in settings.warnings:
        print(f"  note: {warning}")
    if not options.load:
        print(f"{name_of_all}: well written; whether it works, `twinkle check --load` tries")
        return 0
    # Last, so that it hides nothing: a program here finds its own modules, a console script does not.
    sys.path.append(os.getcwd())
    failed = sum(_load(records) for records in bound)
    if failed:
        say(f"{name_of_all}: {failed} of it cannot work")
        return 1
    print(f"{name_of_all}: right")
    return 0


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
    if isinstance(value, int):
        return f"{value} bytes"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _load(records: Records) -> int:
    """Load every kernel and every target that is named, and see whether they fit; how many do not."""
    layers, targets, functions = records
    failed = 0
    for kernel in (*layers, *functions):
        failed += not _try(f"kernel {kernel.name}", kernel.source.load)
    for entry in targets:
        if isinstance(entry.target, Name):
            kernels = [kernel for kernel in layers if kernel.name == entry.kernel_name]
            failed += not _try(f"target {entry.target}", _fit_layers, entry.target, kernels)
    for function in functions:
        if isinstance(function.target, Name):
            failed += not _try(f"target {function.target}", _fit_function, function.target, function)
    return failed


def _fit_layers(target: Name, kernels: Sequence[LayerKernel]) -> None:
    from torch import nn

    from twinkle.errors import KernelError
    from twinkle.fit.layer import check_layer

    found: object = _module(target)
    for part in target.name.split("."):
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise KernelError(f"{target} is no layer", found=repr(found), expected="an nn.Module class")
    if getattr(found, "forward", None) is nn.Module.forward:
        raise KernelError(f"{target} has no forward that a kernel could stand in for")
    for kernel in kernels:
        loaded = _loaded(kernel)
        if loaded is not None:
            guarded = getattr(kernel.source, "guarded", False)
            check_layer(loaded, found, attributes=kernel.attributes, guarded=guarded)


def _fit_function(target: Name, kernel: FunctionKernel) -> None:
    from twinkle.fit.layer import check_function
    from twinkle.swap.functions import function_at

    original = function_at(_module(target), target.name)
    loaded: Any = _loaded(kernel)
    if loaded is not None:
        check_function(loaded, original, called=target.text)


def _module(target: Name) -> ModuleType:
    from importlib import import_module

    from twinkle.errors import KernelError
    from twinkle.report.idle import mistake

    problem = mistake(target)  # a module that is not there, with what it may be called
    if problem is None:
        import_module(target.module)
        problem = mistake(target)
    if problem is not None:
        raise KernelError(problem)
    return sys.modules[target.module]


def _loaded(kernel: Kernel) -> object | None:
    """The kernel; None where it does not load, which is said of the kernel itself."""
    try:
        return kernel.source.load()
    except (Exception, SystemExit):
        return None


def _try(what: str, action: Callable[..., object], *arguments: object) -> bool:
    try:
        action(*arguments)
    except TwinkleError as error:
        say(f"  {what}: {error}")
    except (Exception, SystemExit) as error:  # an import of somebody else's code may raise anything
        say(f"  {what}: {type(error).__name__}: {error}")
    else:
        print(f"  {what}: loads")
        return True
    return False
