"""``twinkle lock``: pin the Hub kernels of a configuration to commits and digests."""

from __future__ import annotations

import argparse
import os

from twinkle.errors import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from twinkle.sources.hub.lockfile import Lock
    from twinkle.sources.hub.source import HubSource

__all__ = ["hub_parser", "main", "sources_by_lock"]

_EPILOG = """\
examples:
  twinkle lock twinkle.toml                    write twinkle.lock beside it
  twinkle lock --all-variants twinkle.toml     for other machines as well
  twinkle lock --check twinkle.toml            for CI: is it up to date? nothing is written
  twinkle download twinkle.toml                fetch what is locked, for machines without a network

The exit code is 0, 1 when --check finds the lock out of date, 2 when something is wrong.
With a lock beside its configuration a Hub kernel is loaded only as it was locked.
"""


def hub_parser(command: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """The options that the commands about Hub kernels share: configurations and a lock."""
    options = argparse.ArgumentParser(
        prog=f"twinkle {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("config", nargs="*", metavar="FILE", help="a twinkle.toml; the later one wins")
    options.add_argument("--lock", metavar="FILE", help="the lock, in place of the one beside each file")
    return options


def sources_by_lock(paths: Sequence[str], given: str | None, *, to: str) -> dict[str, list[HubSource]]:
    """The Hub sources of configuration files and of the variables, by the path of their lock.

    Says so on stdout where there are none.

    Args:
        paths: The configuration files.
        given: The lock to use in place of those beside the files.
        to: What the command would do with them.

    Raises:
        ConfigError: The configuration cannot be right.
    """
    from twinkle import config
    from twinkle.sources.hub.make_lock import by_lock
    from twinkle.sources.hub.source import HubSource

    settings = config.load(paths, cwd=os.getcwd())
    layers, _, functions = settings.records()
    every = [*(kernel.source for kernel in layers), *(kernel.source for kernel in functions)]
    sources = [source for source in every if isinstance(source, HubSource)]
    if not sources:
        print(f"twinkle: the configuration takes no kernel from the Hub: there is nothing to {to}")
    return by_lock(sources, given)


def _parser() -> argparse.ArgumentParser:
    options = hub_parser("lock", "Pin the Hub kernels of a configuration to commits and digests.", _EPILOG)
    options.add_argument("--check", action="store_true", help="write nothing; exit 1 when it is out of date")
    options.add_argument(
        "--variant", action="append", default=[], metavar="NAME", help="lock this build as well; repeatable"
    )
    options.add_argument("--all-variants", action="store_true", help="lock the builds of all machines")
    return options


def main(words: Sequence[str]) -> int:
    """Write or check the locks of a configuration.

    Raises:
        TwinkleError: The configuration is wrong, or a kernel cannot be locked.
    """
    from twinkle.sources.hub.lockfile import Lock, named_lock
    from twinkle.sources.hub.make_lock import make_lock

    options = _parser().parse_args(words)
    outdated = 0
    for path, group in sources_by_lock(options.config, named_lock(options.lock), to="lock").items():
        before = Lock.read(path) if os.path.lexists(path) else None
        lock = make_lock(
            path, group, before=before, variants=options.variant, all_variants=options.all_variants
        )
        changes = differences(before, lock)
        if options.check:
            outdated += bool(changes)
            tell = say if changes else print
            tell(f"twinkle: {path} is {'out of date' if changes else 'up to date'}")
        else:
            tell = print
            lock.write()
            print(f"twinkle: {path} locks {len(lock.kernels)} kernel{'s' * (len(lock.kernels) != 1)}")
        for change in changes:
            tell(f"  {change}")
    return 1 if outdated else 0


def differences(before: Lock | None, after: Lock) -> list[str]:
    """What changed between two locks, a line each."""
    known = before.kernels if before is not None else {}
    lines = []
    for key in sorted({*known, *after.kernels}):
        name = f"{key[0]} {key[1]}"
        old, new = known.get(key), after.kernels.get(key)
        if new is None:
            lines.append(f"- {name}: no longer asked for")
        elif old is None:
            lines.append(f"+ {name}: {new.commit[:12]}, {', '.join(sorted(new.variants))}")
        elif old.commit != new.commit:
            lines.append(f"~ {name}: {old.commit[:12]} is now {new.commit[:12]}")
        elif old.document() != new.document():
            added = sorted(set(new.variants) - set(old.variants))
            lines.append(f"~ {name}: {', '.join(added) if added else 'digests'} added")
    return lines
