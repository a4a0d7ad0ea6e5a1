"""Finding a named implementation in a package, and the errors for what is not there.

Imported at first load, never at interpreter start.
"""

from __future__ import annotations

import importlib
import traceback
from types import ModuleType
from typing import Any

from twinkle.errors import MissingDependencyError, SourceError, suggest

__all__ = ["HOMES", "MISSING", "failure", "find", "names_in", "not_found", "raised", "submodule"]

MISSING: Any = object()

# Where an implementation may stand in a package, in the order in which it is looked for there.
HOMES = {"layer": ("layers", ""), "function": ("", "functions", "layers")}


def submodule(package: ModuleType, name: str) -> ModuleType | None:
    """The submodule ``name``, imported, or ``None`` when the package has none of that name.

    Raises:
        Exception: Whatever the submodule raises while it is imported.
    """
    if not hasattr(package, "__path__"):
        return None
    full = f"{package.__name__}.{name}"
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        # Only its own absence counts: an absent dependency of an existing submodule is a failure.
        if error.name == full:
            return None
        raise


def find(package: ModuleType, dotted: str, *, homes: tuple[str, ...]) -> Any:
    """The object ``dotted`` in the first of the package's ``homes`` that has it, or :data:`MISSING`.

    A dotted name may go through submodules and classes.

    Args:
        package: An imported package or module.
        dotted: The name.
        homes: Submodules to look in; ``""`` is the package itself.
    """
    for home in homes:
        start = submodule(package, home) if home else package
        if start is None:
            continue
        found = _walk(start, dotted.split("."))
        if found is not MISSING:
            return found
    return MISSING


def _walk(start: ModuleType, parts: list[str]) -> Any:
    here: Any = start
    for index, part in enumerate(parts):
        try:
            here = getattr(here, part)
        except AttributeError:
            inner = submodule(here, part) if isinstance(here, ModuleType) else None
            if inner is None:
                return MISSING
            here = inner
        if isinstance(here, ModuleType) and index == len(parts) - 1:
            # A module is never the implementation; `rms_norm` in `kernels/rms_norm.py` is.
            here = here.__dict__.get(part, MISSING)
    return here


def names_in(module: ModuleType, *, kind: str) -> list[str]:
    """The public names of a module that could be an implementation of this kind."""
    import torch

    def fits(value: object) -> bool:
        if isinstance(value, type):
            return issubclass(value, torch.nn.Module) and value.__module__ != "torch.nn"
        return kind == "function" and callable(value) and not isinstance(value, ModuleType)

    return sorted(name for name, value in vars(module).items() if not name.startswith("_") and fits(value))


def not_found(
    package: ModuleType,
    name: str,
    *,
    kind: str,
    homes: tuple[str, ...],
    described: str,
    where: str | None,
) -> SourceError:
    """The error for a name that a package does not have: with what it has, and what was meant."""
    modules = [submodule(package, home) if home else package for home in homes]
    there = sorted({name for module in modules if module for name in names_in(module, kind=kind)})
    missing = " and no layers module" if homes[0] == "layers" and modules[0] is None else ""
    return SourceError(
        f"{described} has no {kind} {name!r}{missing}",
        where=where,
        found=", ".join(there) or f"no {kind} at all",
        expected=name,
        fix=suggest(name.rpartition(".")[2], there),
    )


def raised(error: BaseException, *, described: str, where: str | None) -> SourceError:
    """The error for code that raised while it was imported."""
    if isinstance(error, SourceError):
        return error
    if isinstance(error, ModuleNotFoundError) and error.name:
        distribution = error.name.partition(".")[0].replace("_", "-")
        return MissingDependencyError(
            f"{described} needs {error.name!r}, which is not installed",
            where=where,
            found=failure(error),
            fix=f"pip install {distribution}",
        )
    return SourceError(f"{described} raised on import", where=where, found=failure(error))


def failure(error: BaseException, *, within: str | None = None) -> str:
    """An exception in one line with the place in the kernel's own files it came from.

    Args:
        error: What was raised.
        within: The directory of the kernel; its innermost frame is named, and none of Python's
            or Twinkle's own.
    """
    text = f"{type(error).__name__}: {error}".split("\n", 1)[0].rstrip(": ")
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if (f.filename.startswith(within) if within else _is_foreign(f.filename))]
    if not own:
        return text
    return f"{text} at {own[-1].filename}:{own[-1].lineno}"


def _is_foreign(filename: str) -> bool:
    ours = __file__.rpartition("lookup")[0]
    return not filename.startswith(("<", ours)) and "importlib" not in filename
