"""Make a lock from the Hub sources of a configuration, and fetch what one locks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from twinkle.errors import SourceError
from twinkle.sources.hub import trust as trusting
from twinkle.sources.hub.cache import HubFile, RepoCache, cache_root
from twinkle.sources.hub.client import HubClient
from twinkle.sources.hub.kernels_package import kernels_package
from twinkle.sources.hub.lockfile import LOCK_NAME, Lock, LockedKernel
from twinkle.sources.hub.request import HubRequest
from twinkle.sources.hub.resolve import commit_on_hub, download, fetch, locked_problems, no_variant, offline

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from twinkle.sources.hub.source import HubSource
    from twinkle.sources.hub.trust import Trust

__all__ = ["by_lock", "fetch_locked", "make_lock"]


def by_lock(sources: Iterable[HubSource], given: str | None) -> dict[str, list[HubSource]]:
    """The sources by the path of their lock: ``given``, or the one beside their configuration."""
    grouped: dict[str, list[HubSource]] = {}
    for source in sources:
        path = given or os.path.join(source.base_dir or os.curdir, LOCK_NAME)
        grouped.setdefault(path, []).append(source)
    return grouped


def make_lock(
    path: str,
    sources: Iterable[HubSource],
    *,
    before: Lock | None = None,
    variants: Iterable[str] = (),
    all_variants: bool = False,
) -> Lock:
    """Resolve every source anew, with the kernels they depend on.

    Args:
        path: Where the lock will be.
        sources: Each is trusted as its registration says: what may not be loaded is not locked.
        before: The lock so far; other machines' variants of the same commit are kept from it.
        variants: More variants to lock than this machine's.
        all_variants: Lock all of them.

    Raises:
        SourceError: A repository cannot be reached, is not trusted or has no such version or variant.
    """
    lock = Lock(path)
    pending = [(source.request, source.trust) for source in sources]
    while pending:
        request, trust = pending.pop()
        if (request.repo_id, request.key) in lock.kernels:
            continue
        known = before.kernels.get((request.repo_id, request.key)) if before is not None else None
        kernel, needs = _lock_one(request, trust, known, tuple(variants), all_variants)
        lock.kernels[kernel.key] = kernel
        pending.extend((need, trust) for need in needs)
    return lock


def _lock_one(
    request: HubRequest,
    trust: Trust,
    known: LockedKernel | None,
    more: tuple[str, ...],
    all_variants: bool,
) -> tuple[LockedKernel, list[HubRequest]]:
    if offline():
        raise SourceError(
            f"{request} cannot be locked offline",
            where=request.where,
            found="HF_HUB_OFFLINE is set",
            fix="lock where there is a network",
        )
    kernels = kernels_package(request.where)
    client = HubClient(request.where)
    caches = [RepoCache(cache_root(), request.repo_id, repo_type) for repo_type in kernels.repo_types]
    trusting.decide(request, trust, caches, client)
    cache, commit, name = commit_on_hub(request, caches, client)
    listing = cache.listing(commit) or client.variants(request.repo_id, cache.repo_type, commit)
    mine, reasons = kernels.choose(listing)
    if mine is None and not (more or all_variants):
        raise no_variant(
            request,
            f"{request.repo_id} at {commit[:12]}",
            reasons,
            fix="name the builds of other machines with --variant, or take --all-variants",
        )
    wanted = set(listing) if all_variants else {*((mine,) if mine else ()), *more}
    kept = known.variants if known is not None and known.commit == commit else {}
    locked: dict[str, Mapping[str, str]] = dict(kept)
    for variant in sorted(wanted - set(kept)):
        if variant not in listing:
            raise SourceError(
                f"{request} has no variant {variant}",
                where=request.where,
                found=", ".join(sorted(listing)) or "no variants",
                fix="name one of these",
            )
        locked[variant] = _digests(request, cache, commit, variant, listing, client)
    if name is not None:
        cache.remember_ref(name, commit)
    needs = []
    if mine is not None:
        fetch(request, cache, commit, mine, listing, client)
        variant_dir = cache.variants_dir(commit) / mine
        needs = [
            HubRequest(repo_id, revision=revision, version=version, where=request.where)
            for repo_id, revision, version in kernels.dependencies(variant_dir)
        ]
    return LockedKernel(request.repo_id, request.key, commit, locked, repo_type=cache.repo_type), needs


def _digests(
    request: HubRequest,
    cache: RepoCache,
    commit: str,
    variant: str,
    listing: Mapping[str, list[HubFile]],
    client: HubClient,
) -> dict[str, str]:
    """The SHA-256 of each file; of the large ones the Hub says it, the others are fetched and checked."""
    from twinkle.sources.hub.cache import sha256_of

    small = [file for file in listing[variant] if file.sha256 is None]
    variant_dir = cache.variants_dir(commit) / variant
    if any(file.problem(variant_dir) for file in small):
        download(request, cache, commit, variant, small, client, listing)
    return {file.path: file.sha256 or sha256_of(variant_dir / file.path) for file in listing[variant]}


def fetch_locked(locked: LockedKernel, where: str | None) -> int:
    """Bring every locked variant of a kernel into the cache, with the right digests.

    Returns:
        How many variants were fetched now.

    Raises:
        SourceError: They cannot be had, or are not what was locked.
    """
    request = HubRequest(locked.repo_id, revision=locked.commit, where=where)
    cache = RepoCache(cache_root(), locked.repo_id, locked.repo_type)
    fetched = 0
    for variant, digests in sorted(locked.variants.items()):
        files = [HubFile(path, sha256=digest) for path, digest in sorted(digests.items())]
        variant_dir = cache.variants_dir(locked.commit) / variant
        if locked_problems(variant_dir, files):
            download(request, cache, locked.commit, variant, files, HubClient(where))
            fetched += 1
        problems = locked_problems(variant_dir, files)
        if problems:
            raise SourceError(
                f"{request} ({variant}) differs from the lock",
                where=where,
                found="; ".join(problems[:3]),
                fix=f"delete {cache.folder} to fetch it again, or lock anew with `twinkle lock`",
            )
    return fetched
