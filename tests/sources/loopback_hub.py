"""A Hub on 127.0.0.1 with a fault switch: as much of the real protocol as the real client asks for."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

LAYERS = """
import torch.nn as nn

class RMSNorm(nn.Module):
    can_torch_compile = True
    has_backward = True
    label = {label!r}

    def forward(self, hidden_states):
        return hidden_states
"""
INIT = """
from . import layers

def silu_and_mul(x):
    return {label!r}
"""
_metadata_ids = 0


def metadata(name: str = "my-kernel", **changes: object) -> str:
    """``metadata.json`` with an id of its own."""
    global _metadata_ids
    _metadata_ids += 1
    document = {
        "name": name,
        "id": f"_{name.replace('-', '_')}_{_metadata_ids:07d}",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
        **changes,
    }
    return json.dumps(document)


def kernel_files(
    label: str = "v1", *, variant: str = "torch-cpu", files: Mapping[str, str] | None = None, **meta: object
) -> dict[str, bytes]:
    """The files of a repository with one variant."""
    variant_files = {
        "metadata.json": metadata(**meta),
        "__init__.py": INIT.format(label=label),
        "layers.py": LAYERS.format(label=label),
        **(files or {}),
    }
    return {f"build/{variant}/{path}": textwrap.dedent(text).encode() for path, text in variant_files.items()}


def blob_of(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repo:
    """A repository: commits with their files, branches and tags.

    Args:
        branches: Files by branch; ``main`` is added with the last one's when it is not among them.
        tags: Files by tag.
        repo_type: ``kernel`` or ``model``.
        lfs: Paths that are stored as LFS objects.
    """

    def __init__(
        self,
        branches: Mapping[str, Mapping[str, bytes]],
        *,
        tags: Mapping[str, Mapping[str, bytes]] | None = None,
        repo_type: str = "kernel",
        lfs: tuple[str, ...] = (),
    ) -> None:
        self.repo_type = repo_type
        self.lfs = lfs
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches = {name: self.commit(files) for name, files in branches.items()}
        self.tags = {name: self.commit(files) for name, files in (tags or {}).items()}
        if "main" not in self.branches and branches:
            self.branches = {"main": list(self.branches.values())[-1], **self.branches}

    def commit(self, files: Mapping[str, bytes]) -> str:
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = {"README.md": b"# A kernel\n", **files}
        return digest

    def resolve(self, revision: str) -> str | None:
        found = self.branches.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)


class Fault:
    """What goes wrong with requests that match.

    Args:
        path: A pattern found in ``METHOD /path``.
        action: ``status``, ``drop``, ``reset``, ``truncate``, ``corrupt``, ``slow`` or ``stall``.
        value: The status, or the seconds.
        times: How often; ``None`` is always.
    """

    def __init__(self, path: str, action: str, value: float = 0, times: int | None = None) -> None:
        self.path = re.compile(path)
        self.action = action
        self.value = value
        self.left = times
        self.headers: dict[str, str] = {}


class LoopbackHub:
    """The server; a context manager.

    Attributes:
        url: For ``HF_ENDPOINT``.
        repos: By ``publisher/name``.
        trusted: The publishers that are trusted.
        requests: ``METHOD /path`` of every request, in order.
        faults: In force now.
        page_size: Entries of a listing in one answer; ``None`` is all.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.trusted = {"acme"}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.page_size: int | None = None
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> LoopbackHub:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(
        self,
        path: str,
        action: str,
        value: float = 0,
        times: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> Fault:
        fault = Fault(path, action, value, times)
        fault.headers = headers or {}
        self.faults.append(fault)
        return fault

    def count(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.path.search(request) and fault.left != 0:
                    if fault.left is not None:
                        fault.left -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    # Otherwise every answer waits 40 ms for an acknowledgement.
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.fault = self.hub.fault_for(f"{self.command} {unquote(self.path)}")
        fault = self.fault
        if fault is not None and fault.action == "status":
            self._send(int(fault.value), b'{"error": "fault"}', fault.headers)
            return
        if fault is not None and fault.action in ("drop", "reset"):
            if fault.action == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
            return
        if fault is not None and fault.action == "slow":
            time.sleep(fault.value)
        path = unquote(urlsplit(self.path).path)
        for pattern, method in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                getattr(self, method)(**match.groupdict())
                return
        self._send(404, b'{"error": "no such route"}')

    def _repo(self, kind: str, repo_id: str) -> Repo | None:
        repo = self.hub.repos.get(repo_id)
        if repo is None or f"{repo.repo_type}s" != kind:
            self._send(401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def organization(self, name: str) -> None:
        trusted = name in self.hub.trusted
        overview = {"name": name, "fullname": name, "avatarUrl": "", "trustedKernelPublisher": trusted}
        self._json(overview)

    def refs(self, kind: str, repo: str) -> None:
        found = self._repo(kind, repo)
        if found is None:
            return
        self._json(
            {
                "branches": [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                    for name, commit in found.branches.items()
                ],
                "tags": [
                    {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}
                    for name, commit in found.tags.items()
                ],
                "converts": [],
            }
        )

    def revision(self, kind: str, repo: str, revision: str) -> None:
        found = self._repo(kind, repo)
        commit = found.resolve(revision) if found else None
        if found is None:
            return
        if commit is None:
            self._send(404, b'{"error": "Invalid rev"}', {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": path} for path in found.commits[commit]]
        self._json({"id": repo, "sha": commit, "siblings": siblings})

    def tree(self, kind: str, repo: str, revision: str, path: str | None = None) -> None:
        found = self._repo(kind, repo)
        commit = found.resolve(revision) if found else None
        if found is None:
            return
        if commit is None:
            self._send(404, b'{"error": "Invalid rev"}', {"X-Error-Code": "RevisionNotFound"})
            return
        prefix = f"{path}/" if path else ""
        files = {name: body for name, body in found.commits[commit].items() if name.startswith(prefix)}
        if prefix and not files:
            self._send(404, b'{"error": "no such path"}', {"X-Error-Code": "EntryNotFound"})
            return
        entries: dict[str, dict[str, object]] = {}
        recursive = "recursive=true" in self.path.lower()
        for name, body in files.items():
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                folder = prefix + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            entry: dict[str, object] = {
                "type": "file",
                "oid": blob_of(body),
                "size": len(body),
                "path": name,
            }
            if name in found.lfs:
                entry["lfs"] = {
                    "oid": hashlib.sha256(body).hexdigest(),
                    "size": len(body),
                    "pointerSize": 130,
                }
            entries[name] = entry
        if not recursive:
            entries = {name: e for name, e in entries.items() if "/" not in name[len(prefix) :]}
        names = sorted(entries)
        query = parse_qs(urlsplit(self.path).query)
        start = int(query.get("cursor", ["0"])[0])
        size = self.hub.page_size or len(names)
        headers = {}
        if start + size < len(names):
            here = re.sub(r"&cursor=\d+", "", self.path)
            headers["Link"] = f'<{self.hub.url}{here}&cursor={start + size}>; rel="next"'
        page = [entries[name] for name in names[start : start + size]]
        self._send(200, json.dumps(page).encode(), headers)

    def file(self, repo: str, revision: str, path: str, kind: str = "models") -> None:
        found = self._repo(kind, repo)
        commit = found.resolve(revision) if found else None
        if found is None:
            return
        if commit is None or path not in found.commits[commit]:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit or ""}
            self._send(404, b'{"error": "no such file"}', headers)
            return
        body = found.commits[commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob_of(body)}"', "Accept-Ranges": "bytes"}
        if path in found.lfs:
            digest = hashlib.sha256(body).hexdigest()
            headers.update({"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body))})
        status = 200
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match and int(match[1]):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
        self._send(status, body, headers)

    def _json(self, document: object) -> None:
        self._send(200, json.dumps(document).encode())

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        fault = self.fault.action if self.fault is not None else ""
        length = len(body)
        if fault == "corrupt":
            body = bytes(byte ^ 1 for byte in body)
        if fault in ("truncate", "stall"):
            body = body[: length // 2]
        try:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
                self.wfile.flush()
                if fault == "stall":
                    time.sleep(self.fault.value if self.fault is not None else 0)
                if fault in ("truncate", "stall"):
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            self.close_connection = True


_ID = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    (r"/api/organizations/(?P<name>[^/]+)/overview", "organization"),
    (rf"/api/(?P<kind>kernels|models)/{_ID}/refs", "refs"),
    (rf"/api/(?P<kind>kernels|models)/{_ID}/revision/(?P<revision>.+)", "revision"),
    (rf"/api/(?P<kind>kernels|models)/{_ID}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    (rf"/(?P<kind>kernels)/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "file"),
    (rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "file"),
)
