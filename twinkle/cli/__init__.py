"""The command ``twinkle``: one file a command, imported when that command is typed."""

from __future__ import annotations

import sys

from twinkle._version import __version__
from twinkle.errors import TwinkleError, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "check": "read a configuration and print what it binds",
    "download": "fetch the Hub kernels of a configuration",
    "env": "print versions, doors and variables, for a bug report",
    "lock": "pin the Hub kernels of a configuration to commits and digests",
    "match": "print what the code of a module is recognised as",
    "run": "run a Python program with Twinkle active",
    "verify": "prove the embedded kernels on this machine",
}

_HELP = f"""\
usage: twinkle COMMAND …

Faster PyTorch and transformers programs, without changing a line of them.

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

examples:
  twinkle run train.py --lr 1e-4                     the embedded kernels, no configuration
  twinkle run --config twinkle.toml -m pkg.train     a configuration, a module
  twinkle run --report -c "import my_program"        and what was replaced, at the end
  TWINKLE_CONFIG=twinkle.toml python train.py        the same without the command
  twinkle check twinkle.toml                         is the configuration right?

options:
  -h, --help     this text; `twinkle COMMAND --help` for one command
  --version      the version of Twinkle
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The words behind ``twinkle``; those of this process by default.

    Returns:
        The exit code: 0, or 2 for a command line or a configuration that is wrong. ``twinkle run``
        ends with the exit code of the program.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else "--help"
    if command in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0 if words else 2
    if command == "--version":
        print(f"twinkle {__version__}")
        return 0
    if command not in COMMANDS:
        from twinkle.errors import suggest

        hint = suggest(command, list(COMMANDS)) or "twinkle --help lists the commands"
        say(f"twinkle: unknown command {command!r}; {hint}")
        return 2
    from importlib import import_module

    try:
        return int(import_module(f"twinkle.cli.{command}").main(words[1:]))
    except TwinkleError as error:
        say(f"twinkle: {error}")
        return 2
