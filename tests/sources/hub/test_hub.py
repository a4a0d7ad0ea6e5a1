"""A kernel of the Hub, from the cache and from the loopback Hub: what is asked for, and what is kept."""

from __future__ import annotations

import pytest
from loopback_hub import Repo, kernel_files

from twinkle.errors import SourceError
from twinkle.runtime import runtime


@pytest.mark.parametrize(
    "options", [{"version": 1}, {"revision": "v1"}, {"revision": "main"}, {"revision": "a" * 40}, {}], ids=str
)
def test_layer_loads_offline_from_a_hand_made_cache(hand_made, go_offline, source, options):
    hand_made(kernel_files("cached"))
    go_offline()
    assert source(**options, trust_remote_code=True).load().label == "cached"


def test_layer_loads_offline_from_a_cache_of_the_older_layout(hand_made, go_offline, source):
    """Before there were repositories of kernels they were models."""
    hand_made(kernel_files("cached"), repo_type="model")
    go_offline()
    assert source(version=1, trust_remote_code=True).load().label == "cached"


def test_kernels_cache_goes_before_the_cache_of_the_client(
    hub, source, cache, tmp_path, monkeypatch, go_offline
):
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "kernels"))
    source(version=1).load()
    assert not cache.exists()
    assert list((tmp_path / "kernels").rglob("layers.py"))


def test_function_loads_offline_from_a_hand_made_cache(hand_made, go_offline, source):
    hand_made(kernel_files("cached"))
    go_offline()
    function = source("silu_and_mul", kind="function", version=1, trust_remote_code=True).load()
    assert function(0) == "cached"


def test_function_that_is_a_layer_class_is_called_like_a_function(hub, source):
    body = "import torch.nn as nn\nclass Twice(nn.Module):\n    def forward(self, x):\n        return 2 * x\n"
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files={"__init__.py": body})})
    assert source("Twice", kind="function", version=1).load()(21) == 42


def test_layer_that_is_no_class_is_refused(hub, source):
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files={"layers.py": "RMSNorm = 3"})})
    with pytest.raises(SourceError, match="is not a layer class"):
        source(version=1).load()


def test_layer_loads_online(hub, source):
    assert source(version=1).load().label == "v1"


def test_repository_of_models_loads_online(hub, source):
    from twinkle.sources.hub.kernels_package import kernels_package

    if "model" not in kernels_package().repo_types:
        pytest.skip("this version of kernels knows repositories of kernels only")
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files("model")}, repo_type="model")
    assert source(version=1).load().label == "model"


@pytest.mark.parametrize("options", [{"version": 1}, {"revision": "v1"}, {}, {"revision": "main"}], ids=str)
def test_layer_loads_offline_right_after_a_normal_download(hub, source, go_offline, options):
    hub.repos["acme/my-kernel"] = Repo({"v1": {**kernel_files("v1"), **kernel_files(variant="torch-cuda")}})
    source(**options).load()
    go_offline()
    before = len(hub.requests)
    assert source(**options).load().label == "v1"
    assert len(hub.requests) == before


def test_only_the_variant_of_this_machine_is_fetched(hub, source):
    files = {**kernel_files(), **kernel_files(variant="torch-cuda"), **kernel_files(variant="torch-rocm")}
    hub.repos["acme/my-kernel"] = Repo({"v1": files})
    source(version=1).load()
    assert hub.count("resolve/.*torch-cpu") == 6
    assert hub.count("resolve/.*(torch-cuda|torch-rocm|README)") == 0


def test_what_is_in_the_cache_needs_two_small_questions(hub, source):
    source(version=1).load()
    runtime.reset()
    hub.requests.clear()
    source(version=1).load()
    types = hub.count("/refs")
    assert hub.count("organizations") == 1
    assert len(hub.requests) == types + 1


def test_what_is_in_the_cache_and_pinned_and_trusted_needs_no_question(hub, source):
    from twinkle.sources.hub.kernels_package import kernels_package

    if "model" in kernels_package().repo_types:
        pytest.skip("which type the repository has is asked for")
    commit = hub.repos["acme/my-kernel"].branches["v1"]
    source(revision=commit).load()
    runtime.reset()
    hub.requests.clear()
    source(revision=commit, trust_remote_code=True).load()
    assert hub.requests == []


def test_nothing_is_asked_before_the_first_load(hub, source):
    source(version=1).describe()
    assert hub.requests == []


def test_listing_of_several_pages_is_read_to_its_end(hub, source):
    hub.page_size = 2
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files={f"part{n}.py": "" for n in range(7)})})
    kernel = source(version=1)
    kernel.load()
    assert (kernel.resolved.variant_dir / "part6.py").exists()


def test_large_files_load(hub, source):
    files = kernel_files(files={"weights.bin": "x" * 5000})
    hub.repos["acme/my-kernel"] = Repo({"v1": files}, lfs=("build/torch-cpu/weights.bin",))
    kernel = source(version=1)
    kernel.load()
    assert (kernel.resolved.variant_dir / "weights.bin").stat().st_size == 5000


@pytest.fixture
def tampered(hub, source):
    """A kernel in the cache whose code was changed there."""
    kernel = source(version=1)
    kernel.load()
    layers = kernel.resolved.variant_dir / "layers.py"
    layers.write_text(layers.read_text().replace("'v1'", "'x1'"))
    runtime.reset()
    import sys

    getattr(sys.modules.get("kernels.importer"), "_loaded_kernels", {}).clear()


def test_file_that_was_changed_in_the_cache_is_refused_offline(tampered, source, go_offline):
    go_offline()
    with pytest.raises(SourceError, match="damaged in the cache") as raised:
        source(version=1).load()
    assert "layers.py" in str(raised.value)


def test_file_that_was_changed_in_the_cache_is_fetched_again_online(tampered, hub, source):
    hub.requests.clear()
    assert source(version=1).load().label == "v1"
    assert hub.count("GET .*resolve.*layers.py") == 1


def test_newer_commit_of_a_version_is_fetched(hub, source):
    source(version=1).load()
    repo = hub.repos["acme/my-kernel"]
    repo.branches["v1"] = repo.commit(kernel_files("v1 again"))
    runtime.reset()
    assert source(version=1).load().label == "v1 again"


def test_version_stays_the_same_within_a_process(hub, source):
    source(version=1).load()
    repo = hub.repos["acme/my-kernel"]
    repo.branches["v1"] = repo.commit(kernel_files("v1 again"))
    assert source(version=1).load().label == "v1"


def test_listing_that_leads_out_of_the_cache_is_refused(hub, source):
    hub.repos["acme/my-kernel"] = Repo({"v1": {**kernel_files(), "build/torch-cpu/../../../evil.py": b""}})
    with pytest.raises(SourceError, match="unsafe path"):
        source(version=1).load()
