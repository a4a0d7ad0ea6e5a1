"""The trust decision: whose code may run. It is made before a download and before an import."""

from __future__ import annotations

import time

from twinkle.errors import ConfigError, SourceError
from twinkle.runtime import runtime
from twinkle.sources.hub.faults import Unreachable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from twinkle.sources.hub.cache import RepoCache
    from twinkle.sources.hub.client import HubClient
    from twinkle.sources.hub.request import HubRequest

__all__ = ["Trust", "decide"]

_EXPECTED = 'true, false, or a list of repositories such as ["publisher/name"]'


class _Publishers:
    """The publishers that the Hub was asked about in this process: one question each is enough.

    Attributes:
        trusted: By endpoint and publisher.
    """

    def __init__(self) -> None:
        self.trusted: dict[tuple[str, str], bool] = {}


class Trust:
    """Which repositories the user allowed, whoever publishes them.

    Attributes:
        everything: ``trust_remote_code = true``.
        repos: The repositories of a list.
    """

    __slots__ = ("everything", "repos")

    def __init__(self, *, everything: bool = False, repos: frozenset[str] = frozenset()) -> None:
        self.everything = everything
        self.repos = repos

    @classmethod
    def parse(cls, value: object, *, where: str | None = None) -> Trust:
        """Read the value of ``trust_remote_code``, or the text of ``TWINKLE_TRUST_REMOTE_CODE``.

        Raises:
            ConfigError: It is neither a truth value nor a list of repositories.
        """
        if value is None:
            return cls()
        if isinstance(value, Trust):
            return value
        if isinstance(value, bool):
            return cls(everything=value)
        if isinstance(value, str):
            word = value.strip().lower()
            if word in ("1", "true", "yes", "on"):
                return cls(everything=True)
            if word in ("", "0", "false", "no", "off"):
                return cls()
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, (list, tuple, set, frozenset)) and all(
            isinstance(repo, str) and repo.count("/") == 1 for repo in value
        ):
            return cls(repos=frozenset(value))
        raise ConfigError("malformed trust_remote_code", where=where, found=repr(value), expected=_EXPECTED)

    def allows(self, repo_id: str) -> bool:
        """Whether the user allowed this repository."""
        return self.everything or repo_id in self.repos


def decide(request: HubRequest, trust: Trust, caches: list[RepoCache], client: HubClient | None) -> str:
    """Decide whether a repository may be loaded, and say why it may.

    Online the Hub is asked, and its answer kept beside the repository in the cache. Offline, and
    when the Hub does not answer, that answer counts; without one the kernel is refused. Only where the Hub
    has said no does the message name ``trust_remote_code``: a network that is down is no reason to trust.

    Args:
        request: The repository.
        trust: What the user allowed.
        caches: Where the repository may lie in the cache; the first is where the answer is kept.
        client: The Hub, or ``None`` when offline.

    Raises:
        SourceError: The repository is not trusted; the message says how to allow it.
        Unreachable: Nobody could say whether it is; the message says how to ask.
    """
    from huggingface_hub import constants

    if trust.allows(request.repo_id):
        return "allowed by trust_remote_code"
    found = "HF_HUB_OFFLINE is set, and the Hub has not been asked about it before"
    fix: str | None = "run `twinkle download` where there is a network: it asks the Hub, and keeps the answer"
    if client is not None:
        try:
            trusted = _ask(client, request.publisher)
        except SourceError as error:
            found, fix = f"the Hub could not be asked: {error.reason}", error.fix
        else:
            record = {"endpoint": client.endpoint, "publisher": request.publisher, "trusted": trusted}
            record["asked"] = time.strftime("%Y-%m-%d", time.gmtime())
            known = [cache for cache in caches if cache.folder.exists()]
            for cache in known or (caches[:1] if trusted else ()):
                cache.write_publisher_record(record)
            if trusted:
                return "its publisher is trusted by the Hub"
            raise _refused(request, f"the Hub does not list {request.publisher} as a trusted publisher")
    for cache in caches:
        answer = _recorded(cache.publisher_record(), constants.ENDPOINT, request.publisher)
        if answer is not None:
            trusted, asked = answer
            if trusted:
                return f"its publisher was trusted by the Hub on {asked}"
            found = f"the Hub did not list {request.publisher} as a trusted publisher on {asked}"
            raise _refused(request, found)
    raise Unreachable(
        f"nobody could say whether {request.repo_id} is trusted, and nothing of it was loaded",
        where=request.where,
        found=found,
        fix=fix,
    )


def _ask(client: HubClient, publisher: str) -> bool:
    known = runtime.of(_Publishers).trusted
    key = (client.endpoint, publisher)
    if key not in known:
        known[key] = client.trusts(publisher)
    return known[key]


def _recorded(record: Mapping[str, object], endpoint: str, publisher: str) -> tuple[bool, str] | None:
    if record.get("endpoint") != endpoint or record.get("publisher") != publisher:
        return None
    return record.get("trusted") is True, str(record.get("asked", "an unknown day"))


def _refused(request: HubRequest, found: str) -> SourceError:
    return SourceError(
        f"{request.repo_id} is not trusted, and nothing of it was loaded",
        where=request.where,
        found=found,
        fix=f'read its code, then set trust_remote_code = ["{request.repo_id}"] '
        "(or TWINKLE_TRUST_REMOTE_CODE); `twinkle lock` then pins what you read",
    )
