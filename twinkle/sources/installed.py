"""Kernels of an installed package: ``liger_kernel.transformers:LigerRMSNorm`` and the like.

Light at import: this module is imported at interpreter start when a configuration names a package.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["InstalledSource"]


class InstalledSource:
    """A layer or a function of a package that ``import`` finds; imported at first use.

    Args:
        package: The module, for example ``liger_kernel.transformers``.
        name: The layer or function in it.
        kind: ``"layer"`` or ``"function"``.
        attributes: For a layer what its class expects on ``self`` and its target lacks.
        where: Where it was registered.
    """

    kind = "installed"

    def __init__(
        self,
        package: str,
        name: str,
        *,
        kind: str,
        attributes: Mapping[str, object] | None = None,
        where: str | None = None,
    ) -> None:
        self.of = kind
        self.where = where
        self.package = package
        self.name = name
        self.attributes = dict(attributes or {})
        self.trace: list[tuple[str, bool, str]] = []
        self._loaded: Any = None

    def describe(self) -> str:
        """``package:name``."""
        return f"installed {self.package}:{self.name}"

    def load(self) -> object:
        """The layer class or the callable, imported at the first call.

        Raises:
            SourceError: The package or the name is not there, or raises on import.
            KernelError: Its class cannot do without its ``__init__``.
        """
        if self._loaded is None:
            from twinkle.sources import adapters, lookup
            from twinkle.sources.code import import_named, keep_first

            described = self.describe()
            module = import_named(self.package, described=described, where=self.where)
            homes = ("", *(home for home in lookup.HOMES[self.of] if home))
            try:
                found = lookup.find(module, self.name, homes=homes)
            except (Exception, SystemExit) as error:
                raise lookup.raised(error, described=described, where=self.where) from error
            if found is lookup.MISSING:
                raise lookup.not_found(
                    module,
                    self.name,
                    kind=self.of,
                    homes=homes,
                    described=f"installed package {self.package}",
                    where=self.where,
                )
            finished = adapters.finish(
                found,
                kind=self.of,
                described=described,
                where=self.where,
                attributes=self.attributes,
                adapt=True,
            )
            return keep_first(self, finished)
        return self._loaded
