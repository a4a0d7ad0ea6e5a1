"""``twinkle run``: replaces this process by the program, in an interpreter where Twinkle is active.

The program is started by Python itself, with the options this interpreter got and an environment
that opens a door of Twinkle. So ``__main__``, ``sys.path``, tracebacks, signals and exit codes are
Python's own, and child processes inherit the door (``docs/decisions/0004-run.md`` has the reasons).
"""

from __future__ import annotations

import os
import sys

from twinkle._environment import absolute, check_path
from twinkle.errors import ConfigError, TwinkleError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "closed_because",
    "config_variable",
    "door_paths",
    "environment",
    "is_our_command",
    "pth_folders",
    "split_command",
    "start",
]

_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def split_command(orig_argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options that Python itself was given, and the program it was told to run.

    Args:
        orig_argv: A command line as in ``sys.orig_argv``.

    Returns:
        The options, and the words of the program: ``-m``, ``-c`` or a path first.
    """
    options: list[str] = []
    words = list(orig_argv[1:])
    while words:
        word = words[0]
        if word == "--":
            return options, words[1:]
        if not word.startswith("-") or word == "-":
            break
        words.pop(0)
        if word.startswith("--"):
            options.append(word)
            if word == "--check-hash-based-pycs":
                options += words[:1]
                del words[:1]
            continue
        for index, letter in enumerate(word[1:], 1):
            if letter in "cm":  # the program starts here
                options += [word[:index]] if index > 1 else []
                return options, [f"-{letter}", *([word[index + 1 :]] if word[index + 1 :] else []), *words]
            if letter in "WX":  # the rest of this word is its value, or else the next word
                if index == len(word) - 1:
                    options += [word, *words[:1]]
                    del words[:1]
                else:
                    options.append(word)
                break
        else:
            options.append(word)
    return options, words


def is_our_command(orig_argv: Sequence[str]) -> bool:
    """Whether this interpreter was started for ``twinkle …`` or ``python -m twinkle …``."""
    _, program = split_command(orig_argv)
    return program[:2] == ["-m", "twinkle"] or os.path.basename(program[0] if program else "") == "twinkle"


def pth_folders() -> list[str]:
    """The site-packages folders of this interpreter that hold the door ``twinkle.pth``."""
    import site

    if sys.flags.no_site:
        return []
    folders = [*site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    name = "twinkle.pth" if sys.version_info < (3, 15) else "twinkle.start"
    return [folder for folder in folders if os.path.isfile(os.path.join(folder, name))]


def door_paths() -> list[str]:
    """The entries that ``PYTHONPATH`` needs for a new interpreter to find Twinkle and a door; often none."""
    paths = []
    if not pth_folders():
        checkout = os.path.join(os.path.dirname(_PACKAGE), "sitecustomize_template")
        is_checkout = os.path.isfile(os.path.join(checkout, "sitecustomize.py"))
        paths.append(checkout if is_checkout else os.path.join(_PACKAGE, "_sitecustomize"))
    # The first entry is the folder of what runs now (with -m the working directory), not of the program.
    first = 0 if getattr(sys.flags, "safe_path", False) else 1
    if os.path.dirname(_PACKAGE) not in map(os.path.abspath, sys.path[first:]):
        paths.append(os.path.dirname(_PACKAGE))
    return paths


def closed_because(paths: Sequence[str]) -> tuple[str, str] | None:
    """Why no door would open in a new interpreter with this one's options, and what to do; None if one does.

    Args:
        paths: The entries that :func:`door_paths` adds to ``PYTHONPATH``.
    """
    install = "install Twinkle into this environment with pip"
    if sys.flags.no_site or sys.flags.ignore_environment:
        option = "-S" if sys.flags.no_site else "-E or -I"
        return f"python was started with {option}", "leave it out: the settings are in the environment"
    if any(os.pathsep in path for path in paths):
        return f"PYTHONPATH cannot hold {' and '.join(paths)}", install
    if not pth_folders():
        from importlib.machinery import PathFinder

        if PathFinder.find_spec("sitecustomize", list(paths[:1])) is None:
            found = f"{_PACKAGE} is the package alone: no twinkle.pth in site-packages, and no {paths[0]}"
            return found, f"{install}, or take the folder sitecustomize_template along"
    return None


def environment(environ: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a new interpreter of ours activates Twinkle.

    Args:
        environ: The environment to start from.
        settings: ``TWINKLE_*`` variables to set in it.

    Raises:
        TwinkleError: No door would open in it.
    """
    paths = door_paths()
    closed = closed_because(paths)
    if closed is not None:
        found, fix = closed
        raise TwinkleError(
            "no door of Twinkle opens in this interpreter, and the program was not started",
            found=found,
            expected="a Python that reads the environment, and twinkle.pth or a sitecustomize of Twinkle",
            fix=fix,
        )
    result = {**environ, **settings}
    if paths:
        before = environ.get("PYTHONPATH")
        result["PYTHONPATH"] = os.pathsep.join([*paths, before] if before else paths)
    return result


def config_variable(paths: Sequence[str], environ: Mapping[str, str]) -> str:
    """The value of ``TWINKLE_CONFIG`` for the configs that were typed, absolute: children change directory.

    Raises:
        ConfigError: A path that the variable cannot hold, or a value that is no path.
    """
    for path in paths:
        check_path("--config", path, "the path of a TOML file, or auto for the defaults without one")
        if os.pathsep in path:
            raise ConfigError(
                f"the path of a config may not contain {os.pathsep!r}",
                where="--config",
                found=path,
                expected="a path that TWINKLE_CONFIG can hold",
                fix="rename the file",
            )
    names = paths or [part for part in environ.get("TWINKLE_CONFIG", "").split(os.pathsep) if part.strip()]
    return os.pathsep.join(map(absolute, names)) or "auto"


def start(program: Sequence[str], settings: Mapping[str, str]) -> int:
    """Run a program with Twinkle active; returns only where a process cannot be replaced (Windows).

    Args:
        program: What would stand behind ``python``: a script, directory or zip, ``-m module`` or
            ``-c code``, then its arguments.
        settings: ``TWINKLE_*`` variables of the run.

    Returns:
        The exit code of the program.

    Raises:
        TwinkleError: There is no interpreter to start, or none in which a door of Twinkle opens.
    """
    if not sys.executable:
        raise TwinkleError("this Python does not know its own executable", fix="use TWINKLE_CONFIG instead")
    environ = environment(os.environ, settings)
    command = [sys.executable, *split_command(sys.orig_argv)[0], *program]
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    if os.name == "posix":
        try:
            os.execve(sys.executable, command, environ)
        except OSError as error:
            raise TwinkleError(
                "Python cannot be started", found=f"{sys.executable}: {error.strerror}"
            ) from None
    import signal
    import subprocess

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return subprocess.call(command, env=environ)
