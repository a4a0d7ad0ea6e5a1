"""Kernels of a local repository: a directory with a plain package, or one built for ``kernels``.

Light at import: this module is imported at interpreter start when a configuration names a path.
"""

from __future__ import annotations

from twinkle.errors import MissingDependencyError, SourceError, TwinkleError
from twinkle.sources.code import LoadedOnce

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from twinkle.sources.local_variants import Layout

__all__ = ["LocalSource"]


class LocalSource(LoadedOnce):
    """A layer or a function of a package in a directory; nothing is read before the first use.

    Args:
        repo_path: An absolute path: the directory that holds the package, the package itself, or
            a repository with ``build/<variant>`` directories.
        package: The package's name.
        name: The layer or function; dotted for one in a submodule.
        kind: ``"layer"`` or ``"function"``.
        device: The device the kernel is for, when the registration says one: chooses the variant.
        attributes: For a layer what its class expects on ``self`` and its target lacks.
        where: Where it was registered.

    Attributes:
        trace: For a repository with variants ``(variant, accepted, reason)`` of each, best first.
    """

    kind = "local"

    def __init__(
        self,
        repo_path: str,
        package: str,
        name: str,
        *,
        kind: str,
        device: object = None,
        attributes: Mapping[str, object] | None = None,
        where: str | None = None,
    ) -> None:
        super().__init__(kind=kind, attributes=attributes, where=where)
        self.repo_path = repo_path
        self.package = package
        self.name = name
        self._device = device
        self._module_name = ""
        # By the generation of the package that it was taken from: at most the present one is kept.
        self._by_generation: dict[int, object] = {}

    def describe(self) -> str:
        """``package:name`` and the directory."""
        return f"local {self.package}:{self.name} ({self.repo_path})"

    def load(self) -> object:
        """The layer class or the callable, imported at the first call.

        Raises:
            SourceError: The path, the package, the name or a dependency is missing, others can
                write it, no variant fits this machine, or the kernel raises on import.
        """
        if self._by_generation:
            from twinkle.sources import packages

            loaded = self._by_generation.get(packages.generation(self._module_name))
            if loaded is not None:
                return loaded
        return self._load()

    def reload(self) -> object:
        """Import the package anew, with what its files say now.

        Every source of that package gives the new objects from then on; modules that hold the old
        ones keep them until they are kernelized again. When the new code raises, the old stays.

        Raises:
            SourceError: As for :meth:`load`.
        """
        import linecache

        from twinkle.sources import packages

        if not self._module_name:
            return self.load()
        before = self._by_generation.copy()
        taken = packages.unload(self._module_name)
        linecache.checkcache()
        try:
            return self._load()
        except BaseException:
            packages.restore(taken)
            for loaded in before.values():
                self._by_generation.setdefault(packages.generation(self._module_name), loaded)
            raise

    def _load(self) -> object:
        from twinkle.sources import adapters, local_variants

        layout = local_variants.locate(
            self.repo_path,
            self.package,
            device=self._device,
            described=self.describe(),
            where=self.where,
            trace=self.trace,
        )
        self._module_name = layout.module_name
        found, generation = self._import(layout)
        loaded = adapters.finish(
            found,
            kind=self.of,
            described=self.describe(),
            where=self.where,
            attributes=self.attributes,
        )
        # Of several threads that loaded at once all get what the first one has made.
        loaded = self._by_generation.setdefault(generation, loaded)
        for older in [number for number in self._by_generation.copy() if number < generation]:
            self._by_generation.pop(older, None)
        return loaded

    def _import(self, layout: Layout) -> tuple[object, int]:
        import importlib

        from twinkle.sources import lookup, packages

        generation = packages.generation(layout.module_name)
        homes = lookup.HOMES[self.of]
        try:
            with packages.importing(layout.module_name):
                package = importlib.import_module(layout.module_name)
                found = lookup.find(package, self.name, homes=homes)
        except TwinkleError as error:
            if error.where is None:
                error.where = self.where
            raise
        except (Exception, SystemExit) as error:
            raise self._explained(error, layout) from error
        if found is not lookup.MISSING:
            return found, generation
        if getattr(package.__spec__, "_initializing", False):
            raise SourceError(
                f"{self.describe()} is needed while it is being imported itself",
                where=self.where,
                found=f"{layout.directory} imports what its own kernel replaces",
                fix="import the target inside the functions that use it",
            )
        raise lookup.not_found(
            package,
            self.name,
            kind=self.of,
            homes=homes,
            described=f"local package {self.package} ({layout.directory})",
            where=self.where,
        )

    def _explained(self, error: BaseException, layout: Layout) -> SourceError:
        from twinkle.sources import lookup

        what = f"{self.describe()} raised on import"
        found = lookup.failure(error, within=layout.directory)
        if isinstance(error, ModuleNotFoundError) and error.name:
            absent = error.name.partition(".")[0]
            if absent in layout.beside:
                fix = f"{absent} lies beside the package: from .. import {absent}"
            elif absent == "twinkle":
                fix = None
            else:
                fix = f"pip install {absent.replace('_', '-')}, or put {absent} on PYTHONPATH"
            return MissingDependencyError(what, where=self.where, found=found, fix=fix)
        return SourceError(what, where=self.where, found=found, fix="correct the kernel, then reload it")
