"""twinkle.lock: made, checked, obeyed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
from loopback_hub import Repo, kernel_files

from twinkle import config
from twinkle.cli import download as download_command
from twinkle.cli import lock as lock_command
from twinkle.errors import ConfigError, SourceError
from twinkle.runtime import runtime
from twinkle.sources.hub import lockfile as locks
from twinkle.sources.hub.lockfile import Lock, LockedKernel

CONFIG = """
[layers.norm]
target = "my_pkg:Norm"
repo_id = "acme/my-kernel"
layer_name = "RMSNorm"
version = 1

[functions.silu]
target_module = "my_pkg"
repo_id = "acme/my-kernel"
func_name = "silu_and_mul"
"""


@pytest.fixture
def project(hub, tmp_path, monkeypatch):
    """A directory with a configuration of two Hub kernels."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "twinkle.toml").write_text(CONFIG)
    monkeypatch.chdir(folder)
    for name in (
        "TWINKLE_CONFIG",
        "TWINKLE_LAYERS",
        "TWINKLE_FUNCTIONS",
        "TWINKLE_TRUST_REMOTE_CODE",
        "TWINKLE_LOCK",
    ):
        monkeypatch.delenv(name, raising=False)
    return folder


def run(command, *words):
    return command.main([*words, "twinkle.toml"])


def sources(folder):
    layers, _, functions = config.load([str(folder / "twinkle.toml")], {}, cwd=str(folder)).records()
    return [kernel.source for kernel in (*layers, *functions)]


def document(folder):
    return json.loads((folder / "twinkle.lock").read_text())


def test_lock_has_commit_and_digest_of_every_file(project, hub):
    import hashlib

    assert run(lock_command) == 0
    repo = hub.repos["acme/my-kernel"]
    commit = repo.branches["v1"]
    files = repo.commits[commit]
    digests = {
        path.removeprefix("build/torch-cpu/"): hashlib.sha256(body).hexdigest()
        for path, body in files.items()
        if path.startswith("build/")
    }
    entry = {
        "repo_id": "acme/my-kernel",
        "repo_type": "kernel",
        "commit": commit,
        "variants": {"torch-cpu": digests},
    }
    assert document(project) == {
        "format": 1,
        "kernels": [{**entry, "requested": "newest"}, {**entry, "requested": "version:1"}],
    }


def test_lock_is_the_same_bytes_every_time(project):
    run(lock_command)
    first = (project / "twinkle.lock").read_bytes()
    run(lock_command)
    assert (project / "twinkle.lock").read_bytes() == first


def test_locking_imports_nothing(project, hub):
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files={"__init__.py": "raise SystemExit(3)"})})
    assert run(lock_command) == 0


def test_untrusted_publisher_is_not_locked(project, hub):
    hub.trusted.clear()
    with pytest.raises(SourceError, match="not trusted"):
        run(lock_command)
    assert not (project / "twinkle.lock").exists()


def test_check_is_quiet_about_a_lock_that_is_up_to_date(project, capsys):
    run(lock_command)
    assert run(lock_command, "--check") == 0
    assert "up to date" in capsys.readouterr().out


def test_check_finds_a_version_that_moved(project, hub, capsys):
    run(lock_command)
    before = (project / "twinkle.lock").read_bytes()
    repo = hub.repos["acme/my-kernel"]
    repo.branches["v1"] = repo.commit(kernel_files("v1 again"))
    assert run(lock_command, "--check") == 1
    assert "is now" in capsys.readouterr().err
    assert (project / "twinkle.lock").read_bytes() == before


def test_check_finds_a_kernel_that_is_not_locked(project, capsys):
    run(lock_command)
    (project / "twinkle.toml").write_text(CONFIG.replace("version = 1", 'version = ">=1"'))
    assert run(lock_command, "--check") == 1
    err = capsys.readouterr().err
    assert "+ acme/my-kernel version:>=1" in err
    assert "- acme/my-kernel version:1: no longer asked for" in err


def test_check_without_a_lock_fails(project):
    assert run(lock_command, "--check") == 1
    assert not (project / "twinkle.lock").exists()


def test_configuration_without_hub_kernels_has_nothing_to_lock(project, capsys):
    (project / "twinkle.toml").write_text("")
    assert run(lock_command) == 0
    assert "nothing to lock" in capsys.readouterr().out


def test_lock_cannot_be_made_offline(project, go_offline):
    go_offline()
    with pytest.raises(SourceError, match="cannot be locked offline"):
        run(lock_command)


def test_builds_of_other_machines_are_locked_when_asked_for(project, hub):
    files = {**kernel_files(), **kernel_files(variant="torch-cuda")}
    hub.repos["acme/my-kernel"] = Repo({"v1": files}, lfs=("build/torch-cuda/layers.py",))
    run(lock_command, "--all-variants")
    assert sorted(document(project)["kernels"][0]["variants"]) == ["torch-cpu", "torch-cuda"]
    assert hub.count("GET .*torch-cuda/layers.py") == 0


def test_build_that_is_named_is_locked_as_well_and_kept(project, hub):
    hub.repos["acme/my-kernel"] = Repo({"v1": {**kernel_files(), **kernel_files(variant="torch-cuda")}})
    run(lock_command, "--variant", "torch-cuda")
    run(lock_command)
    assert sorted(document(project)["kernels"][0]["variants"]) == ["torch-cpu", "torch-cuda"]


def test_build_that_the_repository_lacks_cannot_be_locked(project):
    with pytest.raises(SourceError, match="no variant torch-rocm"):
        run(lock_command, "--variant", "torch-rocm")


def test_loading_obeys_the_lock_when_the_version_moves(project, hub):
    run(lock_command)
    repo = hub.repos["acme/my-kernel"]
    repo.branches["v1"] = repo.commit(kernel_files("v1 again"))
    runtime.reset()
    layer, function = sources(project)
    assert layer.load().label == "v1"
    assert function.load()(0) == "v1"
    assert any("its digests are right" in note for note in layer.notes)


def test_locked_kernel_is_fetched_without_asking_for_versions(project, hub, cache):
    run(lock_command)
    shutil.rmtree(cache)
    runtime.reset()
    hub.requests.clear()
    assert sources(project)[0].load().label == "v1"
    assert hub.count("/refs|organizations|/tree/") == 0


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
@pytest.mark.parametrize("change", ["changed", "added", "truncated"])
def test_file_that_differs_from_the_lock_is_refused_before_it_is_imported(
    project, cache, go_offline, offline, change
):
    run(lock_command)
    init = next(cache.rglob("torch-cpu/__init__.py"))
    if change == "changed":
        init.write_text("raise SystemExit(3)")
    elif change == "added":
        (init.parent / "extra.py").write_text("")
    else:
        init.write_text(init.read_text()[:-5])
    runtime.reset()
    if offline:
        go_offline()
    with pytest.raises(SourceError, match="differs from the lock"):
        sources(project)[0].load()


def test_download_that_differs_from_the_lock_is_refused(project, hub, cache):
    run(lock_command)
    shutil.rmtree(cache)
    runtime.reset()
    hub.fault(r"GET .*/resolve/.*layers\.py", "corrupt")
    with pytest.raises(SourceError, match="arrived damaged"):
        sources(project)[0].load()


def test_kernel_that_is_not_locked_is_refused(project):
    run(lock_command)
    (project / "twinkle.toml").write_text(CONFIG.replace("version = 1", 'version = ">=1"'))
    with pytest.raises(SourceError, match="is not locked") as raised:
        sources(project)[0].load()
    assert "version:1" in str(raised.value)


def test_untrusted_kernel_that_is_locked_loads_offline(project, hub, go_offline):
    hub.trusted.clear()
    (project / "twinkle.toml").write_text("[twinkle]\ntrust_remote_code = true\n" + CONFIG)
    run(lock_command)
    (project / "twinkle.toml").write_text(CONFIG)
    go_offline()
    assert sources(project)[0].load().label == "v1"


def test_local_kernels_does_not_replace_a_locked_kernel(project, tmp_path, monkeypatch):
    run(lock_command)
    for path, body in kernel_files("local").items():
        target = tmp_path / "local" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(body)
    monkeypatch.setenv("LOCAL_KERNELS", f"acme/my-kernel={tmp_path / 'local'}")
    runtime.reset()
    assert sources(project)[0].load().label == "v1"


def test_lock_of_another_machine_says_what_to_do(project):
    run(lock_command)
    written = document(project)
    for kernel in written["kernels"]:
        kernel["variants"] = {"torch-cuda": kernel["variants"]["torch-cpu"]}
    (project / "twinkle.lock").write_text(json.dumps(written))
    with pytest.raises(SourceError, match="--all-variants"):
        sources(project)[0].load()


def test_dependencies_are_locked_as_well(project, hub, go_offline, cache):
    pytest.importorskip("kernels.validate")
    body = "from kernels import get_kernel_dep\nget_kernel_dep('acme/needed')\nfrom . import layers\n"
    depends = [{"repo-id": "acme/needed", "version": 1}]
    hub.repos["acme/needed"] = Repo({"v1": kernel_files("needed")})
    files = kernel_files(files={"__init__.py": body}, **{"kernel-depends": depends})
    hub.repos["acme/my-kernel"] = Repo({"v1": files})
    run(lock_command)
    assert {kernel["repo_id"] for kernel in document(project)["kernels"]} == {"acme/my-kernel", "acme/needed"}
    go_offline()
    assert sources(project)[0].load().label == "v1"
    needed = next(path for path in cache.rglob("layers.py") if "acme--needed" in str(path))
    needed.write_text("")
    runtime.reset()
    with pytest.raises(SourceError, match=r"acme/needed.* differs from the lock"):
        sources(project)[0].load()


def test_download_fills_an_empty_cache_for_machines_without_a_network(project, cache, go_offline):
    run(lock_command)
    shutil.rmtree(cache)
    runtime.reset()
    assert run(download_command) == 0
    go_offline()
    assert sources(project)[0].load().label == "v1"


def test_download_fetches_the_locked_builds_of_other_machines(project, hub, cache):
    hub.repos["acme/my-kernel"] = Repo({"v1": {**kernel_files(), **kernel_files(variant="torch-cuda")}})
    run(lock_command, "--all-variants")
    shutil.rmtree(cache)
    runtime.reset()
    run(download_command)
    assert {path.parent.name for path in cache.rglob("layers.py")} == {"torch-cpu", "torch-cuda"}


def test_download_without_a_lock_is_enough_for_offline(project, go_offline):
    assert run(download_command) == 0
    go_offline()
    layer, function = sources(project)
    assert layer.load().label == "v1"
    assert function.load()(0) == "v1"


def test_download_refuses_an_unlocked_kernel(project):
    run(lock_command)
    (project / "twinkle.toml").write_text(CONFIG.replace("version = 1", 'version = ">=1"'))
    with pytest.raises(SourceError, match="is not locked"):
        run(download_command)


def test_lock_that_is_given_counts_in_place_of_the_one_beside(project, tmp_path):
    given = tmp_path / "given.lock"
    run(lock_command, "--lock", str(given))
    (project / "twinkle.lock").write_text("{}")
    with locks.use(str(given)):
        assert sources(project)[0].load().label == "v1"


def test_lock_of_the_environment_counts_in_place_of_the_one_beside(project, tmp_path, monkeypatch):
    given = tmp_path / "given.lock"
    run(lock_command, "--lock", str(given))
    (project / "twinkle.lock").write_text("{}")
    monkeypatch.setenv("TWINKLE_LOCK", str(given))
    assert sources(project)[0].load().label == "v1"


def test_lock_of_the_environment_that_is_not_there_locks_everything(project, tmp_path, monkeypatch):
    monkeypatch.setenv("TWINKLE_LOCK", str(tmp_path / "nowhere.lock"))
    with pytest.raises(SourceError, match="the lock cannot be read"):
        sources(project)[0].load()


@pytest.mark.parametrize("command", [lock_command, download_command])
def test_lock_that_is_a_switch_is_no_path(project, command):
    with pytest.raises(ConfigError, match="--lock: not a path"):
        run(command, "--lock", "1")
    assert not (project / "1").exists()


def test_lock_of_the_environment_that_is_a_switch_is_no_path(project, monkeypatch):
    source = sources(project)[0]
    monkeypatch.setenv("TWINKLE_LOCK", "1")
    with pytest.raises(ConfigError, match="TWINKLE_LOCK: not a path"):
        source.load()


def test_lock_beside_the_working_directory_alone_does_not_count(project, monkeypatch):
    monkeypatch.setenv(
        "TWINKLE_LAYERS", '[norm]\ntarget = "my_pkg:Norm"\nrepo_id = "acme/my-kernel"\nlayer_name = "RMSNorm"'
    )
    (project / "twinkle.lock").write_text("{}")
    import os

    layers, _, _ = config.load([], dict(os.environ), cwd=str(project)).records()
    assert layers[0].source.load().label == "v1"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 2, "kernels": []}',
        '{"format": 1, "kernels": [{}]}',
        '{"format": 1, "kernels": [{"repo_id": "a/b", "requested": "x", "commit": "..", "variants": {}}]}',
        json.dumps(
            {
                "format": 1,
                "kernels": [
                    {
                        "repo_id": "a/b",
                        "requested": "x",
                        "commit": "a" * 40,
                        "variants": {"../x": {"f": "0" * 64}},
                    }
                ],
            }
        ),
        json.dumps(
            {
                "format": 1,
                "kernels": [
                    {
                        "repo_id": "a/b",
                        "requested": "x",
                        "commit": "a" * 40,
                        "variants": {"v": {"../f": "0" * 64}},
                    }
                ],
            }
        ),
    ],
)
def test_lock_that_is_malformed_locks_everything(project, text):
    (project / "twinkle.lock").write_text(text)
    with pytest.raises(SourceError) as raised:
        sources(project)[0].load()
    assert raised.value.where.endswith("twinkle.lock")
    assert "twinkle lock" in raised.value.fix


def _entry(**changes):
    entry = {"repo_id": "a/b", "requested": "x", "commit": "a" * 40, "variants": {"v": {"f": "0" * 64}}}
    return {**entry, **changes}


def _lock(*entries):
    return json.dumps({"format": 1, "kernels": list(entries)})


@pytest.mark.parametrize(
    "text",
    [
        _lock(_entry(), _entry()),
        '{"format": 1, "kernels": [], "kernels": []}',
        _lock(_entry()).replace('"f":', '"f": "' + "1" * 64 + '", "f":'),
        _lock(_entry(variants={"v": {"/f": "0" * 64}})),
        _lock(_entry(variants={"v": {"a/../../f": "0" * 64}})),
        _lock(_entry(variants={"v": {"a//f": "0" * 64}})),
        _lock(_entry(variants={"v": {"C:f": "0" * 64}})),
        _lock(_entry(variants={"v": {"f\0": "0" * 64}})),
        _lock(_entry(variants={"v/w": {"f": "0" * 64}})),
        _lock(_entry(variants={"v": {"f": 7}})),
        "[" * 200_000,
        '{"format": ' + "1" * 5000 + "}",
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
)
def test_lock_that_says_two_things_or_leads_elsewhere_locks_everything(project, text):
    data = text if isinstance(text, bytes) else text.encode()
    (project / "twinkle.lock").write_bytes(data)
    with pytest.raises(SourceError, match=r"the lock (is malformed|cannot be read)"):
        sources(project)[0].load()


@pytest.mark.parametrize("odd", ["pipe", "device", "folder", "huge", "loop", "dangling"])
def test_lock_that_is_no_file_locks_everything_at_once(project, odd):
    lock = project / "twinkle.lock"
    if odd == "pipe":
        os.mkfifo(lock)
    elif odd == "folder":
        lock.mkdir()
    elif odd == "huge":
        lock.touch()
        os.truncate(lock, 1 << 40)
    else:
        lock.symlink_to({"device": "/dev/zero", "loop": lock.name, "dangling": "nowhere"}[odd])
    with pytest.raises(SourceError, match="the lock cannot be read"):
        sources(project)[0].load()


def test_variant_that_holds_a_link_to_a_directory_is_refused(project, cache, tmp_path):
    run(lock_command)
    assert sources(project)[0].load().label == "v1"
    runtime.reset()
    (layers,) = cache.rglob("layers.py")
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "__init__.py").write_text("raise SystemExit")
    (layers.parent / "layers").symlink_to(planted)
    with pytest.raises(SourceError, match="layers: not in the lock"):
        sources(project)[0].load()


def test_variant_that_became_a_pipe_is_refused_at_once(project, cache):
    run(lock_command)
    (layers,) = cache.rglob("layers.py")
    variant = layers.parent
    shutil.rmtree(variant)
    os.mkfifo(variant)
    with pytest.raises(SourceError):
        sources(project)[0].load()


def test_locked_kernel_is_not_taken_from_the_kernels_package(project, cache, monkeypatch):
    """What that imported, it did not check."""
    registry = getattr(pytest.importorskip("kernels.importer"), "_loaded_kernels", None)
    if registry is None:
        pytest.skip("this version of kernels has no table of what it loaded")
    run(lock_command)
    (layers,) = cache.rglob("layers.py")
    monkeypatch.setitem(registry, layers.parent, SimpleNamespace(module=sys))
    assert sources(project)[0].load().label == "v1"


def test_lock_that_others_can_write_is_refused(project):
    run(lock_command)
    (project / "twinkle.lock").chmod(0o666)
    with pytest.raises(SourceError, match="others can write"):
        sources(project)[0].load()


def test_lock_is_sorted_whatever_the_order_of_its_entries():
    kernels = [LockedKernel(f"a/{name}", "newest", "a" * 40, {}) for name in "cab"]
    texts = {Lock("x", {kernel.key: kernel for kernel in order}).text() for order in (kernels, kernels[::-1])}
    assert len(texts) == 1
