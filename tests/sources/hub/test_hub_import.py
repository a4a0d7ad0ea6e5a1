"""How a variant becomes a module, beside what others loaded."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from loopback_hub import Repo, kernel_files, metadata

from twinkle.errors import SourceError
from twinkle.runtime import runtime


def same_id(label):
    return kernel_files(label, id="_my_kernel_same_id")


def module_of(layer):
    return sys.modules[layer.__module__.rpartition(".")[0]]


def test_two_repositories_with_one_metadata_id_have_their_own_layers(hub, source):
    hub.repos["acme/one"] = Repo({"v1": same_id("one")})
    hub.repos["acme/two"] = Repo({"v1": same_id("two")})
    layers = [source(repo_id=f"acme/{name}", version=1).load() for name in ("one", "two")]
    assert [layer.label for layer in layers] == ["one", "two"]
    assert [sys.modules[layer.__module__].RMSNorm for layer in layers] == layers


def test_id_of_an_installed_module_is_left_alone(hub, source):
    import json

    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(id="json")})
    assert source(version=1).load().label == "v1"
    assert sys.modules["json"] is json


def test_two_sources_of_one_repository_share_its_module(hub, source):
    layer = source(version=1).load()
    function = source("silu_and_mul", kind="function", version=1).load()
    assert function.__module__ == module_of(layer).__name__
    assert hub.count("/refs") <= 2


def test_loading_twice_gives_the_same_object(hub, source):
    kernel = source(version=1)
    assert kernel.load() is kernel.load()


def test_source_is_imported_once_for_all_threads(hub, source):
    body = "from . import layers\nimport sys\nsys.twinkle_imports = getattr(sys, 'twinkle_imports', 0) + 1\n"
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files={"__init__.py": body})})
    found = []
    start = threading.Barrier(8)

    def load():
        start.wait()
        found.append(source(version=1).load())

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert sys.twinkle_imports == 1
    finally:
        del sys.twinkle_imports
    assert len(found) == 8
    assert len(set(found)) == 1
    assert hub.count("GET .*resolve") == 3


def test_no_bytecode_is_written_into_the_cache(hub, source, cache):
    source(version=1).load()
    assert not list(cache.rglob("*.pyc"))


def test_bytecode_in_the_cache_is_not_read(hub, source, cache):
    """Python believes bytecode whose source has the recorded time and size: a file that no digest covers."""
    import importlib.util
    import py_compile

    first = source(version=1)
    first.load()
    variant = first.resolved.variant_dir
    evil = variant / "evil.py"
    layers = variant / "layers.py"
    evil.write_text(layers.read_text().replace("'v1'", "'x1'"))
    stat = layers.stat()
    import os

    os.utime(evil, (stat.st_atime, stat.st_mtime))
    py_compile.compile(str(evil), cfile=importlib.util.cache_from_source(str(layers)))
    evil.unlink()
    runtime.reset()
    for name in [n for n, m in sys.modules.items() if str(variant) in str(getattr(m, "__file__", ""))]:
        del sys.modules[name]
    registry = getattr(sys.modules.get("kernels.importer"), "_loaded_kernels", {})
    registry.pop(variant, None)
    assert source(version=1).load().label == "v1"


def test_sys_path_is_left_alone(hub, source):
    before = list(sys.path)
    source(version=1).load()
    assert sys.path == before


def test_package_below_its_variant_loads(hub, source):
    """The layout of older builds: the code in a package named like the kernel."""
    files = {
        f"build/torch-cpu/{path}": body.encode()
        for path, body in {
            "metadata.json": metadata(),
            "my_kernel/__init__.py": "from . import layers",
            "my_kernel/layers.py": "import torch.nn as nn\nclass RMSNorm(nn.Module):\n    label = 'old'\n",
        }.items()
    }
    hub.repos["acme/my-kernel"] = Repo({"v1": files})
    assert source(version=1).load().label == "old"


def test_submodules_and_data_files_of_a_kernel_work(hub, source):
    files = {
        "layers.py": "from .deep.inner import RMSNorm\n",
        "deep/__init__.py": "",
        "deep/inner.py": (
            "import torch.nn as nn\nfrom pathlib import Path\n"
            "class RMSNorm(nn.Module):\n    label = (Path(__file__).parent / 'data.txt').read_text()\n"
        ),
        "deep/data.txt": "from a file",
    }
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files=files)})
    assert source(version=1).load().label == "from a file"


def test_layers_that_the_package_does_not_import_are_found(hub, source):
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files={"__init__.py": ""})})
    assert source(version=1).load().label == "v1"


def test_layers_of_a_module_shape_are_pickled_by_name(hub, source):
    import pickle

    layer = source(version=1).load()
    assert pickle.loads(pickle.dumps(layer)) is layer


def test_metadata_that_is_missing_is_a_reason(hub, source):
    pytest.importorskip("kernels.validate")
    files = {path: body for path, body in kernel_files().items() if not path.endswith("metadata.json")}
    hub.repos["acme/my-kernel"] = Repo({"v1": files})
    with pytest.raises(SourceError, match="cannot be used"):
        source(version=1).load()


@pytest.mark.parametrize(
    "change",
    [{"name": "My_Kernel"}, {"version": "one"}, {"license": 3}, {"backend": {}}, {"python-depends": "numpy"}],
    ids=lambda change: next(iter(change)),
)
def test_metadata_that_is_malformed_is_a_reason(hub, source, change):
    pytest.importorskip("kernels.validate")
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files={"metadata.json": metadata(**change)})})
    with pytest.raises(SourceError, match="cannot be used"):
        source(version=1).load()


def test_metadata_with_unknown_keys_is_accepted(hub, source):
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(**{"something-new": 1})})
    assert source(version=1).load().label == "v1"


def test_kernel_that_asks_for_a_newer_kernels_package_is_a_reason(hub, source):
    pytest.importorskip("kernels.validate")
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(**{"kernels-minver": "99.0.0"})})
    with pytest.raises(SourceError, match="99"):
        source(version=1).load()


def test_kernel_loads_the_kernels_it_depends_on(hub, source):
    pytest.importorskip("kernels.validate")
    body = (
        "from kernels import get_kernel_dep\nneeded = get_kernel_dep('acme/needed')\nfrom . import layers\n"
    )
    hub.repos["acme/needed"] = Repo({"v2": kernel_files("needed")})
    depends = [{"repo-id": "acme/needed", "version": 2}]
    files = kernel_files(files={"__init__.py": body}, **{"kernel-depends": depends})
    hub.repos["acme/my-kernel"] = Repo({"v1": files})
    layer = source(version=1).load()
    assert module_of(layer).needed.layers.RMSNorm.label == "needed"


def test_kernels_that_depend_on_each_other_are_a_reason(hub, source):
    pytest.importorskip("kernels.validate")
    for name, other in (("one", "two"), ("two", "one")):
        depends = [{"repo-id": f"acme/{other}", "version": 1}]
        hub.repos[f"acme/{name}"] = Repo({"v1": kernel_files(**{"kernel-depends": depends})})
    with pytest.raises(SourceError, match="depends on itself"):
        source(repo_id="acme/one", version=1).load()


def test_kernel_that_the_kernels_package_loads_afterwards_is_the_same(hub, source):
    kernels = pytest.importorskip("kernels")
    pytest.importorskip("kernels.validate")
    module = module_of(source(version=1).load())
    assert kernels.get_kernel("acme/my-kernel", version=1) is module


def test_kernel_that_the_kernels_package_loaded_before_is_the_same(hub, source):
    kernels = pytest.importorskip("kernels")
    pytest.importorskip("kernels.validate")
    module = kernels.get_kernel("acme/my-kernel", version=1)
    assert source(version=1).load() is module.layers.RMSNorm


def test_wrong_layers_that_the_kernels_package_loaded_are_not_taken_over(hub, source):
    """`kernels` gives a second repository of the same id the layers of the first."""
    kernels = pytest.importorskip("kernels")
    pytest.importorskip("kernels.validate")
    hub.repos["acme/one"] = Repo({"v1": same_id("one")})
    hub.repos["acme/two"] = Repo({"v1": same_id("two")})
    kernels.get_kernel("acme/one", version=1)
    wrong = kernels.get_kernel("acme/two", version=1)
    assert wrong.layers.RMSNorm.label == "one"
    assert source(repo_id="acme/two", version=1).load().label == "two"


def test_kernels_package_works_offline_after_a_download_by_twinkle(hub, source, go_offline):
    """What it fetches itself it cannot load offline: the listing of the whole repository is in its way."""
    kernels = pytest.importorskip("kernels")
    pytest.importorskip("kernels.validate")
    repo = hub.repos["acme/my-kernel"]
    hub.repos["acme/my-kernel"] = Repo({"v1": {**kernel_files(), **kernel_files(variant="torch-cuda")}})
    del repo
    source(version=1).load()
    go_offline()
    assert kernels.get_kernel("acme/my-kernel", version=1).layers.RMSNorm.label == "v1"


def test_twinkle_works_offline_after_a_download_by_the_kernels_package(hub, source, go_offline):
    kernels = pytest.importorskip("kernels")
    pytest.importorskip("kernels.validate")
    hub.repos["acme/my-kernel"] = Repo({"v1": {**kernel_files(), **kernel_files(variant="torch-cuda")}})
    commit = hub.repos["acme/my-kernel"].branches["v1"]
    kernels.get_kernel("acme/my-kernel", version=1)
    sys.modules["kernels.importer"]._loaded_kernels.clear()
    go_offline()
    assert source(revision=commit, trust_remote_code=True).load().label == "v1"


@pytest.mark.slow
@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
def test_programs_own_variables_are_enough(hub, cache, tmp_path, source, offline):
    """With nothing patched: HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE in the environment of a process."""
    import os

    if offline:
        source(version=1).load()
    code = (
        "from twinkle.sources.hub.source import HubSource\n"
        "print(HubSource('acme/my-kernel', 'RMSNorm', kind='layer', version=1).load().label)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "HF_HUB_OFFLINE": "01"[offline]}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=240
    )
    assert done.stdout == "v1\n", done.stderr


def test_progress_bar_goes_to_stderr_and_stdout_stays_clean(hub, source, capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    source(version=1).load()
    out, err = capfd.readouterr()
    assert out == ""
    assert "acme/my-kernel torch-cpu" in err
    assert "100%" in err
