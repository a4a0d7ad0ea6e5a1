"""Resolve a kernel of the Hub with the kernels it depends on, and import them once for the process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twinkle.errors import SourceError
from twinkle.runtime import runtime
from twinkle.sources.hub.importer import import_variant
from twinkle.sources.hub.kernels_package import kernels_package
from twinkle.sources.hub.request import HubRequest
from twinkle.sources.hub.resolve import Resolved, resolve
from twinkle.sources.locks import NamedLocks

if TYPE_CHECKING:
    from types import ModuleType

    from twinkle import forks
    from twinkle.sources.hub.lockfile import Lock
    from twinkle.sources.hub.trust import Trust

__all__ = ["load_kernel", "repository_lock", "resolve_tree"]


class _Loaded:
    """The kernels that were resolved and imported in this process.

    Attributes:
        by_request: By what was asked and what was allowed: a request that names no trust is not
            served by one that does.
    """

    def __init__(self) -> None:
        self.by_request: dict[tuple[object, ...], tuple[Resolved, ModuleType]] = {}


def repository_lock(repo_id: str) -> forks.Lock:
    """The lock that a thread holds while it loads a kernel of a repository."""
    return runtime.of(NamedLocks).of(f"repository {repo_id}")


def resolve_tree(
    request: HubRequest, trust: Trust, lock: Lock | None, *, above: tuple[str, ...] = ()
) -> list[tuple[HubRequest, Resolved]]:
    """The kernel and those it depends on, each resolved, trusted and checked; dependencies first.

    Raises:
        SourceError: One of them is not to be had, or they depend on each other in a circle.
    """
    if request.repo_id in above:
        raise SourceError(
            f"{request.repo_id} depends on itself",
            where=request.where,
            found=" -> ".join((*above, request.repo_id)),
            fix="tell its publisher",
        )
    kernels = kernels_package(request.where)
    resolved = resolve(request, trust, lock)
    kernels.check(resolved.variant_dir, request.where)
    tree: list[tuple[HubRequest, Resolved]] = []
    for repo_id, revision, version in kernels.dependencies(resolved.variant_dir):
        needed = HubRequest(repo_id, revision=revision, version=version, where=request.where)
        tree.extend(resolve_tree(needed, trust, lock, above=(*above, request.repo_id)))
    tree.append((request, resolved))
    return tree


def load_kernel(request: HubRequest, trust: Trust, lock: Lock | None) -> tuple[Resolved, ModuleType]:
    """The imported kernel and what it was resolved to.

    Raises:
        SourceError: It is not to be had, not trusted, not what was locked, or does not import.
    """
    loaded = runtime.of(_Loaded).by_request
    key = (request.repo_id, request.key, trust.everything, trust.repos, lock.path if lock else None)
    with repository_lock(request.repo_id):
        if key not in loaded:
            modules: dict[str, ModuleType] = {}
            for needed, resolved in resolve_tree(request, trust, lock):
                modules[needed.repo_id] = import_variant(
                    resolved.variant_dir,
                    dependencies=dict(modules),
                    what=f"{needed} ({resolved.variant_dir.name})",
                    where=needed.where,
                    locked=resolved.locked,
                )
            loaded[key] = resolved, modules[request.repo_id]
        return loaded[key]
