"""A request to the Hub: a repository, and a version, a revision or the newest.

Standard library only, without ``re``: this module is imported at interpreter start when a
configuration names a repository.
"""

from __future__ import annotations

from twinkle.errors import ConfigError, SourceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["HubRequest", "Ref", "is_commit"]

_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
_HEX = frozenset("0123456789abcdef")


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
        if not isinstance(repo_id, str) or not _is_repo_id(repo_id):
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
        if revision is not None and not _is_ref_name(revision):
            raise ConfigError(
                "malformed revision",
                where=where,
                found=repr(revision),
                expected="a branch, a tag or a commit of 40 hexadecimal digits, as a string",
            )
        self.repo_id = repo_id
        self.revision: str | None = revision  # type: ignore[assignment]
        self.version = None if version is None else _parse_version(version, where)
        self.where = where

    @property
    def publisher(self) -> str:
        """The organisation or user that owns the repository."""
        return self.repo_id.partition("/")[0]

    @property
    def pinned_commit(self) -> str | None:
        """The commit, when the revision already is one."""
        return self.revision if is_commit(self.revision) else None

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
            if _is_exact(ref.name):
                versions.setdefault(Version(ref.name), ref)
        if self.version is None:
            if versions:
                return versions[max(versions)]
            for ref in refs:
                if ref.name == "main":
                    return ref
            raise self._lacks("any version", versions, refs, listed_from)
        if _is_exact(self.version):
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
        if _is_exact(text) or all(_is_clause(clause.strip()) for clause in text.split(",")):
            return text
    fix = f'write it in quotes: version = "{version}"' if isinstance(version, float) else None
    raise ConfigError(
        "malformed version",
        where=where,
        found=repr(version),
        expected='1, "1", "0.1.0" or a range such as ">=1,<3"',
        fix=fix,
    )


def _is_exact(text: str) -> bool:
    """``1``, ``v0.1.0``, ``1.0rc1``: a version as PEP 440 has it, without epoch and local part."""
    text = text.removeprefix("v")
    for marker in (".dev", ".post"):
        text, found, number = text.partition(marker)
        if found and not _is_number(number):
            return False
    for marker in ("rc", "a", "b"):
        release, found, number = text.partition(marker)
        if found:
            return _is_release(release) and _is_number(number)
    return _is_release(text)


def _is_clause(text: str) -> bool:
    """``>=1``, ``~=0.1``, ``==1.*``: one condition of a range."""
    operator = text[:2] if text[1:2] == "=" else text[:1]
    version = text[len(operator) :].strip()
    if operator in ("==", "!=") and version.endswith(".*"):
        return _is_release(version[:-2].removeprefix("v"))
    if operator == "~=" and "." not in version:
        return False
    return operator in ("==", "!=", "<=", ">=", "~=", "<", ">") and _is_exact(version)


def _is_release(text: str) -> bool:
    return all(_is_number(part) for part in text.split("."))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def is_commit(text: object) -> bool:
    """Whether a value is the 40 hexadecimal digits of a commit, which may become part of a path."""
    return isinstance(text, str) and len(text) == 40 and _HEX.issuperset(text)


def _is_repo_id(text: object) -> bool:
    if not isinstance(text, str) or text.count("/") != 1:
        return False
    parts = text.split("/")
    return all(part[:1].isalnum() and _NAME.issuperset(part) and ".." not in part for part in parts)


def _is_ref_name(name: object) -> bool:
    if not isinstance(name, str) or any(letter in "\\:?*~^" or letter <= " " for letter in name):
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))
