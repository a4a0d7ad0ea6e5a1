"""What a registration asks the Hub for: a repository, and a version, a revision or the newest."""

from __future__ import annotations

import re

from twinkle.errors import ConfigError, SourceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["HubRequest", "Ref"]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NUMBER = r"v?\d+(?:\.\d+)*(?:(?:a|b|rc)\d+)?(?:\.post\d+)?(?:\.dev\d+)?"
_EXACT = re.compile(_NUMBER)
_CLAUSE = re.compile(rf"(?:===?|!=|<=|>=|<|>|~=)\s*{_NUMBER}(?:\.\*)?")
_VERSION_NAME = re.compile(rf"v?({_NUMBER.removeprefix('v?')})")


class Ref:
    """A branch or a tag of a repository.

    Attributes:
        name: Its name without ``refs/heads/``.
        commit: The commit it points at.
    """

    __slots__ = ("commit", "name")

    def __init__(self, name: str, commit: str) -> None:
        self.name = name
        self.commit = commit


class HubRequest:
    """A repository with what was said of its version, checked at registration.

    Args:
        repo_id: ``publisher/name``.
        revision: A branch, a tag or a commit.
        version: ``1``, ``"1"``, ``"0.1.0"`` or a range such as ``">=1,<3"``.
        where: Where the registration stands, for messages.

    Raises:
        ConfigError: Malformed, or both a revision and a version.
    """

    __slots__ = ("repo_id", "revision", "version", "where")

    def __init__(
        self,
        repo_id: object,
        *,
        revision: object = None,
        version: object = None,
        where: str | None = None,
    ) -> None:
        if not isinstance(repo_id, str) or not _REPO_ID.fullmatch(repo_id) or ".." in repo_id:
            raise ConfigError(
                "malformed repo_id",
                where=where,
                found=repr(repo_id),
                expected="publisher/name, such as kernels-community/activation",
            )
        if revision is not None and version is not None:
            raise ConfigError(
                "a Hub kernel takes a revision or a version, not both",
                where=where,
                found=f"revision = {revision!r}, version = {version!r}",
                fix="remove one of them; a commit as revision pins the code exactly",
            )
        if revision is not None and (not isinstance(revision, str) or not _is_ref_name(revision)):
            raise ConfigError(
                "malformed revision",
                where=where,
                found=repr(revision),
                expected="a branch, a tag or a commit of 40 hexadecimal digits, as a string",
            )
        self.repo_id = repo_id
        self.revision = revision
        self.version = None if version is None else _parse_version(version, where)
        self.where = where

    @property
    def publisher(self) -> str:
        """The organisation or user that owns the repository."""
        return self.repo_id.partition("/")[0]

    @property
    def pinned_commit(self) -> str | None:
        """The commit, when the revision already is one."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None

    @property
    def newest(self) -> bool:
        """Whether neither a version nor a revision was given."""
        return self.revision is None and self.version is None

    @property
    def key(self) -> str:
        """What was asked for, as ``twinkle.lock`` writes it."""
        if self.revision is not None:
            return f"revision:{self.revision}"
        return "newest" if self.version is None else f"version:{self.version}"

    def __str__(self) -> str:
        if self.revision is not None:
            return f"{self.repo_id} at revision {self.revision}"
        if self.version is None:
            return f"{self.repo_id}, newest version"
        return f"{self.repo_id} version {self.version}"

    def choose(self, refs: Iterable[Ref], *, listed_from: str) -> Ref:
        """The branch or tag that is meant, among those there are.

        Args:
            refs: Branches first: a branch ``v1`` goes before a tag ``v1.0``.
            listed_from: ``the Hub`` or ``the cache``, for messages.

        Raises:
            SourceError: None fits; the message lists what there is.
        """
        from packaging.specifiers import SpecifierSet
        from packaging.version import Version

        refs = list(refs)
        versions: dict[Version, Ref] = {}
        for ref in refs:
            match = _VERSION_NAME.fullmatch(ref.name)
            if match:
                versions.setdefault(Version(match[1]), ref)
        if self.version is None:
            if versions:
                return versions[max(versions)]
            for ref in refs:
                if ref.name == "main":
                    return ref
            raise self._lacks("any version", versions, refs, listed_from)
        if _EXACT.fullmatch(self.version):
            exact = versions.get(Version(self.version))
            if exact is not None:
                return exact
        else:
            fitting = list(SpecifierSet(self.version).filter(versions))
            if fitting:
                return versions[max(fitting)]
        raise self._lacks(f"version {self.version}", versions, refs, listed_from)

    def _lacks(self, what: str, versions: Iterable[object], refs: list[Ref], listed_from: str) -> SourceError:
        there = ", ".join(str(version) for version in sorted(versions, reverse=True))  # type: ignore[type-var]
        names = ", ".join(sorted(ref.name for ref in refs))
        if there:
            found = f"versions {there} in {listed_from}"
            newest = there.partition(",")[0]
            fix = f"set version = {newest!r}, or a branch, tag or commit as revision"
        else:
            found = f"no versions in {listed_from}" + (f", only {names}" if names else "")
            fix = "set revision to a branch, tag or commit of the repository"
        return SourceError(f"{self.repo_id} has not {what}", where=self.where, found=found, fix=fix)


def _parse_version(version: object, where: str | None) -> str:
    """The version as written, an integer as its digits.

    Raises:
        ConfigError: It is no version and no range of versions.
    """
    if isinstance(version, int) and not isinstance(version, bool) and version >= 0:
        return str(version)
    if isinstance(version, str):
        text = version.strip()
        clauses = [clause.strip() for clause in text.split(",")]
        if _EXACT.fullmatch(text) or all(_CLAUSE.fullmatch(clause) for clause in clauses):
            return text
    raise ConfigError(
        "malformed version",
        where=where,
        found=repr(version),
        expected='1, "1", "0.1.0" or a range such as ">=1,<3"',
    )


def _is_ref_name(name: str) -> bool:
    parts = name.split("/")
    return (
        bool(name)
        and all(part not in ("", ".", "..") for part in parts)
        and not re.search(r"[\s\\:?*~^]", name)
    )
