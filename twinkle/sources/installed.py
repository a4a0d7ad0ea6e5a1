"""Kernels of an installed package: ``liger_kernel.transformers:LigerRMSNorm`` and the like.

Light at import: this module is imported at interpreter start when a configuration names a package.
"""

from __future__ import annotations

from twinkle.sources.code import LoadedOnce, import_named

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["InstalledSource"]


class InstalledSource(LoadedOnce):
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
        super().__init__(kind=kind, attributes=attributes, where=where)
        self.package = package
        self.name = name

    def describe(self) -> str:
        """``package:name``."""
        return f"installed {self.package}:{self.name}"

    def _load(self) -> object:
        from twinkle.sources import adapters, lookup

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
        return adapters.finish(
            found,
            kind=self.of,
            described=described,
            where=self.where,
            attributes=self.attributes,
            adapt=True,
        )
