"""``twinkle run``: run a Python program with Twinkle active."""

from __future__ import annotations

import argparse
import os

from twinkle import runner
from twinkle._environment import absolute, check_path
from twinkle.cli.env import clash
from twinkle.errors import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["WITH_VALUE", "command_parser", "main", "settings", "split"]

_USAGE = "twinkle run [options] [--] (script.py | directory | zip | -m module | -c code) …"
_EPILOG = """\
The program sees the world it sees under plain `python`: its arguments, __main__, exit code, signals and
tracebacks. Its child processes are patched like itself. Options of Python go to the left:

  twinkle run train.py --lr 1e-4
  twinkle run --config base.toml --config mine.toml train.py      the later one wins
  twinkle run --report -m torch.distributed.run --nproc-per-node 2 train.py
  python -X dev -O -m twinkle run train.py

Without --config, TWINKLE_CONFIG counts, and without that the embedded kernels with their defaults.
A configuration that is wrong ends with exit code 2 before the program starts.
"""


def command_parser() -> argparse.ArgumentParser:
    """The options of ``twinkle run``; the program stands behind them."""
    parser = argparse.ArgumentParser(
        prog="twinkle run",
        usage=_USAGE,
        description="Run a Python program with Twinkle active.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="a twinkle.toml; may be repeated, the later one wins; `auto` for the defaults",
    )
    parser.add_argument(
        "--kernels", metavar="OPS", help="the embedded kernels: auto, off, or names with commas"
    )
    parser.add_argument("--strict", action="store_true", help="whatever cannot be replaced is an error")
    parser.add_argument(
        "--report", action="store_true", help="print at exit what was replaced, and why not more"
    )
    parser.add_argument("--report-file", metavar="FILE", help="write that as JSON")
    return parser


WITH_VALUE = ("--config", "--kernels", "--report-file")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the options of ``twinkle run`` and the program with its arguments."""
    index = 0
    while index < len(words):
        word = words[index]
        if word == "--":
            return list(words[:index]), list(words[index + 1 :])
        # `-` alone is a program on standard input; `-mname` and `-cpass` are as good as two words.
        if not word.startswith("-") or word == "-" or word[:2] in ("-m", "-c"):
            break
        index += 2 if word in WITH_VALUE else 1
    return list(words[:index]), list(words[index:])


def settings(options: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, str]:
    """The ``TWINKLE_*`` variables that the options stand for.

    Raises:
        ConfigError: A path that a variable cannot hold, or a value that is no path.
    """
    result = {"TWINKLE_CONFIG": runner.config_variable(options.config, environ)}
    if options.kernels is not None:
        result["TWINKLE_KERNELS"] = options.kernels
    if options.strict:
        result["TWINKLE_STRICT"] = "1"
    if options.report:
        result["TWINKLE_LOG"] = "info"
    if options.report_file is not None:
        check_path("--report-file", options.report_file, "the path of a JSON file")
        result["TWINKLE_REPORT"] = absolute(options.report_file)
    return result


def main(words: Sequence[str]) -> int:
    """Replace this process by the program.

    Raises:
        TwinkleError: The configuration is wrong, or no door of Twinkle opens.
    """
    parser = command_parser()
    own, program = split(words)
    options = parser.parse_args(own)
    if not program or (program[0] in ("-m", "-c") and len(program) == 1):
        parser.error("which program? a script, a directory, a zip, -m module or -c code")
    variables = settings(options, os.environ)
    _check({**os.environ, **variables})
    problem = clash()
    if problem:
        say(f"twinkle: {problem}")
    return runner.start(program, variables)


def _check(environ: Mapping[str, str]) -> None:
    # Here, where somebody typed the configuration, a mistake in it is an error; the new interpreter
    # reads it once more at a door where it may only warn.
    from twinkle import config

    parts = environ["TWINKLE_CONFIG"].split(os.pathsep)
    settings = config.load(parts, environ, cwd=os.getcwd())
    settings.records()
    if settings.plugins:
        from twinkle.sources import plugins

        for name in settings.plugins:
            plugins.find(name, where=settings.origins.get("plugins"))
