"""The verdicts of earlier proofs on this machine, in one small JSON file a user.

The file is ``proofs.json`` in the directory that ``TWINKLE_CACHE`` names, by default ``twinkle`` in the
cache directory of the user (``XDG_CACHE_HOME``, else ``~/.cache``). ``TWINKLE_CACHE=off`` does without.
It is replaced as a whole, so that a reader never sees half of one; of two processes that write at once one
may lose its entry, which is then proven again. A file that cannot be read is as good as none.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinkle._environment import is_switch, variables
from twinkle.proof.compare import Verdict
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MOST", "SCHEMA", "ProofCache", "cache_file", "proofs"]

SCHEMA = 1
"""The format of the file; one of another format is read as empty."""
MOST = 8192
"""Entries that are kept; the oldest go first."""
_log = logging.getLogger("twinkle.proof")


def cache_file(environ: Mapping[str, str]) -> Path | None:
    """Where the verdicts are kept, or None where the user wants no such file."""
    given = environ.get("TWINKLE_CACHE", "").strip()
    if is_switch(given):  # "1" is an error of the configuration, and no directory either
        return None
    if given:
        return Path(given).expanduser() / "proofs.json"
    home = environ.get("XDG_CACHE_HOME", "").strip()
    # The XDG specification has relative paths ignored.
    base = Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()
    return base / "twinkle" / "proofs.json"


class ProofCache:
    """Verdicts by their cache keys (:func:`twinkle.proof.cache_key.cache_key`).

    Args:
        path: The file; without one nothing is found and nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, Any] | None = None
        self._complained = False

    def recall(self, key: Mapping[str, Any]) -> Verdict | None:
        """The verdict kept for a cache key, or for the stricter one with gradients."""
        return self.verdict_of({**key, "gradients": True}) or self.verdict_of(key)

    def verdict_of(self, key: Mapping[str, Any]) -> Verdict | None:
        """The verdict kept for that very cache key, if there is one."""
        if self.path is None:
            return None
        if self._known is None:
            self._known = self._read()
        entry = self._known.get(_digest(key), {})
        try:
            errors = [math.nan if number is None else float(number) for number in entry["errors"]]
            a, b, c, d = errors
            return Verdict(
                bool(entry["ok"]), str(entry["text"]), errors=(a, b, c, d), date=str(entry["date"])
            )
        except (TypeError, KeyError, ValueError):  # nothing there, or not ours
            return None

    def keep(self, key: Mapping[str, Any], verdict: Verdict) -> None:
        """Add a verdict under its cache key, unless it is inconclusive."""
        self.keep_all([(key, verdict)])

    def keep_all(self, verdicts: list[tuple[Mapping[str, Any], Verdict]]) -> None:
        """Add several verdicts at once, as :meth:`keep` does."""
        new = {
            _digest(key): {
                "ok": verdict.ok,
                "text": verdict.text,
                "errors": [None if math.isnan(number) else number for number in verdict.errors],
                "date": datetime.date.today().isoformat(),
                "about": " ".join(str(key.get(part)) for part in ("op", "variant", "dtype", "device")),
            }
            for key, verdict in verdicts
            if verdict.conclusive
        }
        if self.path is None or not new:
            return
        # Read again: other processes write as well.
        entries = {**self._read(), **new}
        if len(entries) > MOST:
            oldest = sorted(entries, key=lambda name: str(entries[name].get("date")), reverse=True)
            entries = {name: entries[name] for name in oldest[:MOST]}
        self._known = entries
        self._write({"schema": SCHEMA, "proofs": entries})

    def clear(self) -> int:
        """Remove the file; returns how many verdicts it had."""
        count = len(self._read())
        self._known = None
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        return count

    def __len__(self) -> int:
        return len(self._read())

    def _read(self) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            document = json.loads(self.path.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self._complain("read", error)
            return {}
        found = document.get("proofs") if isinstance(document, dict) else None
        if not isinstance(found, dict) or document.get("schema") != SCHEMA:
            self._complain("read", "it is of another format")
            return {}
        return {name: entry for name, entry in found.items() if isinstance(entry, dict)}

    def _write(self, document: object) -> None:
        assert self.path is not None
        temporary = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".proofs-", dir=self.path.parent)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(document, file, separators=(",", ":"))
            os.replace(temporary, self.path)
        except OSError as error:
            self._complain("written", error)
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def _complain(self, what: str, why: object) -> None:
        if not self._complained:
            self._complained = True
            _log.warning("%s cannot be %s, so kernels are proven anew: %s", self.path, what, why)


def _digest(key: Mapping[str, Any]) -> str:
    text = json.dumps(key, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Caches:
    """The caches that were opened, by their files."""

    def __init__(self) -> None:
        self.by_path: dict[Path | None, ProofCache] = {}


def proofs() -> ProofCache:
    """The cache of verdicts in the file that the environment names."""
    path = cache_file(variables())
    caches = runtime.of(_Caches).by_path
    if path not in caches:
        caches[path] = ProofCache(path)
    return caches[path]
