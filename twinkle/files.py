"""Files beside the program, read within bounds and written at once.

What Twinkle reads beside the program may be anything by the time it is opened: a pipe that nobody writes
to, a device without an end, a file that grows. Every such file is read by :func:`read_bounded`.

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

import errno
import os
import stat

from twinkle._environment import is_switch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["DOCUMENT", "cache_directory", "read_bounded", "write_whole"]

DOCUMENT = 16 << 20
"""The most bytes of a document that Twinkle reads: a lock, a listing, metadata, a report."""

_CHUNK = 1 << 20


def read_bounded(
    path: str | os.PathLike[str],
    limit: int,
    *,
    follow: bool = True,
    check: Callable[[os.stat_result], None] | None = None,
    each: Callable[[bytes], object] | None = None,
) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; never waits for a writer.

    Args:
        path: The file.
        limit: The most bytes it may have.
        follow: Whether ``path`` itself may be a symbolic link.
        check: Judges the file that was opened, by its status; raises what it has against it.
        each: Takes the content part by part, for a file that is too large to hold; then nothing is returned.

    Raises:
        OSError: It is not there, may not be read, is no regular file (``EINVAL``), is a link that is not
            followed (``ELOOP``) or is larger (``EFBIG``).
    """
    path = os.fspath(path)
    if "\0" in path:
        raise OSError(errno.EINVAL, "a name with a null byte", path)
    # Asked before it is opened, as opening a device can have effects, and again of what was opened.
    _regular(os.stat(path, follow_symlinks=follow), path)
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(path, flags)
    try:
        status = os.fstat(handle)
        _regular(status, path)
        if check is not None:
            check(status)
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"{status.st_size} bytes, at most {limit} are read", path)
        parts: list[bytes] = []
        size = 0
        # Read to its end: it may grow meanwhile, and files of /proc say that they are empty.
        while part := os.read(handle, min(_CHUNK, limit + 1 - size)):
            size += len(part)
            if size > limit:
                raise OSError(errno.EFBIG, f"more than {limit} bytes", path)
            if each is None:
                parts.append(part)
            else:
                each(part)
        return b"".join(parts)
    finally:
        os.close(handle)


def _regular(status: os.stat_result, path: str) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, "a symbolic link", path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)


def write_whole(path: str | os.PathLike[str], data: bytes, *, mode: int = 0o666) -> None:
    """Write a file in one step: a reader sees the old file or the new one, whole.

    The new content is written beside it under a name that nobody can guess, and never through a link.

    Args:
        path: The file; its directory exists.
        data: Its content.
        mode: Its mode, less the umask.

    Raises:
        OSError: It cannot be written, or ``path`` is something else than a file: a directory, a device.
    """
    path = os.fspath(path)
    if os.path.exists(path):
        _regular(os.stat(path), path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name[:64]}.{os.urandom(8).hex()}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(temporary, flags | getattr(os, "O_NOFOLLOW", 0), mode)
    try:
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(handle, left) :]
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except BaseException:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise


def cache_directory(environ: Mapping[str, str]) -> str | None:
    """The directory of what Twinkle keeps for a user, or None where there is none.

    ``TWINKLE_CACHE`` names it; by default it is ``twinkle`` in the cache directory of the user
    (``XDG_CACHE_HOME``, else ``~/.cache``). There is none where ``TWINKLE_CACHE`` is ``off``, and where the
    user has no home directory.

    Args:
        environ: The environment.
    """
    given = environ.get("TWINKLE_CACHE", "").strip()
    if is_switch(given):  # "1" is an error of the configuration, and no directory either
        return None
    home = environ.get("XDG_CACHE_HOME", "").strip()
    if given:
        path = os.path.expanduser(given)
    elif os.path.isabs(home):  # the XDG specification has relative paths ignored
        path = os.path.join(home, "twinkle")
    else:
        path = os.path.join(os.path.expanduser("~"), ".cache", "twinkle")
    # What expanduser leaves as it is has no home directory: it is no directory named "~" either.
    return None if path.startswith("~") or "\0" in path else os.path.abspath(path)
