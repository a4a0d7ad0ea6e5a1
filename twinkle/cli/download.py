"""``twinkle download``: fill the cache with the Hub kernels of a configuration."""

from __future__ import annotations

import argparse
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "parser"]

_EPILOG = """\
examples:
  twinkle download twinkle.toml                              into the cache of this machine
  HF_HUB_CACHE=/image/hub twinkle download twinkle.toml      into a cache to take along

With a twinkle.lock beside the configuration every locked build is fetched and checked, without one
the build for this machine. Nothing is imported. Afterwards HF_HUB_OFFLINE=1 works.
"""


def parser() -> argparse.ArgumentParser:
    """The options of ``twinkle download``."""
    options = argparse.ArgumentParser(
        prog="twinkle download",
        description="Fill the cache with the Hub kernels of a configuration.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("config", nargs="*", metavar="FILE", help="a twinkle.toml; the later one wins")
    options.add_argument("--lock", metavar="FILE", help="the lock, in place of the one beside each file")
    return options


def main(words: Sequence[str]) -> int:
    """Fetch what a configuration takes from the Hub.

    Raises:
        TwinkleError: The configuration is wrong, or a kernel cannot be had.
    """
    from twinkle.cli.lock import hub_sources
    from twinkle.sources.hub.load import resolve_tree
    from twinkle.sources.hub.lockfile import Lock
    from twinkle.sources.hub.make_lock import by_lock, fetch_locked

    options = parser().parse_args(words)
    sources = hub_sources(options.config)
    if not sources:
        print("twinkle: the configuration takes no kernel from the Hub: there is nothing to fetch")
        return 0
    for path, group in by_lock(sources, options.lock or os.environ.get("TWINKLE_LOCK")).items():
        if options.lock or os.environ.get("TWINKLE_LOCK") or os.path.lexists(path):
            lock = Lock.read(path)
            for source in group:
                lock.find(source.request)
            for _, kernel in sorted(lock.kernels.items()):
                fetched = fetch_locked(kernel, path)
                state = f"{fetched} fetched" if fetched else "all there"
                print(f"{kernel.repo_id} {kernel.requested} at {kernel.commit[:12]}: {state}")
            continue
        seen: set[tuple[str, str]] = set()
        for source in group:
            key = (source.request.repo_id, source.request.key)
            if key in seen:
                continue
            seen.add(key)
            for request, resolved in resolve_tree(source.request, source.trust, None):
                at = resolved.commit[:12] if resolved.commit else str(resolved.variant_dir)
                print(f"{request.repo_id} {request.key} at {at}: {resolved.variant_dir.name}")
                for note in resolved.notes:
                    print(f"  {note}")
    return 0
