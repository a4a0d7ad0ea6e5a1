"""``twinkle.lock``: commits and digests of the kernels that a configuration takes from the Hub.

JSON, two spaces deep, sorted, one entry a request::

    {
      "format": 1,
      "kernels": [
        {
          "commit": "<40 hexadecimal digits>",
          "repo_id": "publisher/name",
          "repo_type": "kernel",
          "requested": "version:1",
          "variants": {"torch-cpu": {"__init__.py": "<SHA-256>"}}
        }
      ]
    }

``requested`` is ``version:…``, ``revision:…`` or ``newest``. With a lock in force a Hub kernel that
is not in it is refused, and so is a file that is missing, added or of another digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os

from twinkle._environment import check_path, variables
from twinkle.errors import SourceError
from twinkle.files import DOCUMENT, read_bounded
from twinkle.runtime import runtime
from twinkle.sources.hub.request import is_commit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from twinkle.sources.hub.request import HubRequest

__all__ = ["LOCK_NAME", "Lock", "LockedKernel", "beside", "in_force", "named_lock", "use"]

LOCK_NAME = "twinkle.lock"
_HEX = frozenset("0123456789abcdef")
_FIX = "write it again with `twinkle lock`"


class _InForce:
    """The lock given for the whole process, and the locks that were read, by path and digest."""

    def __init__(self) -> None:
        self.given: str | None = None
        self.read: dict[tuple[str, bytes], Lock] = {}


class LockedKernel:
    """One entry of a lock.

    Attributes:
        repo_id, repo_type: The repository.
        requested: What was asked for: ``version:1``, ``revision:main``, ``newest``.
        commit: What it was resolved to.
        variants: The SHA-256 of each file of each locked variant.
    """

    __slots__ = ("commit", "repo_id", "repo_type", "requested", "variants")

    def __init__(
        self,
        repo_id: str,
        requested: str,
        commit: str,
        variants: Mapping[str, Mapping[str, str]],
        *,
        repo_type: str = "kernel",
    ) -> None:
        self.repo_id = repo_id
        self.repo_type = repo_type
        self.requested = requested
        self.commit = commit
        self.variants = {name: dict(files) for name, files in variants.items()}

    @property
    def key(self) -> tuple[str, str]:
        """The repository and what was asked for: the key of the entry in a lock."""
        return self.repo_id, self.requested

    def document(self) -> dict[str, object]:
        """The entry as it stands in the file."""
        return {
            "repo_id": self.repo_id,
            "repo_type": self.repo_type,
            "requested": self.requested,
            "commit": self.commit,
            "variants": self.variants,
        }


class Lock:
    """The content of a ``twinkle.lock``.

    Args:
        path: Where it is or will be, for messages.
        kernels: Its entries.
    """

    def __init__(self, path: str, kernels: Mapping[tuple[str, str], LockedKernel] | None = None) -> None:
        self.path = path
        self.kernels = dict(kernels or {})

    @classmethod
    def read(cls, path: str) -> Lock:
        """Read a lock.

        Raises:
            SourceError: It cannot be read or is malformed; a lock that cannot be read locks everything.
        """
        try:
            data = read_bounded(path, DOCUMENT)
        except OSError as error:
            raise SourceError("the lock cannot be read", where=path, found=str(error), fix=_FIX) from error
        return cls.parse(path, data)

    @classmethod
    def parse(cls, path: str, data: bytes) -> Lock:
        """The lock that the bytes of a file are.

        Raises:
            SourceError: It is malformed.
        """
        try:
            document = json.loads(data, object_pairs_hook=_table)
        except (ValueError, RecursionError) as error:
            raise SourceError("the lock cannot be read", where=path, found=str(error), fix=_FIX) from error
        try:
            if document["format"] != 1:
                raise SourceError(
                    "the lock has another format",
                    where=path,
                    found=repr(document["format"]),
                    expected="1",
                    fix=_FIX,
                )
            kernels = [_entry(table) for table in document["kernels"]]
            if len({kernel.key for kernel in kernels}) != len(kernels):
                raise ValueError("two entries for one request")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SourceError(
                "the lock is malformed", where=path, found=f"{type(error).__name__}: {error}", fix=_FIX
            ) from error
        return cls(path, {kernel.key: kernel for kernel in kernels})

    def text(self) -> str:
        """The file's content: the same entries give the same bytes."""
        kernels = [self.kernels[key].document() for key in sorted(self.kernels)]
        return json.dumps({"format": 1, "kernels": kernels}, indent=2, sort_keys=True) + "\n"

    def write(self) -> None:
        """Write the file, at once or not at all."""
        from pathlib import Path

        from twinkle.sources.hub.cache import write_atomically

        write_atomically(Path(self.path), self.text())

    def find(self, request: HubRequest) -> LockedKernel:
        """The entry of a request.

        Raises:
            SourceError: There is none.
        """
        kernel = self.kernels.get((request.repo_id, request.key))
        if kernel is None:
            others = [key for repo, key in self.kernels if repo == request.repo_id]
            raise SourceError(
                f"{request} is not locked, and nothing of it was loaded",
                where=request.where or self.path,
                found=f"{self.path} locks {', '.join(others) if others else 'nothing'} of this repository",
                fix="bring the lock up to date with `twinkle lock`",
            )
        return kernel


def _table(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice in one table")
    return table


def _is_inside(path: str) -> bool:
    """Whether a path stays in its variant, whatever the system takes for a separator."""
    parts = path.split("/")
    return all(part not in ("", ".", "..") for part in parts) and not set(path) & {"\\", "\0", ":"}


def _entry(table: Mapping[str, object]) -> LockedKernel:
    commit, variants = table["commit"], table["variants"]
    if not isinstance(commit, str) or not is_commit(commit):
        raise ValueError(f"commit {commit!r}")
    if not isinstance(variants, dict):
        raise ValueError(f"variants {variants!r}")
    for name, files in variants.items():
        for path, digest in files.items():
            if not isinstance(digest, str) or len(digest) != 64 or not _HEX.issuperset(digest):
                raise ValueError(f"digest {digest!r} of {path}")
            if not _is_inside(path) or not _is_inside(name) or "/" in name:
                raise ValueError(f"path {name}/{path}")
    repo_type = table.get("repo_type", "kernel")
    if repo_type not in ("kernel", "model"):
        raise ValueError(f"repo_type {repo_type!r}")
    return LockedKernel(
        str(table["repo_id"]), str(table["requested"]), commit, variants, repo_type=str(repo_type)
    )


def beside(directory: str | None) -> str | None:
    """The lock in a directory, or ``None``."""
    if directory is None:
        return None
    path = os.path.join(directory, LOCK_NAME)
    return path if os.path.lexists(path) else None


@contextlib.contextmanager
def use(path: str | None) -> Iterator[None]:
    """Use one lock for every Hub kernel of the process, whatever lies beside its configuration."""
    state = runtime.of(_InForce)
    before, state.given = state.given, path
    try:
        yield
    finally:
        state.given = before


def named_lock(typed: str | None = None) -> str | None:
    """The lock to use in place of those beside the configurations: ``--lock``, else ``TWINKLE_LOCK``.

    Args:
        typed: The value of the option, if it was given.

    Raises:
        ConfigError: It looks like a switch, not like a path.
    """
    path = typed or variables().get("TWINKLE_LOCK")
    if path:
        where = None if typed else "environment variable TWINKLE_LOCK"
        check_path("--lock" if typed else "TWINKLE_LOCK", path, "the path of a twinkle.lock", where=where)
    return path or None


def in_force(directory: str | None) -> Lock | None:
    """The lock for the registrations of a file in ``directory``.

    The one given to :func:`use` goes first, then ``TWINKLE_LOCK``, then the one in the directory.

    Raises:
        ConfigError: ``TWINKLE_LOCK`` is no path.
        SourceError: It cannot be read.
    """
    state = runtime.of(_InForce)
    path = state.given or named_lock() or beside(directory)
    if path is None:
        return None
    try:
        data = read_bounded(path, DOCUMENT, check=lambda status: _refuse_others(path, status))
    except OSError as error:
        raise SourceError("the lock cannot be read", where=path, found=str(error), fix=_FIX) from error
    key = (os.path.abspath(path), hashlib.sha256(data).digest())
    if key not in state.read:
        state.read[key] = Lock.parse(path, data)
    return state.read[key]


def _refuse_others(path: str, status: os.stat_result) -> None:
    """Raise where somebody else could have written the lock that was opened."""
    from twinkle.sources.permissions import advice, doubt_about

    doubt = doubt_about(path, status)
    if doubt is not None:
        raise SourceError(
            "a lock that others can write is not used",
            where=path,
            found=str(doubt),
            expected="a lock, and directories above it, of this user or of root",
            fix=doubt.fix + advice(os.path.dirname(os.path.abspath(path))),
        )
