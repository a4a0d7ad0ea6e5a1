"""Resolve a kernel of the Hub with the kernels it depends on, and import them once for the process."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from twinkle.errors import SourceError
from twinkle.sources.hub.importer import import_variant
from twinkle.sources.hub.kernels_package import kernels_package
from twinkle.sources.hub.request import HubRequest
from twinkle.sources.hub.resolve import Resolved, resolve

if TYPE_CHECKING:
    from types import ModuleType

    from twinkle.sources.hub.lockfile import Lock
    from twinkle.sources.hub.trust import Trust

__all__ = ["forget", "load_kernel", "resolve_tree"]

_guard = threading.Lock()
_repo_locks: dict[str, threading.RLock] = {}
# By what was asked, and by what was allowed: a request that names no trust is not served by one that does.
_loaded: dict[tuple[object, ...], tuple[Resolved, ModuleType]] = {}


def forget() -> None:
    """Resolve every request anew."""
    _loaded.clear()


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
    with _guard:
        repo_lock = _repo_locks.setdefault(request.repo_id, threading.RLock())
    key = (request.repo_id, request.key, trust.everything, trust.repos, lock.path if lock else None)
    with repo_lock:
        if key not in _loaded:
            modules: dict[str, ModuleType] = {}
            for needed, resolved in resolve_tree(request, trust, lock):
                modules[needed.repo_id] = import_variant(
                    resolved.variant_dir,
                    dependencies=dict(modules),
                    what=f"{needed} ({resolved.variant_dir.name})",
                    where=needed.where,
                )
            _loaded[key] = resolved, modules[request.repo_id]
        return _loaded[key]


def _in_child() -> None:
    # Whoever held these in the parent is not here.
    global _guard
    _guard = threading.Lock()
    _repo_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
