"""Refusal of code that other users of the machine could have changed.

What counts is who may write: the mode bits of the files, of their directories and of everything
above them. Naming a path trusts its owner. Where there are no such bits (Windows), nothing is
refused.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from twinkle._environment import is_switch, variables
from twinkle.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "advice",
    "is_private_group",
    "is_read_only",
    "quoted",
    "refuse_writable",
    "vouched_for",
    "writable_by_others",
]


def refuse_writable(package: str, *, where: str | None = None) -> None:
    """Check a package directory (or a single file), everything in it and everything above it.

    Raises:
        SourceError: Somebody else may write there; the message has the command that stops it.
    """
    if vouched_for(package):
        return
    for path, recursive in _places(package):
        reason = writable_by_others(path, above=not recursive)
        if reason is not None:
            flag = "-R " if recursive and os.path.isdir(package) else ""
            target = package if recursive else path
            raise SourceError(
                "a local kernel that others can write is not run",
                where=where,
                found=f"{path}: {reason}",
                expected="files and directories that only their owner can write",
                fix=f"chmod {flag}go-w {quoted(target)}" + advice(package),
            )


def writable_by_others(path: str, *, above: bool = False) -> str | None:
    """Why somebody else may change what ``path`` holds, or ``None`` when nobody may.

    Args:
        path: A file or a directory; a link stands for what it points to.
        above: It is a directory above the code: there a group that may write is left to the
            administrator (shared project directories), and a sticky directory such as ``/tmp`` is
            as good as a closed one.
    """
    if os.name != "posix" or is_read_only(path) or vouched_for(path):
        return None
    status = os.stat(path)
    bits = stat.S_IMODE(status.st_mode)
    if above and stat.S_ISDIR(status.st_mode) and bits & stat.S_ISVTX:
        return None
    if bits & stat.S_IWOTH:
        return f"mode {bits:04o}, every user can write"
    if bits & stat.S_IWGRP and not above and not is_private_group(status.st_uid, status.st_gid):
        return f"mode {bits:04o}, group {_group_name(status.st_gid)} can write"
    return None


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


def _places(package: str) -> Iterator[tuple[str, bool]]:
    """The paths that decide what is imported, each with whether it is the package or in it."""
    real = os.path.realpath(package)
    yield real, True
    if os.path.isdir(real):
        for directory, directories, files in os.walk(real):
            # Bytecode is never read for a kernel, so what is in these decides nothing.
            directories[:] = [name for name in directories if name != "__pycache__"]
            for name in (*directories, *files):
                path = os.path.join(directory, name)
                if os.path.exists(path):
                    yield path, True
    seen = set()
    for start in (os.path.dirname(os.path.abspath(package)), os.path.dirname(real)):
        here = start
        while here not in seen:
            seen.add(here)
            yield here, False
            here = os.path.dirname(here)


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


def _group_name(group: int) -> str:
    import grp

    try:
        return grp.getgrgid(group).gr_name
    except KeyError:
        return str(group)


def quoted(path: str) -> str:
    """A path as a shell takes it."""
    import shlex

    return shlex.quote(path)
