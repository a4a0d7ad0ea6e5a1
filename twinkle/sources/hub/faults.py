"""Failures of the Hub, the network and the cache: told apart, retried and explained."""

from __future__ import annotations

import errno
import random
import time

from twinkle.errors import SourceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")

__all__ = ["Retry", "Unreachable", "explain", "status_of", "transient"]

# Names in the class hierarchy of httpx, httpx2, requests and urllib3, whichever the client is built on.
_NETWORK = frozenset(
    ("TransportError", "ConnectionError", "Timeout", "ProtocolError", "ChunkedEncodingError", "RetryError")
)
_TIMEOUTS = frozenset(("TimeoutException", "Timeout", "TimeoutError"))
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


class Unreachable(SourceError):
    """The Hub did not answer, or not now: what is in the cache may still do."""


class Retry:
    """Try again what may go better the next time, waiting longer each time.

    Args:
        attempts: How often to try in all.
        base: Seconds before the second attempt; doubled for each further one, never over ``cap``,
            and spread by a random factor of 0.5 to 1 so that many processes do not come back at once.
        cap: The longest wait.
        patience: No further attempt begins after so many seconds.
    """

    __slots__ = ("attempts", "base", "cap", "patience")

    def __init__(
        self, attempts: int = 4, base: float = 0.5, cap: float = 8.0, patience: float = 60.0
    ) -> None:
        self.attempts = attempts
        self.base = base
        self.cap = cap
        self.patience = patience

    def __call__(self, operation: Callable[[], T]) -> T:
        """Run ``operation`` until it succeeds, fails for good, or attempts or patience run out."""
        start = time.monotonic()
        attempt = 0
        while True:
            attempt += 1
            try:
                return operation()
            except Exception as error:
                if attempt >= self.attempts or not transient(error):
                    raise
                wait = self.wait(attempt, error)
                if time.monotonic() - start + wait > self.patience:
                    raise
                time.sleep(wait)

    def wait(self, attempt: int, error: BaseException | None = None) -> float:
        """Seconds to wait after failed attempt number ``attempt``; ``Retry-After`` counts up to the cap."""
        wait: float = min(self.cap, self.base * 2 ** (attempt - 1)) * (0.5 + random.random() / 2)
        asked = _retry_after(error)
        return wait if asked is None else min(self.cap, max(wait, asked))


def _retry_after(error: BaseException | None) -> float | None:
    for cause in _chain(error):
        headers = getattr(getattr(cause, "response", None), "headers", None)
        if headers is not None:
            try:
                return float(headers.get("Retry-After"))
            except (TypeError, ValueError):
                return None
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and what caused it: the client wraps a refused connection in an error about its cache."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error stands for, if it stands for one."""
    for cause in _chain(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _class_names(error: BaseException) -> set[str]:
    return {cls.__name__ for cause in _chain(error) for cls in type(cause).__mro__}


def transient(error: BaseException) -> bool:
    """Whether a second attempt may succeed: 408, 429, 5xx, time-outs and broken connections."""
    if _os_errno(error) in (*_DISK_FULL, *_UNWRITABLE):
        return False
    status = status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return bool(_class_names(error) & _NETWORK) or "Consistency check failed" in str(error)


def _os_errno(error: BaseException) -> int | None:
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
    return None


_STATUS = {
    401: (
        "the Hub asks for a login",
        "check that the repository exists; for a private one run `hf auth login` or set HF_TOKEN",
    ),
    403: (
        "the Hub refuses access",
        "ask for access on the repository's page, and set HF_TOKEN to a token that may read it",
    ),
    404: ("the Hub has no such repository, revision or file", "check repo_id, version and revision"),
    429: (
        "the Hub limits requests",
        "wait, log in for a higher limit, or fill the cache with `twinkle download`",
    ),
}


def explain(error: BaseException, what: str, where: str | None) -> SourceError:
    """The error in words: what failed, what was found, what to do.

    Args:
        error: As the client raised it.
        what: What was being done: ``downloading acme/kernel at 1a2b3c4``.
        where: Where the registration stands.
    """
    code, status = _os_errno(error), status_of(error)
    if code not in _DISK_FULL and status is not None:
        words, fix = _STATUS.get(
            status, (f"the Hub answers {status}", "try again later; the cache is used when filled")
        )
        kind = Unreachable if status in (408, 429) or status >= 500 else SourceError
        return kind(f"{words}: {what}", where=where, found=f"HTTP {status}, {_line(error)}", fix=fix)
    kind, words, found, fix = _without_an_answer(error, code)
    return kind(f"{words}: {what}", where=where, found=found or _line(error), fix=fix)


def _without_an_answer(
    error: BaseException, code: int | None
) -> tuple[type[SourceError], str, str | None, str]:
    """The class, the words, what was found and the fix for an error that is no answer of the Hub."""
    names = _class_names(error)
    if code in _DISK_FULL:
        fix = "free space, or point HF_HUB_CACHE or KERNELS_CACHE at a larger disk; then load again"
        return SourceError, "the disk is full", None, fix
    if "OfflineModeIsEnabled" in names:
        found = "HF_HUB_OFFLINE is set and the cache has not all of it"
        fix = "unset HF_HUB_OFFLINE once, or run `twinkle download` where there is a network"
        return Unreachable, "offline", found, fix
    for known, words, fix in _NO_ANSWER:
        if names & known:
            return Unreachable, words, None, fix
    if code in _UNWRITABLE:
        fix = "make it writable, point HF_HUB_CACHE or KERNELS_CACHE elsewhere, or fill it beforehand"
        return SourceError, "the cache cannot be written", None, fix
    fix = "try again; if it stays so, pin another version, or use `func_impl`, `layer_impl` or `repo_path`"
    return SourceError, "failed", None, fix


# By the names of classes of the clients: what each says, and what to do. The first that fits counts.
_NO_ANSWER = (
    (
        _TIMEOUTS,
        "the Hub is too slow",
        "raise HF_HUB_DOWNLOAD_TIMEOUT (seconds), or fill the cache with `twinkle download`",
    ),
    (
        _NETWORK,
        "the Hub cannot be reached",
        "check the network and HF_ENDPOINT, or fill the cache with `twinkle download` elsewhere",
    ),
    (
        frozenset(("JSONDecodeError",)),
        "something answers in the Hub's place",
        "check HF_ENDPOINT, proxies, and whether this network wants a login in a browser",
    ),
)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
