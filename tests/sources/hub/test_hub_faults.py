"""Each fault between here and a loaded kernel: one error in words, and nothing torn on disk."""

from __future__ import annotations

import errno
import os
import shutil
import socket

import pytest
from loopback_hub import Repo, kernel_files

from twinkle.errors import MissingDependencyError, SourceError
from twinkle.runtime import runtime

STAGES = {
    "trust": "organizations/acme",
    "versions": "/refs",
    "builds": "/tree/",
    "head": r"HEAD .*/resolve/.*layers\.py",
    "body": r"GET .*/resolve/.*layers\.py",
}
STATUS_WORDS = {
    401: "asks for a login",
    403: "refuses access",
    404: "no such repository, revision or file",
    429: "limits requests",
    500: "answers 500",
}
HUB_FAULTS = [
    *(
        (stage, "status", status, words)
        for stage in list(STAGES)[1:]
        for status, words in STATUS_WORDS.items()
    ),
    *((stage, "drop", 0, "cannot be reached") for stage in list(STAGES)[1:]),
    *((stage, "reset", 0, "cannot be reached") for stage in list(STAGES)[1:]),
    *((stage, "slow", 1.0, "too slow|cannot be reached") for stage in list(STAGES)[1:]),
    *(("trust", "status", status, "could not be asked") for status in (401, 403, 429, 500)),
    ("trust", "drop", 0, "could not be asked"),
    ("trust", "slow", 1.0, "could not be asked"),
    ("builds", "truncate", 0, "cannot be reached"),
    ("builds", "corrupt", 0, "something answers in the Hub's place"),
    ("body", "truncate", 0, "cannot be reached"),
    ("body", "corrupt", 0, "arrived damaged"),
]


def complete(error: SourceError) -> bool:
    """It says what, where, what was found and what to do."""
    return bool(error.what and error.where and error.found and error.fix)


@pytest.fixture
def impatient(monkeypatch):
    """A time-out that a slow Hub misses within a test."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)


@pytest.mark.parametrize(
    ("stage", "action", "value", "words"),
    HUB_FAULTS,
    ids=[f"{stage}-{action}{value or ''}" for stage, action, value, _ in HUB_FAULTS],
)
def test_fault_of_the_hub(hub, source, impatient, go_offline, stage, action, value, words):
    hub.fault(STAGES[stage], action, value)
    with pytest.raises(SourceError, match=words) as raised:
        source(version=1).load()
    assert complete(raised.value), str(raised.value)
    hub.faults.clear()
    with pytest.MonkeyPatch.context() as patch:
        from huggingface_hub import constants

        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        runtime.reset()
        commit = hub.repos["acme/my-kernel"].branches["v1"]
        with pytest.raises(SourceError, match=r"damaged in the cache|not in the cache"):
            source(revision=commit, trust_remote_code=True).load()
    runtime.reset()
    assert source(version=1).load().label == "v1"


@pytest.mark.parametrize("action", ["truncate", "corrupt"])
def test_damaged_large_file(hub, source, go_offline, action):
    files = kernel_files(files={"weights.bin": "x" * 5000})
    hub.repos["acme/my-kernel"] = Repo({"v1": files}, lfs=("build/torch-cpu/weights.bin",))
    hub.fault("GET .*weights.bin", action)
    with pytest.raises(SourceError, match=r"arrived damaged|cannot be reached"):
        source(version=1).load()
    hub.faults.clear()
    runtime.reset()
    assert source(version=1).load().label == "v1"


def test_download_that_arrives_damaged_once_is_fetched_again(hub, source):
    hub.fault(STAGES["body"], "corrupt", times=1)
    assert source(version=1).load().label == "v1"


def test_network_down(hub, source, monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(SourceError, match="cannot be reached") as raised:
        source(version=1, trust_remote_code=True).load()
    assert complete(raised.value)
    assert "HF_ENDPOINT" in str(raised.value)


def test_network_down_uses_what_is_in_the_cache_and_says_so(hub, source):
    source(version=1).load()
    runtime.reset()
    hub.fault(".", "drop")
    kernel = source(version=1)
    assert kernel.load().label == "v1"
    assert any("taken from the cache" in note for note in kernel.notes)


def test_network_down_is_not_waited_for_twice(hub, source):
    hub.repos["acme/other"] = Repo({"v1": kernel_files()})
    hub.fault(".", "drop")
    with pytest.raises(SourceError):
        source(version=1, trust_remote_code=True).load()
    asked = len(hub.requests)
    with pytest.raises(SourceError, match="did not answer a moment ago"):
        source(repo_id="acme/other", version=1, trust_remote_code=True).load()
    assert len(hub.requests) == asked


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["disk", "quota"])
def test_disk_full(hub, source, monkeypatch, code):
    from huggingface_hub import file_download

    def full(*args, **options):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", full)
        with pytest.raises(SourceError, match="the disk is full") as raised:
            source(version=1).load()
    assert complete(raised.value)
    assert source(version=1).load().label == "v1"


def test_disk_full_while_the_listing_is_written(hub, source, monkeypatch):
    from twinkle.sources.hub import cache as hub_cache

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(hub_cache, "write_whole", full)
        with pytest.raises(SourceError, match="the disk is full"):
            source(version=1).load()
    assert source(version=1).load().label == "v1"


def test_cache_that_is_no_directory(hub, source, cache):
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("in the way")
    with pytest.raises(SourceError, match="the cache cannot be written") as raised:
        source(version=1).load()
    assert complete(raised.value)


def test_cache_that_may_not_be_written(hub, source, monkeypatch):
    from pathlib import Path

    def refuse(self, *args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(SourceError, match="the cache cannot be written") as raised:
            source(version=1).load()
    assert "KERNELS_CACHE" in str(raised.value)
    assert source(version=1).load().label == "v1"


def test_cache_that_may_only_be_read_is_enough_when_it_is_full(hub, source, monkeypatch, go_offline):
    from pathlib import Path

    source(version=1).load()

    def refuse(self, *args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    runtime.reset()
    assert source(version=1).load().label == "v1"


def test_cache_that_vanished_is_filled_again(hub, source, cache):
    source(version=1).load()
    shutil.rmtree(cache)
    runtime.reset()
    assert source(version=1).load().label == "v1"


def test_cache_that_vanished_offline(hub, source, cache, go_offline):
    source(version=1).load()
    shutil.rmtree(cache)
    go_offline()
    with pytest.raises(SourceError, match="not in the cache"):
        source(version=1, trust_remote_code=True).load()


def test_cache_that_vanishes_between_download_and_import(hub, source, cache, monkeypatch):
    from twinkle.sources.hub import resolve as hub_resolve

    fetch = hub_resolve.fetch

    def fetch_and_lose(*args, **options):
        fetch(*args, **options)
        shutil.rmtree(cache)

    monkeypatch.setattr(hub_resolve, "fetch", fetch_and_lose)
    with pytest.raises(SourceError) as raised:
        source(version=1).load()
    assert complete(raised.value)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("torch-cuda", "backend (cuda) does not match|this machine takes"),
        ("torch21-cxx11-cpu-x86_64-linux", "Torch version|this machine takes"),
        ("torch213-cxx11-cpu-sparc-linux", "CPU (sparc)|this machine takes"),
        ("not-a-variant", "not the name of a build variant|this machine takes"),
    ],
)
def test_no_variant_for_this_machine(hub, source, variant, reason):
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(variant=variant)})
    with pytest.raises(SourceError, match="no build for this machine") as raised:
        source(version=1).load()
    assert any(part in str(raised.value) for part in reason.split("|")), str(raised.value)
    assert variant in str(raised.value)
    assert hub.count("GET .*resolve") == 0


def test_repository_without_any_build(hub, source):
    hub.repos["acme/my-kernel"] = Repo({"v1": {}})
    with pytest.raises(SourceError):
        source(version=1).load()


def test_variant_that_raises_on_import(hub, source):
    hub.repos["acme/my-kernel"] = Repo(
        {"v1": kernel_files(files={"__init__.py": "raise ValueError('no GPU')"})}
    )
    with pytest.raises(SourceError, match="raises when it is imported") as raised:
        source(version=1).load()
    assert "ValueError: no GPU" in str(raised.value)
    assert complete(raised.value)


def test_variant_that_ends_the_program_on_import(hub, source):
    files = kernel_files(files={"__init__.py": "raise SystemExit(3)"})
    hub.repos["acme/my-kernel"] = Repo({"v1": files})
    with pytest.raises(SourceError, match="SystemExit: 3"):
        source(version=1).load()


def test_variant_that_fails_to_import_is_imported_from_scratch_the_next_time(hub, source, monkeypatch):
    body = (
        "from . import layers\nimport os\nif os.environ.get('TWINKLE_TEST_BROKEN'): raise ValueError('no')\n"
    )
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files={"__init__.py": body})})
    kernel = source(version=1)
    monkeypatch.setenv("TWINKLE_TEST_BROKEN", "1")
    with pytest.raises(SourceError):
        kernel.load()
    monkeypatch.delenv("TWINKLE_TEST_BROKEN")
    assert kernel.load().label == "v1"


def test_layers_that_raise_on_import(hub, source):
    files = {"__init__.py": "", "layers.py": "raise RuntimeError('broken layers')"}
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files=files)})
    with pytest.raises(SourceError, match="broken layers"):
        source(version=1).load()


def test_variant_with_a_syntax_error(hub, source):
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files={"__init__.py": "def ("})})
    with pytest.raises(SourceError, match="SyntaxError"):
        source(version=1).load()


def test_variant_that_imports_what_is_not_installed(hub, source):
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files={"__init__.py": "import nowhere_at_all"})})
    with pytest.raises(MissingDependencyError, match="no module named nowhere_at_all") as raised:
        source(version=1).load()
    assert complete(raised.value)


def test_layers_that_import_what_is_not_installed(hub, source):
    files = {"__init__.py": "", "layers.py": "import nowhere_at_all"}
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files=files)})
    with pytest.raises(SourceError, match="nowhere_at_all"):
        source(version=1).load()


def test_python_dependency_that_is_not_installed(hub, source):
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(**{"python-depends": ["einops"]})})
    with pytest.raises(MissingDependencyError, match="einops") as raised:
        source(version=1).load()
    assert raised.value.fix == "pip install einops"


def test_python_dependency_that_kernels_does_not_know(hub, source):
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(**{"python-depends": ["numpy"]})})
    with pytest.raises(SourceError, match="numpy"):
        source(version=1).load()


def test_layer_that_is_not_exported(hub, source):
    with pytest.raises(SourceError, match="has no layer 'RmsNorm'") as raised:
        source("RmsNorm", version=1).load()
    assert "RMSNorm" in str(raised.value)


def test_function_that_is_not_exported(hub, source):
    with pytest.raises(SourceError, match="has no function 'silu_and_mull'") as raised:
        source("silu_and_mull", kind="function", version=1).load()
    assert "silu_and_mul" in str(raised.value)
