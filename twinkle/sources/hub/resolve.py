"""Resolving a request to a directory on disk with the verified variant for this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from twinkle._environment import variables
from twinkle.errors import SourceError
from twinkle.files import cache_directory
from twinkle.sources.hub import trust as trusting
from twinkle.sources.hub.cache import HubFile, RepoCache, cache_root, files_of
from twinkle.sources.hub.client import HubClient
from twinkle.sources.hub.faults import Unreachable, explain
from twinkle.sources.hub.importer import Locked
from twinkle.sources.hub.kernels_package import kernels_package
from twinkle.sources.hub.signature import signature_note
from twinkle.sources.hub.verified import private_copy
from twinkle.sources.permissions import refuse_writable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from twinkle.sources.hub.lockfile import Lock, LockedKernel
    from twinkle.sources.hub.request import HubRequest, Ref
    from twinkle.sources.hub.trust import Trust

__all__ = [
    "Resolved",
    "commit_on_hub",
    "download",
    "fetch",
    "locked_problems",
    "no_variant",
    "offline",
    "resolve",
]


class Resolved:
    """A variant that is on disk, whole, and may be imported.

    Attributes:
        variant_dir: Its directory.
        commit: The commit, or ``None`` for a directory named by ``LOCAL_KERNELS``.
        repo_type: ``kernel`` or ``model``.
        version: The branch or tag it was found by.
        locked: Where ``variant_dir`` is the private copy of a locked variant, what it is a copy of.
        notes: What the user should know: what was chosen for them, what could not be checked.
    """

    __slots__ = ("commit", "locked", "notes", "repo_type", "variant_dir", "version")

    def __init__(self, variant_dir: Path, commit: str | None, repo_type: str, version: str | None) -> None:
        self.variant_dir = variant_dir
        self.commit = commit
        self.repo_type = repo_type
        self.version = version
        self.locked: Locked | None = None
        self.notes: list[str] = []


def resolve(request: HubRequest, trust: Trust, lock: Lock | None) -> Resolved:
    """Find, and fetch when it is not here, what a request asks for.

    The order is: the lock or ``LOCAL_KERNELS``, then trust, then the commit, then the variant, then
    its files. Nothing is imported here.

    Raises:
        SourceError: It is not to be had, not trusted, or not what was locked.
    """
    kernels = kernels_package(request.where)
    if lock is not None:
        return _locked(request, lock.find(request), lock.path)
    override = local_override(request)
    if override is not None:
        return override
    root = cache_root()
    caches = [RepoCache(root, request.repo_id, repo_type) for repo_type in kernels.repo_types]
    older = [RepoCache(root, request.repo_id, t) for t in ("kernel", "model") if t not in kernels.repo_types]
    client = None if offline() else HubClient(request.where)
    why = trusting.decide(request, trust, [*caches, *older], client)
    unreachable: Unreachable | None = None
    if client is not None:
        try:
            resolved = _from_hub(request, caches, client)
        except Unreachable as error:
            unreachable = error
        else:
            resolved.notes.append(why)
            return resolved
    resolved = _from_cache(request, [*caches, *older], unreachable)
    resolved.notes.append(why)
    return resolved


def offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` is set."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def local_override(request: HubRequest) -> Resolved | None:
    """The directory that ``LOCAL_KERNELS`` names for the repository, whatever the version.

    Raises:
        SourceError: The variable is malformed, or the directory holds no variant for this machine.
    """
    path = None
    for entry in os.environ.get("LOCAL_KERNELS", "").split(":"):
        repo_id, equals, value = entry.partition("=")
        if entry and not (equals and repo_id and value):
            raise SourceError(
                "LOCAL_KERNELS is malformed",
                where="environment (LOCAL_KERNELS)",
                found=repr(entry),
                expected="publisher/name=/path, several joined with a colon",
            )
        if repo_id == request.repo_id:
            path = Path(os.path.expanduser(value))
    if path is None:
        return None
    if path.is_dir():
        refuse_writable(str(path), where=request.where or "environment (LOCAL_KERNELS)")
    kernels = kernels_package(request.where)
    reasons: dict[str, str] = {}
    for base in (path, path / "build"):
        names = [entry.name for entry in base.iterdir() if entry.is_dir()] if base.is_dir() else []
        variant, rejected = kernels.choose(names)
        if variant is not None:
            resolved = Resolved(base / variant, None, "local", None)
            break
        reasons.update({n: r for n, r in rejected.items() if n.startswith(("torch", "tvm"))})
    else:
        if not (path / "metadata.json").is_file():
            raise no_variant(request, str(path), reasons)
        resolved = Resolved(path, None, "local", None)
    resolved.notes.append(f"taken from {path}, which LOCAL_KERNELS names, whatever the version")
    return resolved


def _from_hub(request: HubRequest, caches: list[RepoCache], client: HubClient) -> Resolved:
    cache, commit, version = commit_on_hub(request, caches, client)
    kernels = kernels_package(request.where)
    listing = cache.listing(commit)
    if listing is None:
        listing = client.variants(request.repo_id, cache.repo_type, commit)
    variant, reasons = kernels.choose(listing)
    if variant is None:
        raise no_variant(request, f"{request.repo_id} at {commit[:12]}", reasons)
    note = fetch(request, cache, commit, variant, listing, client)
    if version is not None:
        cache.remember_ref(version, commit)
    resolved = Resolved(cache.variants_dir(commit) / variant, commit, cache.repo_type, version)
    if note is not None:
        resolved.notes.append(note)
    if request.newest:
        resolved.notes.append(_newest_note(request, version, commit))
    return resolved


def _newest_note(request: HubRequest, version: str | None, commit: str) -> str:
    return (
        f"no version was given: the newest was taken, {version or 'main'} at {commit[:12]}; "
        "pin it with version, revision or `twinkle lock`"
    )


def commit_on_hub(
    request: HubRequest, caches: list[RepoCache], client: HubClient
) -> tuple[RepoCache, str, str | None]:
    """The repository's place in the cache, the commit that is meant, and its branch or tag.

    Raises:
        SourceError: The Hub cannot be reached, or has no such repository, version or revision.
    """
    failure: SourceError | None = None
    for cache in caches:
        try:
            if request.pinned_commit is not None:
                if len(caches) > 1 and not cache.variants(request.pinned_commit):
                    client.commit_of(request.repo_id, cache.repo_type, request.pinned_commit)
                return cache, request.pinned_commit, None
            if request.revision is not None:
                commit = client.commit_of(request.repo_id, cache.repo_type, request.revision)
                return cache, commit, request.revision
            ref = request.choose(client.refs(request.repo_id, cache.repo_type), listed_from="the Hub")
            return cache, ref.commit, ref.name
        except SourceError as error:
            # A repository of another type is told from one that is not there by asking for both.
            if not (error.found or "").startswith(("HTTP 401", "HTTP 404")):
                raise
            if failure is None or (error.found or "").startswith("HTTP 404"):
                failure = error
    assert failure is not None
    raise failure


def _from_cache(
    request: HubRequest, caches: Iterable[RepoCache], unreachable: Unreachable | None
) -> Resolved:
    """The newest fitting commit of the cache, with its variant for this machine, whole."""
    kernels = kernels_package(request.where)
    refusal: SourceError | None = None
    for cache in caches:
        refs = cache.refs()
        if request.pinned_commit is not None:
            commit, version = request.pinned_commit, None
        else:
            refs = [ref for ref in refs if cache.variants(ref.commit)]
            if not refs:
                continue
            try:
                ref = _cached_ref(request, refs)
            except SourceError as error:
                refusal = refusal or error
                continue
            commit, version = ref.commit, ref.name
        names = cache.variants(commit)
        if not names:
            continue
        variant, reasons = kernels.choose(names)
        if variant is None:
            refusal = no_variant(request, f"the cache at {commit[:12]}", reasons)
            continue
        variant_dir = cache.variants_dir(commit) / variant
        problems = problems_of(variant_dir, (cache.listing(commit) or {}).get(variant))
        if problems:
            refusal = SourceError(
                f"{request} is damaged in the cache, and nothing of it was loaded",
                where=request.where,
                found="; ".join(problems[:3]),
                fix=f"connect once, so that it is fetched again, or delete {cache.folder}",
            )
            continue
        resolved = Resolved(variant_dir, commit, cache.repo_type, version)
        if unreachable is not None:
            resolved.notes.append(f"taken from the cache: {unreachable.reason}")
        if request.newest:
            resolved.notes.append(_newest_note(request, version, commit))
        return resolved
    if unreachable is not None:
        raise unreachable
    if refusal is not None:
        raise refusal
    raise SourceError(
        f"{request} is not in the cache",
        where=request.where,
        found=f"HF_HUB_OFFLINE is set, and {cache_root()} has no such version or revision",
        fix="unset HF_HUB_OFFLINE once, or run `twinkle download` where there is a network",
    )


def _cached_ref(request: HubRequest, refs: list[Ref]) -> Ref:
    if request.revision is None:
        return request.choose(refs, listed_from="the cache")
    for ref in refs:
        if ref.name == request.revision:
            return ref
    raise SourceError(
        f"{request} is not in the cache",
        where=request.where,
        found=f"the cache has {', '.join(sorted(ref.name for ref in refs))}",
        fix="run `twinkle download` where there is a network",
    )


def _locked(request: HubRequest, locked: LockedKernel, lock_path: str) -> Resolved:
    kernels = kernels_package(request.where)
    variant, reasons = kernels.choose(locked.variants)
    if variant is None:
        raise no_variant(
            request,
            lock_path,
            reasons,
            fix="lock the builds of other machines with `twinkle lock --all-variants`",
        )
    cache = RepoCache(cache_root(), request.repo_id, locked.repo_type)
    variant_dir = cache.variants_dir(locked.commit) / variant
    files = [HubFile(path, sha256=digest) for path, digest in sorted(locked.variants[variant].items())]
    note = None
    problems = locked_problems(variant_dir, files)
    if problems and all(problem.endswith(": missing") for problem in problems):
        if offline():
            raise SourceError(
                f"{request} is locked and not in the cache",
                where=request.where,
                found="HF_HUB_OFFLINE is set; " + "; ".join(problems[:3]),
                fix="run `twinkle download` where there is a network",
            )
        note = download(request, cache, locked.commit, variant, files, HubClient(request.where))
        problems = locked_problems(variant_dir, files)
    if problems:
        raise SourceError(
            f"{request} differs from the lock, and nothing of it was loaded",
            where=request.where,
            found="; ".join(problems[:3]),
            expected=f"the digests of {lock_path}",
            fix=f"find out who changed it, then delete {cache.folder} to fetch it again",
        )
    digests = locked.variants[variant]
    copy = private_copy(variant_dir, digests, _homes(cache), what=str(request), where=request.where)
    resolved = Resolved(copy, locked.commit, locked.repo_type, locked.requested)
    resolved.locked = Locked(variant_dir, digests)
    resolved.notes.append(f"locked at {locked.commit[:12]} by {lock_path}, and its digests are right")
    if note is not None:
        resolved.notes.append(note)
    return resolved


def _homes(cache: RepoCache) -> list[Path]:
    """Where private copies are kept: on the disk of the cache, else where Twinkle keeps its own things."""
    homes = [cache.root.parent / "twinkle-verified"]
    own = cache_directory(variables())
    return homes if own is None else [*homes, Path(own, "verified")]


def locked_problems(variant_dir: Path, files: list[HubFile]) -> list[str]:
    """The differences of a variant on disk from a lock: files changed, missing or added."""
    problems = [problem for file in files if (problem := file.problem(variant_dir))]
    known = {file.path for file in files}
    return problems + [f"{path}: not in the lock" for path in files_of(variant_dir) if path not in known]


def problems_of(variant_dir: Path, files: list[HubFile] | None) -> list[str]:
    """The differences of a variant on disk from its listing; without a listing, that it is empty."""
    if files is not None:
        return [problem for file in files if (problem := file.problem(variant_dir))]
    if not files_of(variant_dir):
        return [f"{variant_dir.name}: empty"]
    return []


def fetch(
    request: HubRequest,
    cache: RepoCache,
    commit: str,
    variant: str,
    listing: Mapping[str, list[HubFile]],
    client: HubClient,
) -> str | None:
    """Bring all files of a variant into the cache, each as the Hub listed it; one process at a time.

    Returns:
        What was found of its signature, when it was fetched just now.

    Raises:
        SourceError: They cannot be had, or arrive damaged twice.
    """
    if not problems_of(cache.variants_dir(commit) / variant, listing[variant]):
        return None
    return download(request, cache, commit, variant, listing[variant], client, listing)


def download(
    request: HubRequest,
    cache: RepoCache,
    commit: str,
    variant: str,
    files: list[HubFile],
    client: HubClient,
    listing: Mapping[str, list[HubFile]] | None = None,
) -> str | None:
    """Fetch those of ``files`` that are missing or wrong, check them, and the signature if there is one.

    Raises:
        SourceError: They cannot be had, or arrive damaged twice.
    """
    from filelock import Timeout

    variant_dir = cache.variants_dir(commit) / variant
    try:
        with cache.locked():
            if listing is not None:
                cache.write_listing(commit, listing)
            for force in (False, True):
                # Another process may have brought them while this one waited for the lock.
                bad = [file for file in files if file.problem(variant_dir)]
                if not bad:
                    break
                client.download(
                    request.repo_id, cache.repo_type, commit, variant, bad, cache_dir=cache.root, force=force
                )
            bad = [file for file in files if file.problem(variant_dir)]
            if bad:
                problems = [str(file.problem(variant_dir)) for file in bad]
                cache.discard(commit, variant, bad)
                raise SourceError(
                    f"{request} arrived damaged, and nothing of it was loaded",
                    where=request.where,
                    found="; ".join(problems[:3]),
                    expected=f"the files as they are at {commit[:12]}",
                    fix="try again; if it stays so, look for a proxy that changes downloads",
                )
            try:
                return signature_note(variant_dir, request)
            except SourceError:
                cache.discard(commit, variant, files)
                raise
    except Timeout as error:
        raise SourceError(
            f"{request} is being downloaded by another process",
            where=request.where,
            found=f"{error.lock_file} was held for too long",
            fix="end the process that holds it, and load again",
        ) from error
    except OSError as error:
        raise explain(error, f"downloading {request}", request.where) from error


def no_variant(
    request: HubRequest, place: str, reasons: dict[str, str], *, fix: str | None = None
) -> SourceError:
    """The error for builds of which none fits, with the reason for each."""
    listed = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items()))
    return SourceError(
        f"{request} has no build for this machine",
        where=request.where,
        found=f"{place} has {listed}" if listed else f"{place} has no builds at all",
        fix=fix or "take a version that is built for this torch and this device",
    )
