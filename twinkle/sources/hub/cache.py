"""The cache on disk, in the layout of ``huggingface_hub``, with what Twinkle writes beside a repository.

``<cache>/kernels--publisher--name/``
    ``refs/<name>``                  the commit a branch or tag pointed at
    ``snapshots/<commit>/build/``    the variants
    ``twinkle/<commit>.json``        the builds of a commit and the digests of their files
    ``twinkle/publisher.json``       whether the publisher was trusted when the Hub was last asked
``<cache>/.locks/kernels--publisher--name/twinkle.lock``  held while a process downloads
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinkle.files import DOCUMENT, read_bounded, write_whole
from twinkle.sources.hub.request import Ref

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "LARGEST",
    "HubFile",
    "RepoCache",
    "cache_root",
    "files_of",
    "is_bytecode",
    "sha256_of",
    "write_atomically",
]

LARGEST = 16 << 30
"""The most bytes of one file of a kernel."""

_REF = 1 << 10

# Seconds to wait for another process to finish its download of the same repository.
LOCK_PATIENCE = 1800.0


class HubFile:
    """A file of a variant, and how to know that it is the right one.

    Attributes:
        path: Relative to the variant, with ``/``.
        size: In bytes, or ``None`` when not known.
        sha256: Of its content, or ``None`` when only the git object is known.
        blob: The git object id, or ``None``.
    """

    __slots__ = ("blob", "path", "sha256", "size")

    def __init__(
        self, path: str, *, size: int | None = None, sha256: str | None = None, blob: str | None = None
    ) -> None:
        self.path = path
        self.size = size
        self.sha256 = sha256
        self.blob = blob

    def problem(self, variant_dir: Path) -> str | None:
        """What is wrong with the file on disk, or ``None``."""
        path = variant_dir / self.path
        try:
            size = path.stat().st_size
            if self.size is not None and size != self.size:
                return f"{self.path}: {size} bytes, expected {self.size}"
            if self.sha256 is not None:
                if sha256_of(path) != self.sha256:
                    return f"{self.path}: its SHA-256 differs"
            elif self.blob is not None and _git_blob(path, size) != self.blob:
                return f"{self.path}: its content differs"
        except FileNotFoundError:
            return f"{self.path}: missing"
        except OSError as error:
            return f"{self.path}: {error.strerror or error}"
        return None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return _digest(path, hashlib.sha256())


def _git_blob(path: Path, size: int) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    digest.update(b"blob %d\0" % size)
    return _digest(path, digest)


def _digest(path: Path, digest: Any) -> str:
    read_bounded(path, LARGEST, each=digest.update)
    return str(digest.hexdigest())


def files_of(variant_dir: Path) -> list[str]:
    """The files of a variant on disk, without bytecode, sorted; a link to a directory counts as a file."""
    found: list[str] = []
    for folder, folders, names in os.walk(variant_dir):
        folders[:] = [name for name in folders if name != "__pycache__"]
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        found.extend((Path(folder) / name).relative_to(variant_dir).as_posix() for name in (*names, *links))
    return sorted(path for path in found if not is_bytecode(path))


def is_bytecode(path: str) -> bool:
    """Whether a file is what Python compiled: it is never fetched, never locked and never read."""
    return path.endswith(".pyc") or "__pycache__" in path.split("/")


def cache_root() -> Path:
    """Where kernels are cached: ``KERNELS_CACHE``, else the cache of ``huggingface_hub``."""
    from huggingface_hub import constants

    return Path(os.path.expanduser(os.environ.get("KERNELS_CACHE") or constants.HF_HUB_CACHE))


class RepoCache:
    """One repository in the cache.

    Args:
        root: The cache.
        repo_id: ``publisher/name``.
        repo_type: ``kernel``, or ``model`` as older versions of ``kernels`` have it.
    """

    def __init__(self, root: Path, repo_id: str, repo_type: str = "kernel") -> None:
        folder = f"{repo_type}s--{repo_id.replace('/', '--')}"
        self.root = root
        self.repo_id = repo_id
        self.repo_type = repo_type
        self.folder = root / folder
        self._lock_path = root / ".locks" / folder / "twinkle.lock"

    def refs(self) -> list[Ref]:
        """The branches and tags whose commit is remembered."""
        base = self.folder / "refs"
        found = []
        try:
            paths = sorted(path for path in base.rglob("*") if path.is_file())
        except OSError:
            return []
        for path in paths:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                found.append(Ref(path.relative_to(base).as_posix(), _ref(path)))
        return found

    def remember_ref(self, name: str, commit: str) -> None:
        """Write ``refs/<name>`` for the same request offline; a read-only cache is left as it is."""
        path = self.folder / "refs" / name
        with contextlib.suppress(OSError):
            if not path.exists() or _ref(path) != commit:
                write_atomically(path, commit)

    def variants_dir(self, commit: str) -> Path:
        """Where the variants of a commit lie."""
        return self.folder / "snapshots" / commit / "build"

    def variants(self, commit: str) -> list[str]:
        """The variants of a commit that are at least partly here."""
        try:
            return sorted(entry.name for entry in self.variants_dir(commit).iterdir() if entry.is_dir())
        except OSError:
            return []

    def listing(self, commit: str) -> dict[str, list[HubFile]] | None:
        """The builds of a commit as the Hub listed them, or ``None`` when it was never asked."""
        document = _read_json(self._listing_path(commit))
        try:
            if document is not None:
                return {
                    variant: [HubFile(path, **facts) for path, facts in sorted(files.items())]
                    for variant, files in document["variants"].items()
                }
            return self._listed_by_client(commit)
        except (KeyError, TypeError, AttributeError):
            return None

    def _listed_by_client(self, commit: str) -> dict[str, list[HubFile]] | None:
        # Newer clients keep the repository's whole listing: it tells a torn download from a whole one.
        document = _read_json(self.folder / "trees" / f"{commit}.json")
        listing: dict[str, list[HubFile]] = {}
        for path, facts in sorted((document or {"files": {}})["files"].items()):
            top, _, rest = path.partition("/")
            variant, _, name = rest.partition("/")
            if top == "build" and name and not is_bytecode(name):
                sha256 = facts.get("lfs_sha256")
                blob = None if sha256 else facts["blob_id"]
                file = HubFile(name, size=facts["size"], sha256=sha256, blob=blob)
                listing.setdefault(variant, []).append(file)
        return listing or None

    def write_listing(self, commit: str, listing: Mapping[str, list[HubFile]]) -> None:
        """Keep the builds of a commit; before a download, so that a torn one is known for what it is."""
        variants = {
            variant: {
                file.path: {
                    key: value
                    for key, value in (("size", file.size), ("sha256", file.sha256), ("blob", file.blob))
                    if value is not None
                }
                for file in files
            }
            for variant, files in listing.items()
        }
        document = {"format": 1, "variants": variants}
        write_atomically(self._listing_path(commit), json.dumps(document, indent=1, sort_keys=True))

    def _listing_path(self, commit: str) -> Path:
        return self.folder / "twinkle" / f"{commit}.json"

    def discard(self, commit: str, variant: str, files: list[HubFile]) -> None:
        """Remove files that arrived damaged, with what they link to."""
        for file in files:
            path = self.variants_dir(commit) / variant / file.path
            with contextlib.suppress(OSError):
                target = path.resolve()
                path.unlink()
                if target != path and self.folder.resolve() in target.parents:
                    target.unlink()

    def publisher_record(self) -> Mapping[str, Any]:
        """What the Hub last said of the publisher; empty when it was never asked."""
        return _read_json(self.folder / "twinkle" / "publisher.json") or {}

    def write_publisher_record(self, record: Mapping[str, Any]) -> None:
        """Keep what the Hub said of the publisher; a read-only cache is left as it is."""
        with contextlib.suppress(OSError):
            if dict(self.publisher_record()) != dict(record):
                write_atomically(
                    self.folder / "twinkle" / "publisher.json", json.dumps(record, indent=1, sort_keys=True)
                )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the repository's lock among all processes of this machine; freed when a process dies."""
        from filelock import FileLock

        self._lock_path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(self._lock_path), timeout=LOCK_PATIENCE):
            yield


def _ref(path: Path) -> str:
    return read_bounded(path, _REF).decode().strip()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(read_bounded(path, DOCUMENT))
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode("utf-8"), mode=0o644)
