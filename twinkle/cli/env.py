"""``twinkle env``: versions, doors and variables, to read first when something does not work."""

from __future__ import annotations

import argparse
import os
import platform
import sys

from twinkle import runner
from twinkle._environment import VARIABLES, variables
from twinkle._version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["clash", "main"]

# Another distribution with an import package named twinkle: the one installed last has overwritten the other.
_RIVAL = "twinkle-kit"
_PACKAGES = ("torch", "triton", "transformers", "kernels", "wrapt", "huggingface_hub", "accelerate")


def main(words: Sequence[str]) -> int:
    """Print the environment; the exit code is 1 when something in it cannot work."""
    parser = argparse.ArgumentParser(
        prog="twinkle env",
        description="Print versions, doors and variables, for a bug report. Imports no torch.",
    )
    parser.parse_args(words)

    print(f"twinkle {__version__}  {os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}")
    print(f"python {platform.python_version()}  {sys.executable}  ({platform.platform()})")
    for name in _PACKAGES:
        print(f"{name} {_version(name) or '- not installed'}")
    print("\ndoors")
    for line in _doors():
        print(f"  {line}")
    print("\nvariables")
    named = {key: value for key, value in sorted(variables().items()) if key.startswith("TWINKLE_")}
    for key, value in named.items():
        print(f"  {key}={value}")
    if not named:
        print(f"  none is set; {' or '.join(VARIABLES)} opens the doors above")
    problem = clash()
    if problem:
        print(f"\nproblem: {problem}")
    return 1 if problem else 0


def _version(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _doors() -> Iterator[str]:
    folders = runner.pth_folders()
    yield from (f"installed          {folder}" for folder in folders)
    if not folders:
        yield "installed          no: install with pip, or use one of the others"
    found = None if sys.flags.no_site else sys.modules.get("sitecustomize")
    origin = getattr(found, "__file__", None)
    if found is not None and hasattr(found, "_twinkle_seen"):
        yield f"sitecustomize      {origin or 'yes'}"
    else:
        yield f"sitecustomize      no{f' ({origin} is in force)' if origin else ''}"
    closed = runner.closed_because(runner.door_paths())
    yield f"twinkle run        {f'no: {closed[0]}' if closed else 'yes'}"


def clash(paths: list[str] | None = None) -> str | None:
    """What is wrong when the other distribution named ``twinkle`` is installed, found by its folder's name.

    Args:
        paths: Where to look; ``sys.path`` by default.
    """
    prefix = _RIVAL.replace("-", "_") + "-"
    for folder in sys.path if paths is None else paths:
        try:
            names = os.listdir(folder or os.curdir)
        except OSError:
            continue
        for name in names:
            if name.startswith(prefix) and name.endswith(".dist-info"):
                return (
                    f"{_RIVAL} is installed in {folder}, and its import package is called `twinkle` too: the "
                    "two overwrite each other's files. Keep them in separate environments; here, "
                    f"`pip uninstall {_RIVAL} twinkle-kernel` and `pip install twinkle-kernel` mend it."
                )
    return None
