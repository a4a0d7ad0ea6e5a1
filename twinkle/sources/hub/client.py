"""The requests to the Hub, made through the session of ``huggingface_hub``, with time-outs and retries."""

from __future__ import annotations

import inspect
import sys
import threading
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from twinkle import forks
from twinkle._version import __version__
from twinkle.errors import SourceError
from twinkle.runtime import runtime
from twinkle.sources.hub.cache import HubFile, is_bytecode
from twinkle.sources.hub.faults import Retry, Unreachable, explain, status_of
from twinkle.sources.hub.request import Ref, is_commit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["HubClient"]

_WORKERS = 4

# How patiently the Hub is asked.
RETRY = Retry()

# Seconds in which a Hub that did not answer is not asked again: with twenty kernels of a model bound to
# twenty repositories, a network that is down must not be waited for twenty times.
SILENCE = 30.0


class _Silent:
    """The Hubs that did not answer, by endpoint: when that was, and what was found."""

    def __init__(self) -> None:
        self.since: dict[str, tuple[float, str]] = {}


class HubClient:
    """The Hub as far as Twinkle asks it.

    Args:
        where: Where the registration stands, for messages.
        retry: How often and how long to try again.
    """

    def __init__(self, where: str | None = None, retry: Retry | None = None) -> None:
        from huggingface_hub import constants

        self.endpoint: str = constants.ENDPOINT
        self.timeout: float = constants.HF_HUB_DOWNLOAD_TIMEOUT
        self.where = where
        self.retry = retry or RETRY

    def refs(self, repo_id: str, repo_type: str) -> list[Ref]:
        """Branches, then tags."""
        document = self._get(f"/api/{repo_type}s/{repo_id}/refs", f"listing the versions of {repo_id}")
        return [
            Ref(str(ref["name"]), self._commit(ref["targetCommit"], repo_id))
            for kind in ("branches", "tags")
            for ref in document.get(kind, ())
        ]

    def commit_of(self, repo_id: str, repo_type: str, revision: str) -> str:
        """The commit that a branch or tag points at."""
        path = f"/api/{repo_type}s/{repo_id}/revision/{quote(revision, safe='')}"
        return self._commit(self._get(path, f"resolving revision {revision} of {repo_id}")["sha"], repo_id)

    def _commit(self, value: object, repo_id: str) -> str:
        # It becomes a part of a path.
        if is_commit(value):
            return str(value)
        raise SourceError(f"the Hub gives no commit of {repo_id}", where=self.where, found=repr(value))

    def trusts(self, publisher: str) -> bool:
        """Whether the Hub lists the publisher as a trusted one; a user is not one."""
        try:
            overview = self._get(
                f"/api/organizations/{quote(publisher, safe='')}/overview", f"asking about {publisher}"
            )
        except SourceError as error:
            if (error.found or "").startswith("HTTP 404"):
                return False
            raise
        return overview.get("trustedKernelPublisher") is True

    def variants(self, repo_id: str, repo_type: str, commit: str) -> dict[str, list[HubFile]]:
        """The files of every build variant of a commit."""
        what = f"listing the builds of {repo_id} at {commit[:12]}"
        url = f"/api/{repo_type}s/{repo_id}/tree/{commit}/build?recursive=true&expand=false"
        found: dict[str, list[HubFile]] = {}
        next_url: str | None = url
        while next_url is not None:
            entries, next_url = self._get_page(next_url, what)
            for entry in entries:
                parts = str(entry["path"]).split("/")
                if entry.get("type") != "file" or len(parts) < 3 or parts[0] != "build":
                    continue
                name = "/".join(parts[2:])
                if is_bytecode(name):
                    continue
                if any(part in ("", ".", "..") or "\\" in part for part in parts):
                    raise SourceError(
                        f"the Hub lists an unsafe path: {what}", where=self.where, found=entry["path"]
                    )
                lfs = entry.get("lfs") or {}
                file = HubFile(
                    name,
                    size=lfs.get("size", entry.get("size")),
                    sha256=lfs.get("oid"),
                    blob=None if lfs else entry.get("oid"),
                )
                found.setdefault(parts[1], []).append(file)
        return {variant: sorted(files, key=lambda file: file.path) for variant, files in found.items()}

    def download(
        self,
        repo_id: str,
        repo_type: str,
        commit: str,
        variant: str,
        files: list[HubFile],
        *,
        cache_dir: Path,
        force: bool = False,
    ) -> None:
        """Fetch files of a variant into the cache, several at once, with one progress bar for all."""
        from huggingface_hub import hf_hub_download

        total = sum(file.size or 0 for file in files)
        bar = _bar(total, f"{repo_id} {variant}")
        stop = threading.Event()
        options: dict[str, Any] = {}
        if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
            options["tqdm_class"] = _part_of(bar, stop)

        def fetch(file: HubFile) -> None:
            what = f"downloading build/{variant}/{file.path} of {repo_id} at {commit[:12]}"
            try:
                Retry(attempts=2, base=self.retry.base, cap=self.retry.cap, patience=self.retry.patience)(
                    lambda: hf_hub_download(
                        repo_id,
                        f"build/{variant}/{file.path}",
                        repo_type=repo_type,
                        revision=commit,
                        cache_dir=str(cache_dir),
                        library_name="twinkle",
                        library_version=__version__,
                        etag_timeout=self.timeout,
                        force_download=force,
                        endpoint=self.endpoint,
                        **options,
                    )
                )
            except Exception as error:
                raise explain(error, what, self.where) from error

        with bar:
            _for_each(files, fetch, stop)

    def _get(self, path: str, what: str) -> dict[str, Any]:
        document, _ = self._get_page(path, what)
        if not isinstance(document, dict):
            raise SourceError(f"the Hub gave an answer of another kind: {what}", where=self.where)
        return document

    def _get_page(self, path: str, what: str) -> tuple[Any, str | None]:
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = path if path.startswith("http") else self.endpoint + path
        # A next page on another host gets no token.
        token = None if url.startswith(f"{self.endpoint}/") else False
        headers = build_hf_headers(token=token, library_name="twinkle", library_version=__version__)

        def get() -> tuple[Any, str | None]:
            response = get_session().get(url, headers=headers, timeout=self.timeout)
            hf_raise_for_status(response)
            return response.json(), response.links.get("next", {}).get("url")

        silent = runtime.of(_Silent).since
        since, reason = silent.get(self.endpoint, (0.0, ""))
        if reason and time.monotonic() - since < SILENCE:
            raise Unreachable(f"the Hub did not answer a moment ago: {what}", where=self.where, found=reason)
        try:
            return self.retry(get)
        except Exception as error:
            failure = explain(error, what, self.where)
            if isinstance(failure, Unreachable) and status_of(error) is None:
                silent[self.endpoint] = time.monotonic(), failure.found or failure.what
            raise failure from error


def _bar(total: int, description: str) -> Any:
    from huggingface_hub.utils import tqdm

    # The client's own bar: on stderr, shown on a terminal, and off with HF_HUB_DISABLE_PROGRESS_BARS.
    disable = True if sys.stderr is None else None
    return tqdm(
        total=total, unit="B", unit_scale=True, desc=description, name="twinkle.download", disable=disable
    )


class _Stopped(Exception):
    """Nobody waits for the download any longer."""


def _for_each(files: list[HubFile], fetch: Callable[[HubFile], None], stop: threading.Event) -> None:
    """Fetch files in several threads that end with the process; an interrupt does not wait for them.

    The threads of a pool are joined by the interpreter at its end: Ctrl-C would take as long as the download.

    Raises:
        Exception: That of the first file that failed.
    """
    waiting: SimpleQueue[HubFile] = SimpleQueue()
    ended: SimpleQueue[Exception | None] = SimpleQueue()

    def work() -> None:
        while not stop.is_set():
            try:
                fetch(waiting.get_nowait())
            except Empty:
                return
            except Exception as error:
                ended.put(error)
            else:
                ended.put(None)

    for file in files:
        waiting.put(file)
    threads = [
        threading.Thread(target=work, name=f"twinkle-download-{number}", daemon=True)
        for number in range(min(_WORKERS, len(files)))
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in files:
            error = ended.get()
            if error is not None:
                raise error
    except Exception:
        stop.set()
        for thread in threads:  # what they write, the next attempt would write as well
            thread.join()
        raise
    finally:
        stop.set()


def _part_of(bar: Any, stop: threading.Event) -> Callable[..., Any]:
    """A stand-in for the bar of one file: what it is told, the bar of the whole download shows.

    Args:
        bar: The bar of the whole download.
        stop: Once it is set, the next part that arrives ends the download of the file.
    """
    lock = forks.lock()

    class Part:
        # The methods that the client calls on a bar that stands for many files.
        def __init__(self, *args: object, **options: Any) -> None:
            self.update(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise _Stopped
            with lock:
                bar.update(n)

        def update_transfer(self, n: float | None = 1) -> None:
            """The same bytes once more, as they came over the network."""

        def set_postfix_str(self, text: str = "", refresh: bool = False) -> None:
            pass

        set_transfer_postfix_str = set_postfix_str

        def refresh(self) -> None:
            pass

        def close(self) -> None:
            pass

        def __enter__(self) -> Part:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

    return Part
