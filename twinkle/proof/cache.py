"""The verdicts of earlier proofs on this machine: one small file a verdict, in a directory of the user's own.

The directory is ``proofs`` in the one that ``TWINKLE_CACHE`` names (:func:`twinkle.files.cache_directory`).
Each file is named by the digest of its key and written whole, so that processes which write at once lose
nothing and need no lock. Beside the verdicts lie the figures of measurements (:mod:`twinkle.proof.speed`).

A kept verdict spares a proof, and is believed only where nobody but the user can have written it: the
directory is theirs and closed to others, and the file is signed with a secret that lies in it. Anything odd
about a file means proving again. Only verdicts that a kernel is right are kept: none can switch one off.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinkle._environment import variables
from twinkle.files import cache_directory, read_bounded, write_whole
from twinkle.proof.compare import Verdict
from twinkle.runtime import runtime
from twinkle.sources.permissions import believable, check_own

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["DAYS", "MOST", "SCHEMA", "ProofCache", "cache_folder", "proofs"]

SCHEMA = 2
"""The format of a file; one of another format is none."""
MOST = 8192
"""Verdicts that are kept; the oldest go first."""
DAYS = 180
"""Days for which a verdict is believed."""

_BYTES = 1 << 16
_SECRET = "secret"
_VERDICT, _FIGURES = {"text", "errors"}, {"figures"}
_COMMON = {"schema", "key", "date", "about", "mac"}
LOOK_EVERY = 256
_log = logging.getLogger("twinkle.proof")


def cache_folder(environ: Mapping[str, str]) -> Path | None:
    """Where the verdicts are kept, or None where the user wants none or has no home."""
    directory = cache_directory(environ)
    return None if directory is None else Path(directory, "proofs")


class ProofCache:
    """Verdicts by their cache keys (:func:`twinkle.proof.cache_key.cache_key`); no method of it raises.

    Args:
        path: The directory; without one nothing is found and nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, Verdict] = {}
        self._figures: dict[str, dict[str, Any]] = {}
        self._secret: bytes | None = None
        self._complained = False
        self._written = 0

    def recall(self, key: Mapping[str, Any]) -> Verdict | None:
        """The verdict kept for a cache key, or for the stricter one with gradients."""
        return self.verdict_of({**key, "gradients": True}) or self.verdict_of(key)

    def verdict_of(self, key: Mapping[str, Any]) -> Verdict | None:
        """The verdict kept for that very cache key, if there is one."""
        if self.path is None:
            return None
        with self._guarded("read"):
            digest = _digest(key)
            if digest not in self._known:
                document = self._read(digest, _VERDICT)
                if document is None:
                    return None
                self._known[digest] = _verdict_in(document)
            return self._known[digest]
        return None

    def keep(self, key: Mapping[str, Any], verdict: Verdict) -> None:
        """Add a verdict under its cache key, unless it is inconclusive; a rejection for this process only."""
        self.keep_all([(key, verdict)])

    def keep_all(self, verdicts: list[tuple[Mapping[str, Any], Verdict]]) -> None:
        """Add several verdicts at once, as :meth:`keep` does."""
        if self.path is None:
            return
        with self._guarded("written"):
            for key, verdict in verdicts:
                if not verdict.conclusive:
                    continue
                digest, today = _digest(key), datetime.date.today().isoformat()
                self._known[digest] = Verdict(verdict.ok, verdict.text, errors=verdict.errors, date=today)
                if verdict.ok:
                    errors = [None if math.isnan(number) else number for number in verdict.errors]
                    self._write(digest, key, today, {"text": verdict.text[:4096], "errors": errors})

    def figures_of(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was measured under that very cache key, with its ``date``, if anything was."""
        if self.path is None:
            return None
        with self._guarded("read"):
            digest = _digest(key)
            if digest not in self._figures:
                document = self._read(digest, _FIGURES)
                if document is None:
                    return None
                self._figures[digest] = {**document["figures"], "date": document["date"]}
            return self._figures[digest]
        return None

    def keep_figures(self, key: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        """Add what was measured, as JSON has it, under its cache key."""
        if self.path is None:
            return
        with self._guarded("written"):
            digest, today = _digest(key), datetime.date.today().isoformat()
            self._figures[digest] = {**figures, "date": today}
            self._write(digest, key, today, {"figures": {**figures, "date": None}})

    def clear(self) -> int:
        """Remove the verdicts and the secret that signs them; returns how many there were."""
        self._known.clear()
        self._figures.clear()
        self._secret = None
        count = 0
        with self._guarded("cleared"):
            for entry in self._entries():
                entry.unlink(missing_ok=True)
                count += 1
            if self.path is not None:
                (self.path / _SECRET).unlink(missing_ok=True)
        return count

    def __len__(self) -> int:
        with self._guarded("read"):
            return len(self._entries())
        return 0

    # -- one file ----------------------------------------------------------------------------------

    def _read(self, digest: str, fields: set[str]) -> dict[str, Any] | None:
        assert self.path is not None
        file = self.path / f"{digest}.json"
        if not file.exists():
            return None
        self._check_folder(self.path)
        data = _read_own(file, _BYTES)
        document = json.loads(data, parse_constant=_no_number)
        secret = self._signing()
        right = isinstance(document, dict) and set(document) == _COMMON | fields
        if not right or document["schema"] != SCHEMA:
            raise ValueError(f"{file.name} is of another format")
        if secret is None or document["mac"] != _mac(secret, document) or document["key"] != digest:
            raise ValueError(f"{file.name} is not what was written")
        date = datetime.date.fromisoformat(document["date"])
        if not 0 <= (datetime.date.today() - date).days + 1 <= DAYS:
            return None
        return dict(document)

    def _write(self, digest: str, key: Mapping[str, Any], date: str, fields: Mapping[str, Any]) -> None:
        assert self.path is not None
        if not self.path.is_dir():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
        self._check_folder(self.path)
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "key": digest,
            "date": date,
            "about": " ".join(str(key.get(part)) for part in ("op", "variant", "dtype", "device"))[:512],
            **fields,
        }
        document["mac"] = _mac(self._signing(make=True) or b"", document)
        write_whole(self.path / f"{digest}.json", json.dumps(document, indent=1).encode(), mode=0o600)
        if self._written % LOOK_EVERY == 0:
            self._prune()
        self._written += 1

    def _signing(self, *, make: bool = False) -> bytes | None:
        """The secret of this user's verdicts, made by the first process that keeps one."""
        assert self.path is not None
        if self._secret is None:
            file = self.path / _SECRET
            if make and not file.exists():
                # Written whole and then linked: of several processes all get the secret of the first.
                own = self.path / f".{_SECRET}.{os.urandom(8).hex()}.tmp"
                write_whole(own, os.urandom(32), mode=0o600)
                try:
                    os.link(own, file)
                except FileExistsError:
                    pass
                except OSError:  # a file system without hard links
                    os.replace(own, file)
                own.unlink(missing_ok=True)
            secret = _read_own(file, 32)
            if len(secret) != 32:
                raise ValueError("the secret is damaged: remove it, or run `twinkle verify --clear`")
            self._secret = secret
        return self._secret

    # -- the directory -----------------------------------------------------------------------------

    def _check_folder(self, folder: Path) -> None:
        """Raise where somebody else may write in the directory, or put another in its place."""
        check_own(str(folder), os.lstat(folder))
        reason = believable(str(folder))
        if reason is not None:
            raise PermissionError(f"others could have written them: {reason}")

    def _entries(self) -> list[Path]:
        if self.path is None or not self.path.is_dir():
            return []
        return [path for path in self.path.iterdir() if path.suffix == ".json" and path.name[0] != "."]

    def _prune(self) -> None:
        """Remove the oldest verdicts beyond ``MOST``, and what writers that were killed have left."""
        assert self.path is not None
        aged = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    aged.append((entry.stat(follow_symlinks=False).st_mtime, entry.path))
        now = datetime.datetime.now().timestamp()
        for when, path in aged:
            if path.endswith(".tmp") and now - when > 3600:
                Path(path).unlink(missing_ok=True)
        kept = sorted((when, path) for when, path in aged if path.endswith(".json"))
        for _, path in kept[: max(0, len(kept) - MOST)]:
            Path(path).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Nothing that is wrong with the cache is an error of the program; the first is a line in the log."""
        try:
            yield
        except FileNotFoundError:
            return
        except Exception as error:
            if not self._complained:
                self._complained = True
                _log.warning("%s cannot be %s, so kernels are proven anew: %s", self.path, what, error)


def _read_own(file: Path, limit: int) -> bytes:
    """The content of a file that is this user's own."""
    return read_bounded(file, limit, follow=False, check=lambda status: check_own(str(file), status))


def _verdict_in(document: Mapping[str, Any]) -> Verdict:
    a, b, c, d = (math.nan if number is None else float(number) for number in document["errors"])
    return Verdict(True, str(document["text"]), errors=(a, b, c, d), date=document["date"])


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no error")


def _mac(secret: bytes, document: Mapping[str, Any]) -> str:
    told = {name: value for name, value in document.items() if name != "mac"}
    text = json.dumps(told, sort_keys=True)
    return hashlib.blake2b(text.encode(), key=secret, digest_size=32).hexdigest()


def _digest(key: Mapping[str, Any]) -> str:
    text = json.dumps(key, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class _Caches:
    """The caches that were opened, by their directories."""

    def __init__(self) -> None:
        self.by_path: dict[Path | None, ProofCache] = {}


def proofs() -> ProofCache:
    """The cache of verdicts in the directory that the environment names."""
    path = cache_folder(variables())
    caches = runtime.of(_Caches).by_path
    if path not in caches:
        caches[path] = ProofCache(path)
    return caches[path]
