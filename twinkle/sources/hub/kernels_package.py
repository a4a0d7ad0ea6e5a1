"""The installed ``kernels`` package, whichever supported version: which variant fits, and what it needs.

Twinkle asks ``kernels`` what fits this machine and what a kernel depends on, and resolves, verifies
and imports itself: that is what works offline right after a download, keeps two repositories with one
metadata id apart, and checks trust and digests before any code of a kernel runs.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from typing import TYPE_CHECKING, Any

from twinkle.errors import MissingDependencyError, SourceError
from twinkle.files import DOCUMENT, read_bounded
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import ModuleType

__all__ = ["SUPPORTED", "KernelsPackage", "kernels_package", "read_metadata"]

SUPPORTED = "0.12 to 0.17"
_INSTALL = "pip install 'twinkle-kernel[hub]'"


class KernelsPackage:
    """What Twinkle uses of ``kernels``.

    Args:
        module: The imported package.

    Raises:
        MissingDependencyError: Its version does not have what Twinkle needs.
    """

    def __init__(self, module: ModuleType) -> None:
        self.version = str(getattr(module, "__version__", None) or _version())
        self._variants: Any = None
        self._utils: Any = None
        for attribute, name, needed in (
            ("_variants", "kernels.variants", ("parse_variant", "resolve_variants")),
            ("_utils", "kernels.utils", ("build_variants",)),
        ):
            try:
                found = importlib.import_module(name)
            except ImportError:
                continue
            if all(hasattr(found, part) for part in needed):
                setattr(self, attribute, found)
        if self._variants is None and self._utils is None:
            raise MissingDependencyError(
                "the installed version of `kernels` does not fit",
                found=f"kernels {self.version}",
                expected=f"kernels {SUPPORTED}",
                fix=_INSTALL,
            )
        # Before 0.14 kernels were repositories of the type "model".
        release = tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])
        self.repo_types: tuple[str, ...] = ("model", "kernel") if release < (0, 14) else ("kernel",)
        if not hasattr(importlib.import_module("huggingface_hub.constants"), "REPO_TYPE_KERNEL"):
            self.repo_types = ("model",)

    def choose(self, names: Iterable[str]) -> tuple[str | None, dict[str, str]]:
        """The build variant for this machine, and why each of the others is not it.

        Args:
            names: The variants there are: ``torch-cpu``, ``torch213-cxx11-cu130-x86_64-linux``.
        """
        names = sorted(set(names))
        if self._variants is None:
            fitting = list(self._utils.build_variants())
            why = f"this machine takes {', '.join(fitting)}"
            accepted = [name for name in fitting if name in names]
            return (accepted[0] if accepted else None), {n: why for n in names if n not in accepted}
        parsed, reasons = [], {}
        for name in names:
            try:
                parsed.append(self._variants.parse_variant(name))
            except ValueError:
                reasons[name] = "not the name of a build variant"
        resolved = self._variants.resolve_variants(parsed)
        trace: Any = ()
        if isinstance(resolved, tuple):  # since 0.15 with the reasons
            resolved, trace = resolved
        accepted = [variant.variant_str for variant in resolved]
        for decision in trace:
            if hasattr(decision, "reason"):
                reasons[decision.variant.variant_str] = str(decision.reason)
        for name in names:
            if name not in accepted:
                reasons.setdefault(name, "does not fit this torch or this machine")
        return (accepted[0] if accepted else None), reasons

    def check(self, variant_dir: Path, where: str | None) -> None:
        """Whether the variant's metadata is sound and what it depends on is installed.

        Raises:
            MissingDependencyError: A Python package it needs is not installed.
            SourceError: The metadata is missing or malformed, or the kernel asks for more than there is.
        """
        what = f"the variant {variant_dir.name} cannot be used"
        try:
            try:
                validate = importlib.import_module("kernels.validate")
                metadata = importlib.import_module("kernels").Metadata.read_from_file(
                    variant_dir / "metadata.json"
                )
            except ImportError:
                self._check_before_validators(variant_dir)
                return
            validators = [*validate.default_metadata_validators(), validate.ArchValidator()]
            for validator in validators:
                validator.validate_metadata(metadata=metadata, variant=variant_dir.name)
        except ImportError as error:
            match = re.search(r"pip install (\S+)", str(error))
            raise MissingDependencyError(
                what,
                where=where,
                found=str(error),
                fix=f"pip install {match[1]}" if match else "install what is named above",
            ) from error
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            raise SourceError(
                what,
                where=where,
                found=f"{type(error).__name__}: {error}",
                expected=f"a build that kernels {self.version} accepts",
                fix="take another version of the kernel, or tell its publisher",
            ) from error

    def _check_before_validators(self, variant_dir: Path) -> None:
        metadata = read_metadata(variant_dir)
        name = str(metadata.get("name", variant_dir.name))
        depends = list(metadata.get("python-depends", []))
        if not depends:
            return
        if self._variants is None:
            backend = self._utils.backend()
        else:
            backend = importlib.import_module("kernels.backends")._backend()
        importlib.import_module("kernels.deps").validate_dependencies(name, depends, backend)

    def dependencies(self, variant_dir: Path) -> list[tuple[str, str | None, int | None]]:
        """The kernels that this one loads: repository, revision or version."""
        found = []
        try:
            metadata = importlib.import_module("kernels").Metadata.read_from_file(
                variant_dir / "metadata.json"
            )
        except (AttributeError, OSError, ValueError):
            return []
        for dependency in getattr(metadata, "kernel_depends", ()):
            version = dependency.version
            found.append(
                (
                    str(dependency.repo_id),
                    getattr(version, "revision", None),
                    getattr(version, "version", None),
                )
            )
        return found


def read_metadata(variant_dir: Path) -> dict[str, Any]:
    """``metadata.json`` of a variant; empty when it has none, as the oldest kernels do."""
    path = variant_dir / "metadata.json"
    if not path.exists():
        return {}
    document = json.loads(read_bounded(path, DOCUMENT))
    if not isinstance(document, dict):
        raise ValueError("metadata.json is no table")
    return document


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return "of an unknown version"


class _Installed:
    """The ``kernels`` package as it was found; it is looked for again until it is there."""

    def __init__(self) -> None:
        self.package: KernelsPackage | None = None


def _load() -> KernelsPackage:
    try:
        module = importlib.import_module("kernels")
    except ModuleNotFoundError as error:
        missing = error.name or "kernels"
        raise MissingDependencyError(
            "kernels from the Hub need the package `kernels`",
            found=f"no module named {missing}",
            expected=f"kernels {SUPPORTED}",
            fix=_INSTALL,
        ) from error
    except Exception as error:
        fix = _INSTALL
        if os.environ.get("DISABLE_KERNEL_MAPPING", "0") not in ("0", "1"):
            fix = "set DISABLE_KERNEL_MAPPING to 0 or 1: `kernels` reads it as a number"
        raise MissingDependencyError(
            "the package `kernels` cannot be imported",
            found=f"{type(error).__name__}: {error}",
            expected=f"kernels {SUPPORTED}",
            fix=fix,
        ) from error
    return KernelsPackage(module)


def kernels_package(where: str | None = None) -> KernelsPackage:
    """The installed ``kernels`` package.

    Raises:
        MissingDependencyError: Not installed, cannot be imported, or its version does not fit.
    """
    installed = runtime.of(_Installed)
    try:
        if installed.package is None:
            installed.package = _load()
        return installed.package
    except MissingDependencyError as error:
        error.where = where
        raise
