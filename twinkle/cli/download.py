"""``twinkle download``: fill the cache with the Hub kernels of a configuration."""

from __future__ import annotations

import os

from twinkle.cli.lock import hub_parser, sources_by_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from twinkle.sources.hub.source import HubSource

__all__ = ["main"]

_EPILOG = """\
examples:
  twinkle download twinkle.toml                              into the cache of this machine
  HF_HUB_CACHE=/image/hub twinkle download twinkle.toml      into a cache to take along

With a twinkle.lock beside the configuration every locked build is fetched and checked, without one
the build for this machine. Nothing is imported. Afterwards HF_HUB_OFFLINE=1 works.
"""


def main(words: Sequence[str]) -> int:
    """Fetch what a configuration takes from the Hub.

    Raises:
        TwinkleError: The configuration is wrong, or a kernel cannot be had.
    """
    from twinkle.sources.hub.lockfile import named_lock

    parser = hub_parser("download", "Fill the cache with the Hub kernels of a configuration.", _EPILOG)
    options = parser.parse_args(words)
    given = named_lock(options.lock)
    for path, sources in sources_by_lock(options.config, given, to="fetch").items():
        if given or os.path.lexists(path):
            _fetch_locked(path, sources)
        else:
            _fetch_asked(sources)
    return 0


def _fetch_locked(path: str, sources: Sequence[HubSource]) -> None:
    """Fetch every build that a lock lists, and say how many were not there."""
    from twinkle.sources.hub.lockfile import Lock
    from twinkle.sources.hub.make_lock import fetch_locked

    lock = Lock.read(path)
    for source in sources:
        lock.find(source.request)
    for _, kernel in sorted(lock.kernels.items()):
        fetched = fetch_locked(kernel, path)
        state = f"{fetched} fetched" if fetched else "all there"
        print(f"{kernel.repo_id} {kernel.requested} at {kernel.commit[:12]}: {state}")


def _fetch_asked(sources: Sequence[HubSource]) -> None:
    """Fetch the builds for this machine, with the kernels they depend on."""
    from twinkle.sources.hub.load import resolve_tree

    unique: dict[tuple[str, str], HubSource] = {}
    for source in sources:
        unique.setdefault((source.request.repo_id, source.request.key), source)
    for source in unique.values():
        for request, resolved in resolve_tree(source.request, source.trust, None):
            at = resolved.commit[:12] if resolved.commit else str(resolved.variant_dir)
            print(f"{request.repo_id} {request.key} at {at}: {resolved.variant_dir.name}")
            for note in resolved.notes:
                print(f"  {note}")
