"""Kernels from the Kernel Hub."""

from __future__ import annotations

from twinkle.errors import SourceError
from twinkle.sources.hub.request import HubRequest
from twinkle.sources.hub.trust import Trust

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

    from twinkle.sources.hub.lockfile import Lock
    from twinkle.sources.hub.resolve import Resolved

__all__ = ["HubSource"]


class HubSource:
    """A layer or a function of a repository of the Hub.

    Nothing is asked, downloaded or imported before :meth:`load`.

    Args:
        repo_id: ``publisher/name``.
        attr: The class in the kernel's ``layers``, or the function of its package.
        kind: ``"layer"`` or ``"function"``.
        revision: A branch, a tag or a commit.
        version: ``1``, ``"1"``, ``"0.1.0"`` or a range; neither version nor revision is the newest.
        trust_remote_code: ``True``, or the repositories to load whoever publishes them.
        where: Where the registration stands, for messages.
        base_dir: The directory of the configuration; a ``twinkle.lock`` in it is in force.

    Raises:
        ConfigError: Something of it is malformed.
    """

    kind = "hub"

    def __init__(
        self,
        repo_id: str,
        attr: str,
        *,
        kind: str,
        revision: str | None = None,
        version: int | str | None = None,
        trust_remote_code: object = False,
        where: str | None = None,
        base_dir: str | None = None,
    ) -> None:
        self.request = HubRequest(repo_id, revision=revision, version=version, where=where)
        self.attr = attr
        self.of = kind
        self.trust = Trust.parse(trust_remote_code, where=where)
        # Entries of a variable have the working directory as base: no lock is looked for there.
        self.base_dir = None if where is not None and where.startswith("TWINKLE_") else base_dir
        self.resolved: Resolved | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of loading: the version that was chosen, why it is trusted."""
        return tuple(self.resolved.notes) if self.resolved is not None else ()

    def describe(self) -> str:
        """The repository, what it was resolved to and the name in it.

        ``Hub publisher/name version 1 (v1 at 1a2b3c4d5e6f, torch-cpu): RMSNorm``
        """
        text = f"Hub {self.request}"
        resolved = self.resolved
        if resolved is not None:
            at = resolved.commit[:12] if resolved.commit else str(resolved.variant_dir)
            by = f"{resolved.version} at {at}" if resolved.version else at
            text += f" ({by}, {resolved.variant_dir.name})"
        return f"{text}: {self.attr}"

    def load(self) -> object:
        """The class or the function, fetched and imported at the first call.

        Raises:
            SourceError: It is not to be had, not trusted, not what was locked, or does not import.
        """
        loaded = self.__dict__.get("_loaded")
        if loaded is None:
            # Without a lock, which a fork in another thread would leave locked: the first one counts.
            loaded = self.__dict__.setdefault("_loaded", self._attribute(self._module()))
        return loaded

    def _module(self) -> ModuleType:
        from twinkle.sources.hub.load import load_kernel
        from twinkle.sources.hub.lockfile import in_force

        lock: Lock | None = in_force(self.base_dir)
        self.resolved, module = load_kernel(self.request, self.trust, lock)
        return module

    def _attribute(self, module: ModuleType) -> object:
        from twinkle.sources import adapters, lookup

        where = self.request.where
        homes = lookup.HOMES[self.of]
        try:
            found = lookup.find(module, self.attr, homes=homes)
        except Exception as error:
            raise SourceError(
                f"{self.request} raises when it is imported",
                where=where,
                found=lookup.failure(error),
                fix="take another version of the kernel, or tell its publisher",
            ) from error
        if found is lookup.MISSING:
            raise lookup.not_found(
                module, self.attr, kind=self.of, homes=homes, described=str(self.request), where=where
            )
        return adapters.finish(found, kind=self.of, described=str(self.request), where=where)
