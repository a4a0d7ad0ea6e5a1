"""A Hub on this machine, a cache of its own for every test, and no waiting between attempts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytest.importorskip("kernels")

_spec = importlib.util.spec_from_file_location("loopback_hub", Path(__file__).parents[1] / "loopback_hub.py")
assert _spec is not None
assert _spec.loader is not None
loopback_hub = importlib.util.module_from_spec(_spec)
sys.modules.setdefault("loopback_hub", loopback_hub)
_spec.loader.exec_module(loopback_hub)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, no login, no waiting between attempts, and everything Twinkle remembers forgotten."""
    import huggingface_hub.utils._http as http
    from huggingface_hub import constants, file_download

    from twinkle.runtime import runtime
    from twinkle.sources.hub import client as hub_client

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in (
        "KERNELS_CACHE",
        "LOCAL_KERNELS",
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "HF_HUB_CACHE",
        "TWINKLE_LOCK",
    ):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "hf" / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
    for name in ("AGENT_HARNESSES_CACHE_PATH", "HF_STORED_TOKENS_PATH"):
        if hasattr(constants, name):
            monkeypatch.setattr(constants, name, str(tmp_path / "hf" / name))
    import time

    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.01))})
    monkeypatch.setattr(http, "time", impatient)
    monkeypatch.setattr(file_download, "time", impatient)
    monkeypatch.setattr(hub_client, "RETRY", hub_client.Retry(base=0.01, cap=0.02))
    modules = set(sys.modules)
    runtime.reset()
    yield root
    runtime.reset()
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The loopback Hub, with ``acme/my-kernel`` of one version by a trusted publisher."""
    from huggingface_hub import constants

    with loopback_hub.LoopbackHub() as server:
        server.repos["acme/my-kernel"] = loopback_hub.Repo({"v1": loopback_hub.kernel_files("v1")})
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def go_offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """As if the process had been started with ``HF_HUB_OFFLINE=1``."""

    def go() -> None:
        from huggingface_hub import constants

        from twinkle.runtime import runtime

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        runtime.reset()

    return go


@pytest.fixture
def source(cache: Path) -> Callable[..., Any]:
    """``source("RMSNorm", version=1)``: a layer of ``acme/my-kernel``."""

    def make(attr: str = "RMSNorm", repo_id: str = "acme/my-kernel", **options: Any) -> Any:
        from twinkle.sources.hub.source import HubSource

        options.setdefault("kind", "layer")
        options.setdefault("where", "twinkle.toml:3 (layers.norm)")
        return HubSource(repo_id, attr, **options)

    return make


@pytest.fixture
def hand_made(cache: Path) -> Callable[..., Path]:
    """``hand_made(files)`` puts a repository into the cache as plain files, and gives its folder."""

    def make(
        files: dict[str, bytes],
        *,
        repo_id: str = "acme/my-kernel",
        refs: tuple[str, ...] = ("v1", "main"),
        repo_type: str = "kernel",
        commit: str = "a" * 40,
    ) -> Path:
        folder = cache / f"{repo_type}s--{repo_id.replace('/', '--')}"
        for path, body in files.items():
            target = folder / "snapshots" / commit / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(body)
        for ref in refs:
            (folder / "refs").mkdir(parents=True, exist_ok=True)
            (folder / "refs" / ref).write_text(commit)
        return folder

    return make
