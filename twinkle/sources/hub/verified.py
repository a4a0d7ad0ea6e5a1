"""The private copy of a locked variant: the bytes that were checked are the bytes that run.

A variant in the cache of the Hub can be changed between the check and the import, or before a submodule is
imported, by whoever may write there. A locked variant is therefore copied while its digests are taken, into a
directory that only the user can write and that is named by the digests; code and data come from there. It
holds the files of the lock and nothing else, so links, folders and bytecode beside them are never met. Every
load checks the copy again, and every module is checked once more when it is read.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from importlib.machinery import ExtensionFileLoader, SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinkle.errors import SourceError
from twinkle.files import read_bounded
from twinkle.runtime import runtime
from twinkle.sources.hub.cache import LARGEST
from twinkle.sources.permissions import check_own, doubt_about

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import ModuleType

__all__ = ["DAYS", "MOST", "ExtensionLoader", "SourceLoader", "private_copy"]

MOST = 8
"""Copies in one directory that are kept whatever their age."""
DAYS = 30
"""Days after its last use when a copy beyond those goes."""


class _Changed(Exception):
    """A file is not the one that is locked."""


class _Temporary:
    """The directory of this process for copies, where there is no lasting one."""

    def __init__(self) -> None:
        self.directory: Path | None = None

    def path(self) -> Path:
        """The directory, made at the first call and removed when the process that made it ends."""
        if self.directory is None:
            self.directory = Path(tempfile.mkdtemp(prefix="twinkle-"))
            atexit.register(_remove, self.directory, os.getpid())
        return self.directory


def _remove(directory: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child ends before the process whose directory it is
        shutil.rmtree(directory, ignore_errors=True)


def private_copy(
    variant: Path, digests: Mapping[str, str], homes: Iterable[Path], *, what: str, where: str | None
) -> Path:
    """The directory of a whole and private copy of a variant, made where there is none yet.

    Args:
        variant: The variant in the cache; its name is the name of the copy.
        digests: The SHA-256 of each file.
        homes: Where copies may be kept, best first; after them a temporary directory.
        what: The kernel, for messages.
        where: Where it was registered.

    Raises:
        SourceError: A file is not the locked one, or no copy can be written anywhere.
    """
    told = json.dumps([variant.name, sorted(digests.items())]).encode()
    name = hashlib.sha256(told).hexdigest()
    problems: list[str] = []
    for home in (*homes, None):
        try:
            home = home or runtime.of(_Temporary).path()
            _prepare(home)
            copy = home / name
            if not _is_whole(copy / variant.name, digests):
                _make(variant, digests, copy)
            os.utime(copy)
            _prune(home, keep=copy)
            return copy / variant.name
        except _Changed as error:
            raise SourceError(
                f"{what} differs from the lock, and nothing of it was loaded", where=where, found=str(error)
            ) from error
        except OSError as error:
            problems.append(f"{home}: {error.strerror or error}")
    raise SourceError(
        f"{what} is locked, and there is no place for the copy that is checked and run",
        where=where,
        found="; ".join(problems),
        expected="a directory that only this user can write",
        fix="name one with TWINKLE_CACHE",
    )


def _prepare(home: Path) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    home.mkdir(mode=0o700, exist_ok=True)
    check_own(str(home), os.lstat(home))
    doubt = doubt_about(str(home))
    if doubt is not None:
        raise PermissionError(str(doubt))


def _is_whole(copy: Path, digests: Mapping[str, str]) -> bool:
    """Whether a copy has the files of the lock, each right, and nothing beside them."""
    found: set[str] = set()
    waiting = [copy]
    try:
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    check_own(entry.path, entry.stat(follow_symlinks=False))
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(path)
                        continue
                    name = path.relative_to(copy).as_posix()
                    if name not in digests or _sha256(path) != digests[name]:
                        return False
                    found.add(name)
    except OSError:
        return False
    return found == set(digests)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    read_bounded(path, LARGEST, follow=False, each=digest.update)
    return digest.hexdigest()


def _make(variant: Path, digests: Mapping[str, str], copy: Path) -> None:
    """Copy a variant, and put the copy in its place in one step; of two processes either one's will do."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{copy.name[:16]}.", dir=copy.parent))
    try:
        for name, wanted in sorted(digests.items()):
            target = temporary / variant.name / name
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _copy(variant / name, target, name, wanted)
        if copy.exists():  # damaged, as it was found not to be whole
            shutil.rmtree(copy)
        try:
            os.rename(temporary, copy)
        except OSError:
            if not _is_whole(copy / variant.name, digests):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy(source: Path, target: Path, name: str, wanted: str) -> None:
    digest = hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(target, flags, 0o600), "wb") as file:

        def take(part: bytes) -> None:
            digest.update(part)
            file.write(part)

        try:
            read_bounded(source, LARGEST, each=take)
        except FileNotFoundError as error:
            raise _Changed(f"{name}: missing") from error
    if digest.hexdigest() != wanted:
        raise _Changed(f"{name}: its SHA-256 differs")
    os.chmod(target, 0o400)


def _prune(home: Path, *, keep: Path) -> None:
    """Remove copies that were not used for long, and what processes that were killed have left."""
    now = time.time()
    aged = []
    with os.scandir(home) as entries:
        for entry in entries:
            is_ours = re.fullmatch(r"[0-9a-f]{64}|\.[0-9a-f]{16}\.\w+", entry.name)
            if is_ours and entry.path != str(keep) and entry.is_dir(follow_symlinks=False):
                aged.append((now - entry.stat(follow_symlinks=False).st_mtime, entry.path, entry.name))
    for place, (age, path, name) in enumerate(sorted(aged)):
        if (name.startswith(".") and age > 3600) or (place >= MOST and age > DAYS * 86400):
            shutil.rmtree(path, ignore_errors=True)


class SourceLoader(SourceFileLoader):
    """Runs the source that was verified: bytecode beside it is not read, and none is written there.

    Args:
        fullname: The module.
        path: Its file.
        root: The copy it lies in.
        digests: The SHA-256 of each file of the copy; None where nothing is locked.
    """

    def __init__(
        self, fullname: str, path: str, root: Path | None = None, digests: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(fullname, path)
        self._root = root
        self._digests = digests

    def path_stats(self, path: Any) -> Any:
        """No answer, without which Python looks for no bytecode."""
        raise OSError("bytecode is not used")

    def set_data(self, path: Any, data: Any, *, _mode: int = 0o666) -> None:
        """Nothing: no bytecode is written."""

    def get_data(self, path: Any) -> bytes:
        """The bytes of a file, the locked ones where there is a lock.

        Raises:
            OSError: It is not in the lock, or not what was locked.
        """
        data = read_bounded(path, LARGEST)
        if self._root is not None and self._digests is not None:
            _check(path, self._root, self._digests, hashlib.sha256(data).hexdigest())
        return data


class ExtensionLoader(ExtensionFileLoader):
    """Loads a shared object of a copy, when it is the locked one.

    Args:
        fullname: The module.
        path: Its file.
        root: The copy it lies in.
        digests: The SHA-256 of each file of the copy.
    """

    def __init__(self, fullname: str, path: str, root: Path, digests: Mapping[str, str]) -> None:
        super().__init__(fullname, path)
        self._root = root
        self._digests = digests

    def create_module(self, spec: Any) -> ModuleType:
        """The module, once its file was checked."""
        _check(self.path, self._root, self._digests, _sha256(Path(self.path)))
        return super().create_module(spec)


def _check(path: str, root: Path, digests: Mapping[str, str], found: str) -> None:
    name = os.path.relpath(path, root).replace(os.sep, "/")
    if digests.get(name) != found:
        raise ImportError(f"{name} is not the file that is locked", path=path)
