"""Reading a configuration file, with an error for everything that can be wrong with one.

A configuration names code to run, so a file that someone else can write is refused, and a path is
opened once and judged by what was opened.
"""

from __future__ import annotations

import os
import stat

from twinkle.config.locations import Locations, printable
from twinkle.config.toml import MAX_DEPTH, scan
from twinkle.errors import ConfigError, MissingDependencyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["MAX_BYTES", "parse", "read"]

MAX_BYTES = 1 << 20


def read(path: str, name: str | None = None) -> tuple[dict[str, Any], Locations]:
    """The document of the file at ``path``, and where its keys stand.

    Args:
        path: The file.
        name: What messages call it; ``path`` when not given.

    Raises:
        ConfigError: It is missing, unreadable, no regular file, too large, writable by others, not
            UTF-8 or not TOML.
    """
    name = printable(path if name is None else name)
    data = _bytes(path, name)
    data = data.removeprefix(b"\xef\xbb\xbf")  # the "utf-8-sig" codec is a module to import
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            "the configuration is not UTF-8",
            where=f"{name}:{line}",
            found=f"byte 0x{data[error.start]:02x}",
            expected="TOML in UTF-8",
            fix="save the file as UTF-8",
        ) from None
    return parse(text, name)


def parse(text: str, name: str, *, prefix: tuple[str | int, ...] = ()) -> tuple[dict[str, Any], Locations]:
    """The document of a TOML text, and where its keys stand.

    Args:
        text: The TOML.
        name: What messages call it: a path, a variable.
        prefix: See :class:`~twinkle.config.locations.Locations`.

    Raises:
        ConfigError: It is not TOML.
    """
    seen = scan(text)
    locations = Locations(name, seen.text, seen.offsets, prefix=prefix)
    if seen.too_deep is not None:
        line = seen.text.count("\n", 0, seen.too_deep) + 1
        raise ConfigError(
            "the configuration is nested too deeply",
            where=f"{locations.name}:{line}",
            found=f"more than {MAX_DEPTH} levels",
            expected="the tables twinkle, layers and functions, see docs/configuration.md",
            fix="close the brackets that this line opens, or shorten its key",
        )
    if seen.document is not None:
        return seen.document, locations
    return _judge(seen.text, locations), locations


def _judge(text: str, locations: Locations) -> dict[str, Any]:
    """Parse with ``tomllib`` a text that the scan cannot read by itself."""
    try:
        import tomllib
    except ImportError:
        try:
            import tomli as tomllib  # type: ignore[import-not-found, no-redef, unused-ignore]
        except ImportError:
            raise MissingDependencyError(
                "this TOML needs a full parser, and Python before 3.11 brings none",
                where=locations.name,
                expected="the package tomli",
                fix="pip install tomli",
            ) from None
    try:
        document: dict[str, Any] = tomllib.loads(text)
        return document
    except (ValueError, RecursionError) as error:
        # Python 3.11 raises a plain ValueError for an integer of more than 4300 digits.
        raise _syntax_error(text, locations.name, str(error)) from None


def _syntax_error(text: str, name: str, message: str) -> ConfigError:
    message, _, place = message.partition(" (at ")
    words = place.rstrip(")").replace(",", "").split()
    lines = text.split("\n")
    column = 1
    if len(words) == 4 and words[1].isdigit() and words[3].isdigit():
        line, column = int(words[1]), int(words[3])
    elif words:  # "end of document": the line that matters is the last one with anything on it
        line = max((number for number, content in enumerate(lines, 1) if content.strip()), default=1)
        column = len(lines[line - 1]) + 1
    else:
        return ConfigError(
            "TOML syntax error", where=name, found=printable(message[:200]), expected="TOML 1.0"
        )
    content = lines[line - 1] if line <= len(lines) else ""
    # A long line is shown around the place.
    start = max(0, column - 60)
    shown = content[start : start + 100]
    return ConfigError(
        f"TOML syntax error: {message[:1].lower()}{message[1:200]}",
        where=f"{name}:{line}, column {column}",
        found=repr(shown) if shown else "the end of the line",
        expected='TOML 1.0: key = value, [table], strings in "quotes", booleans true and false',
        fix=_syntax_fix(content),
    )


def _syntax_fix(line: str) -> str:
    """A fix for the usual syntax mistakes, judged by the line."""
    key, equals, value = line.partition("=")
    value = value.partition("#")[0].strip()
    if not equals and ":" in line and not line.lstrip().startswith("["):
        return f"write {line.partition(':')[0].strip() or 'key'} = value, with an equals sign"
    if equals and value in ("True", "False", "None"):
        return (
            "booleans are true and false; leave the key out for none"
            if value == "None"
            else (f"write {key.strip()} = {value.lower()}")
        )
    if equals and value and value[0].isalpha() and value not in ("true", "false"):
        return f'put the value in quotes: {key.strip()} = "{value}"'
    if equals and not value:
        return f"give {key.strip() or 'the key'} a value, or remove the line"
    return "correct the line; https://toml.io/en/v1.0.0 has the syntax"


# --- reading --------------------------------------------------------------------------------------


def _bytes(path: str, name: str) -> bytes:
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise ConfigError(
            "the configuration file does not exist",
            where=name,
            found=f"no file at {printable(os.path.abspath(path))}",
            expected="a TOML file",
            fix=_similar(path) or "correct the path; relative paths start at the working directory",
        ) from None
    except (OSError, ValueError) as error:
        if os.path.isdir(path):  # Windows refuses to open a directory
            raise _no_file(name, path, stat.S_IFDIR) from None
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            "the configuration file cannot be read",
            where=name,
            found=printable(reason),
            expected="a TOML file that this user may read",
            fix=f"chmod u+r {printable(path)}" if isinstance(error, PermissionError) else "correct the path",
        ) from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise _no_file(name, path, stat.S_IFMT(status.st_mode))
        if os.name == "posix":
            _check_owner(path, name, status)
        if status.st_size > MAX_BYTES:
            raise _too_large(name, status.st_size)
        return _drain(handle, name)
    finally:
        os.close(handle)


def _drain(handle: int, name: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        try:
            part = os.read(handle, MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(
                "the configuration file cannot be read",
                where=name,
                found=error.strerror or str(error),
                expected="a TOML file that this user may read",
                fix="try again, or copy the file to another place",
            ) from None
        if not part:
            return b"".join(parts)
        size += len(part)
        if size > MAX_BYTES:  # it grew, or is one of those files that say they are empty
            raise _too_large(name, size)
        parts.append(part)


def _no_file(name: str, path: str, kind: int) -> ConfigError:
    words = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    fix = "write the settings to a file: child processes read it again"
    if kind == stat.S_IFDIR:
        inside = os.path.join(path, "twinkle.toml")
        fix = "name the file in it" + (f": {printable(inside)}" if os.path.isfile(inside) else "")
    return ConfigError(
        "the configuration is not a file",
        where=name,
        found=words.get(kind, "a device"),
        expected="a TOML file",
        fix=fix,
    )


def _too_large(name: str, size: int) -> ConfigError:
    return ConfigError(
        "the configuration file is too large",
        where=name,
        found=f"{size} bytes" if size <= 2 * MAX_BYTES else f"{size >> 20} MiB",
        expected=f"at most {MAX_BYTES >> 20} MiB",
        fix="name a twinkle.toml; is this another file?",
    )


def _similar(path: str) -> str | None:
    """A file with a similar name in the same directory, for a suggestion."""
    from twinkle.errors import suggest

    folder, base = os.path.split(path)
    try:
        names = os.listdir(folder or ".")
    except (OSError, ValueError):
        return None
    found = suggest(base[:80], names[:500]) if base else None
    return printable(found) if found else None


# --- who else can write ---------------------------------------------------------------------------


def _check_owner(path: str, name: str, status: os.stat_result) -> None:
    try:
        if _is_plainly_closed(path, status):
            return
        from twinkle.sources.permissions import advice, doubt_about, quoted

        doubt = doubt_about(path, status)
    except OSError as error:  # it went away meanwhile
        raise ConfigError(
            "the configuration file cannot be read",
            where=name,
            found=printable(str(error)),
            expected="a TOML file whose directories this user may look at",
            fix="try again, or copy the file to another place",
        ) from None
    if doubt is None:
        return
    shown = printable(doubt.path)
    is_file = doubt.path in (path, os.path.realpath(path))
    what = "the configuration file" if is_file else "a directory of the configuration file"
    if doubt.owner is None:
        folder = os.path.dirname(os.path.abspath(path)) if is_file else doubt.path
        raise ConfigError(
            f"{what} can be written by others, who could have their code run",
            where=name,
            found=f"{shown} is writable by {' and '.join(doubt.writers)} (mode {doubt.mode:04o})",
            expected="only its owner may write it",
            fix=f"chmod go-w {quoted(shown)}" + advice(printable(folder)),
        )
    raise ConfigError(
        f"{what} belongs to another user, who could have their code run",
        where=name,
        found=f"{shown} is owned by user {doubt.owner}; this process runs as user {os.geteuid()}",
        expected="a file and directories of this user, of root, or of the owner of the program",
        fix=f"chown {os.geteuid()} {quoted(shown)}, or copy the configuration to a place of your own"
        + advice(printable(os.path.dirname(os.path.abspath(path)))),
    )


def _is_plainly_closed(path: str, status: os.stat_result) -> bool:
    """Whether no link is on the way, and all of it belongs to this user or root and is closed to others.

    This is the usual case, which leaves :mod:`twinkle.sources.permissions` with the whole rule unread.
    """
    own = (0, os.geteuid())
    here = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
    if os.pardir in here.split(os.sep) or stat.S_ISLNK(os.lstat(here).st_mode):
        return False
    if status.st_uid not in own or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    while here != os.path.dirname(here):
        here = os.path.dirname(here)
        found = os.lstat(here)
        is_open = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
        if found.st_uid not in own or is_open or not stat.S_ISDIR(found.st_mode):
            return False
    return True
