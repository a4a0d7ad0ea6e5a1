"""Refusal of what other users of the machine could have changed: one rule for all that Twinkle believes.

Code, and files that name code or vouch for it (configurations, locks, kept proofs), are believed where nobody
can have written them but root, the user, and whoever owns the interpreter or the program: their code runs in
this process anyway. Asked are the file, every directory above it, and with symbolic links those of the link
and those of its destination. Modes count where the file system has them; where it has none (Windows), nothing
is refused.
"""

from __future__ import annotations

import os
import stat
import sys

from twinkle._environment import is_switch, variables
from twinkle.errors import SourceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Doubt",
    "advice",
    "believable",
    "check_own",
    "doubt_about",
    "is_private_group",
    "is_read_only",
    "quoted",
    "refuse_writable",
    "vouched_for",
    "writable_by_others",
]

_MOST_FILES = 100_000
_MOST_LINKS = 40


class Doubt:
    """Why a file or directory is not believed.

    Attributes:
        path: What others can write, or own.
        owner: The user it belongs to, where that is somebody else; otherwise ``None``.
        mode: Its mode bits.
        writers: ``"its group"``, ``"everyone"``.
    """

    def __init__(self, path: str, mode: int, writers: tuple[str, ...], owner: int | None) -> None:
        self.path = path
        self.mode = mode
        self.writers = writers
        self.owner = owner

    @property
    def reason(self) -> str:
        """The doubt in words, without the path."""
        if self.owner is not None:
            return f"it belongs to user {self.owner}; this process runs as user {os.geteuid()}"
        return f"mode {self.mode:04o}, writable by {' and '.join(self.writers)}"

    @property
    def fix(self) -> str:
        """The command that ends it."""
        if self.owner is not None:
            return f"chown {os.geteuid()} {quoted(self.path)}, or copy it to a place of your own"
        return f"chmod go-w {quoted(self.path)}"

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def doubt_about(path: str, status: os.stat_result | None = None) -> Doubt | None:
    """Who else could have written a file or directory or put another in its place; ``None`` when nobody.

    Args:
        path: The file or directory. Links are followed, and where each of them lies counts as well.
        status: Of the file that was opened, so that what is judged is what is read.

    Raises:
        OSError: It is not there.
    """
    if os.name != "posix" or vouched_for(path):
        return None
    trusted = _trusted_owners()
    steps = list(_steps(path))
    for number, (here, found) in enumerate(steps):
        last = number == len(steps) - 1
        doubt = _doubt(here, status if last and status is not None else found, trusted, above=not last)
        if doubt is not None:
            return doubt
    return None


def believable(path: str) -> str | None:
    """The doubt about a path in words, or ``None`` when there is none."""
    doubt = doubt_about(path)
    return None if doubt is None else str(doubt)


def check_own(path: str, status: os.stat_result) -> None:
    """Check that something Twinkle made for this user alone is still theirs alone.

    Args:
        path: The file or directory.
        status: Of what was opened or found, links not followed.

    Raises:
        PermissionError: It is a link, belongs to another user, or others may write it.
    """
    if os.name != "posix" or vouched_for(path):
        return
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(f"{path} is not this user's own")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):04o})")


def refuse_writable(package: str, *, where: str | None = None) -> None:
    """Check a package directory (or a single file), everything in it and everything above it.

    Raises:
        SourceError: Somebody else may write there; the message has the command that stops it.
    """
    if os.name != "posix" or vouched_for(package):
        return
    doubt = doubt_about(package)
    is_inside = doubt is not None and doubt.path == os.path.realpath(package)
    if doubt is None:
        doubt, is_inside = _doubt_inside(os.path.realpath(package), where), True
    if doubt is None:
        return
    fix = doubt.fix
    if is_inside and doubt.owner is None and os.path.isdir(package):
        fix = f"chmod -R go-w {quoted(package)}"
    raise SourceError(
        "a local kernel that others can write is not run",
        where=where,
        found=str(doubt),
        expected="files and directories that only their owner can write, this user or root",
        fix=fix + advice(package),
    )


def _doubt_inside(directory: str, where: str | None) -> Doubt | None:
    """The doubt about anything in a directory; what links in it lead to is asked like the path itself."""
    trusted = _trusted_owners()
    waiting, seen, count = [directory], {directory}, 0
    while waiting:
        here = waiting.pop()
        if not os.path.isdir(here):
            continue
        try:
            entries = list(os.scandir(here))
        except OSError:  # what cannot be read is not imported either
            continue
        for entry in entries:
            count += 1
            if count > _MOST_FILES:
                raise SourceError(
                    "a local kernel has too many files to look at",
                    where=where,
                    found=f"more than {_MOST_FILES} in {directory}",
                    fix="name the directory of the package itself",
                )
            if entry.name == "__pycache__":  # bytecode is never read for a kernel: it decides nothing
                continue
            if entry.is_symlink():
                if not os.path.exists(entry.path):
                    continue
                doubt, place = doubt_about(entry.path), os.path.realpath(entry.path)
            else:
                status = entry.stat(follow_symlinks=False)
                doubt, place = _doubt(entry.path, status, trusted, above=False), entry.path
            if doubt is not None:
                return doubt
            if os.path.isdir(place) and place not in seen:
                seen.add(place)
                waiting.append(place)
    return None


def writable_by_others(path: str) -> str | None:
    """Why somebody else may change a file or directory itself, or ``None`` when nobody may."""
    if os.name != "posix" or vouched_for(path):
        return None
    doubt = _doubt(path, os.stat(path), _trusted_owners(), above=False)
    return None if doubt is None else doubt.reason


def _doubt(path: str, status: os.stat_result, trusted: frozenset[int], *, above: bool) -> Doubt | None:
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid not in trusted:
        return Doubt(path, mode, (), status.st_uid)
    if stat.S_ISLNK(status.st_mode):  # its mode means nothing: where it lies decides
        return None
    if above and stat.S_ISDIR(status.st_mode) and mode & stat.S_ISVTX:
        return None  # others may add to it, and cannot touch what is there
    writers = tuple(
        who for who, bit in (("its group", stat.S_IWGRP), ("everyone", stat.S_IWOTH)) if mode & bit
    )
    if writers == ("its group",) and not _can_others_write(path, status):
        writers = ()
    return Doubt(path, mode, writers, None) if writers and not is_read_only(path) else None


def _can_others_write(path: str, status: os.stat_result) -> bool:
    """Whether a group that may write has somebody else in it."""
    try:
        if os.getxattr(path, "system.posix_acl_access"):
            return True  # the bits of the group stand for users that are named one by one
    except (AttributeError, OSError):
        pass
    return not is_private_group(status.st_uid, status.st_gid)


def _steps(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """Every directory and link that is gone through on the way to a path, and last what it leads to."""
    # Without the working directory where it is not needed: it may be gone.
    absolute = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
    parts = [part for part in reversed(absolute.split(os.sep)) if part]
    here, links = os.sep, 0
    status = os.lstat(here)
    yield here, status
    while parts:
        part = parts.pop()
        if part == os.curdir:
            continue
        if part == os.pardir:
            here = os.path.dirname(here)
        else:
            step = os.path.join(here, part)
            status = os.lstat(step)
            if stat.S_ISLNK(status.st_mode):
                links += 1
                if links > _MOST_LINKS:
                    import errno

                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                target = os.readlink(step)
                parts += [part for part in reversed(target.split(os.sep)) if part]
                if os.path.isabs(target):
                    here = os.sep
                yield step, status
                continue
            here = step
        yield here, os.lstat(here)


def _trusted_owners() -> frozenset[int]:
    """Who can have code run in this process anyway: root, the user, the owners of Python and the program."""
    owners = {0, os.geteuid()}
    for path in (os.__file__, sys.executable, _program()):
        try:
            if path:
                owners.add(os.stat(path).st_uid)
        except OSError:
            continue
    return frozenset(owners)


def _program() -> str | None:
    """The script that runs, or the directory that ``-m`` and ``-c`` import from."""
    arguments = iter(sys.orig_argv[1:])
    for argument in arguments:
        if argument in ("-W", "-X", "--check-hash-based-pycs"):
            next(arguments, None)
        elif not argument.startswith("-"):
            return argument
        elif argument[1:2] in ("m", "c") or (argument[1:].isalpha() and argument[-1] in ("m", "c")):
            break
    return None if getattr(sys.flags, "safe_path", False) or sys.flags.isolated else os.curdir


def is_read_only(path: str) -> bool:
    """Whether a path lies on a file system that is mounted read-only, as a ConfigMap of Kubernetes is.

    Modes say nothing there: the files of such a volume are often writable by everyone.
    """
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def vouched_for(path: str) -> bool:
    """Whether ``TWINKLE_TRUST_FILES`` names a directory above a path: the user says who writes there.

    For mounts whose modes mean nothing, such as a Windows drive under WSL.
    """
    given = [entry for entry in variables().get("TWINKLE_TRUST_FILES", "").split(os.pathsep) if entry.strip()]
    real = os.path.realpath(path)
    roots = [os.path.realpath(os.path.expanduser(entry)) for entry in given if not is_switch(entry)]
    return any(real == root or real.startswith(os.path.join(root, "")) for root in roots)


def advice(path: str) -> str:
    """What to do about a mode that lets others write, for the end of a message.

    Args:
        path: The directory of what was refused.
    """
    return (
        "; where modes mean nothing (WSL, a mounted volume) mount it read-only, "
        f"or vouch for it with TWINKLE_TRUST_FILES={quoted(path)}"
    )


def is_private_group(user: int, group: int) -> bool:
    """Whether a group is its owner's own and has no other member, the usual set-up with umask 002."""
    import grp
    import pwd

    try:
        owner, entry = pwd.getpwuid(user), grp.getgrgid(group)
    except KeyError:
        return False
    is_own = owner.pw_gid == group and entry.gr_name == owner.pw_name
    return is_own and set(entry.gr_mem) <= {owner.pw_name}


def quoted(path: str) -> str:
    """A path as a shell takes it."""
    import shlex

    return shlex.quote(path)
