"""Repositories in the layouts of the kernels package."""

from __future__ import annotations

import json
import pickle

import pytest

from twinkle.errors import MissingDependencyError, SourceError
from twinkle.sources.local import LocalSource

LAYER = "import torch\nclass A(torch.nn.Module):\n    tag = {!r}\n    def forward(self, x): return x\n"


def metadata(**more: object) -> str:
    fields = {
        "name": "my-kernels",
        "id": "_my_kernels_aaaaaaa",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    return json.dumps({**fields, **more})


def build(prefix: str, tag: str = "built", inner: str = "", **more: object) -> dict[str, str]:
    return {
        f"{prefix}metadata.json": metadata(**more),
        f"{prefix}{inner}__init__.py": "from . import layers\n",
        f"{prefix}{inner}layers.py": LAYER.format(tag),
    }


def source(repo, package="my_kernels", name="A", **more):
    return LocalSource(str(repo), package, name, kind="layer", **more)


@pytest.mark.parametrize("prefix", ["build/torch-cpu/", "torch-cpu/", "build/torch-universal/", ""])
@pytest.mark.parametrize("inner", ["", "my_kernels/"])
def test_every_layout_loads(write_repo, prefix, inner):
    assert source(write_repo(build(prefix, inner=inner))).load().tag == "built"


def test_the_path_of_a_variant_itself_is_as_good(write_repo):
    repo = write_repo(build("build/torch-cpu/"))
    assert source(repo / "build" / "torch-cpu").load().tag == "built"


def test_the_variant_that_fits_is_loaded_and_the_reasons_for_the_others_are_kept(write_repo):
    files = {}
    for variant in ("torch-rocm", "torch-universal", "torch-cpu", "torch13-cxx11-cpu-x86_64-linux"):
        files |= build(f"build/{variant}/", tag=variant)
    loaded = source(write_repo(files), device="cpu")
    assert loaded.load().tag == "torch-cpu"
    assert loaded.trace[0][:2] == ("torch-cpu", True)
    assert {name: accepted for name, accepted, _ in loaded.trace} == {
        "torch-cpu": True,
        "torch-universal": True,
        "torch-rocm": False,
        "torch13-cxx11-cpu-x86_64-linux": False,
    }
    assert all(reason for _, _, reason in loaded.trace)


def test_no_variant_that_fits_is_an_error_with_every_reason(write_repo):
    repo = write_repo(build("build/torch-rocm/") | build("build/torch13-cxx11-cpu-x86_64-linux/"))
    broken = source(repo, where="here")
    with pytest.raises(SourceError, match="no variant for this machine") as caught:
        broken.load()
    assert "torch-rocm: " in caught.value.found
    assert "torch13-cxx11-cpu-x86_64-linux: " in caught.value.found
    assert len(broken.trace) == 2


def test_two_repositories_with_one_metadata_id_load_their_own_layers(write_repo):
    first = write_repo(build("build/torch-universal/", tag="first"), name="first")
    second = write_repo(build("build/torch-universal/", tag="second"), name="second")
    assert source(first).load().tag == "first"
    assert source(second).load().tag == "second"


def test_two_variants_of_one_repository_are_two_modules(write_repo):
    repo = write_repo(build("a/torch-universal/", tag="a") | build("b/torch-universal/", tag="b"))
    assert [source(repo / name).load().tag for name in "ab"] == ["a", "b"]


def test_a_built_package_may_import_itself_by_its_name(write_repo):
    files = build("build/torch-universal/")
    files["build/torch-universal/layers.py"] += "import my_kernels.helper\nfrom my_kernels.helper import n\n"
    files["build/torch-universal/helper.py"] = "n = 1\n"
    assert source(write_repo(files)).load().tag == "built"


def test_a_built_layer_can_be_pickled(write_repo):
    loaded = source(write_repo(build("build/torch-universal/"))).load()
    assert pickle.loads(pickle.dumps(loaded)) is loaded


def test_a_built_package_with_another_name_is_told_so(write_repo):
    with pytest.raises(SourceError) as caught:
        source(write_repo(build("build/torch-universal/")), package="other").load()
    assert caught.value.fix == 'package_name = "my_kernels"'


def test_a_build_without_metadata_loads(write_repo):
    files = build("build/torch-universal/")
    del files["build/torch-universal/metadata.json"]
    assert source(write_repo(files)).load().tag == "built"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"name": 3}', '{"python-depends": "numpy"}'])
def test_damaged_metadata_is_a_source_error(write_repo, text):
    files = build("build/torch-universal/") | {"build/torch-universal/metadata.json": text}
    with pytest.raises(SourceError, match=r"metadata\.json cannot be read"):
        source(write_repo(files)).load()


def test_a_missing_dependency_is_named_before_anything_runs(write_repo):
    files = build("build/torch-universal/", **{"python-depends": ["torch", "no-such-dist>=1"]})
    files["build/torch-universal/__init__.py"] = "1 / 0\n"
    with pytest.raises(MissingDependencyError) as caught:
        source(write_repo(files)).load()
    assert caught.value.fix == "pip install 'no-such-dist>=1'"


def test_a_build_without_code_says_so(write_repo):
    repo = write_repo({"build/torch-universal/metadata.json": metadata()})
    with pytest.raises(SourceError, match="has no code"):
        source(repo).load()


def test_the_build_directory_of_setuptools_is_no_variant(write_repo):
    repo = write_repo({"build/lib/x.py": "", "my_kernels/layers.py": LAYER.format("plain")})
    assert source(repo).load().tag == "plain"


def test_a_plain_package_stands_in_when_no_build_fits(write_repo):
    repo = write_repo(build("build/torch-rocm/") | {"my_kernels/layers.py": LAYER.format("plain")})
    loaded = source(repo)
    assert loaded.load().tag == "plain"
    assert [accepted for _, accepted, _ in loaded.trace] == [False]


def test_a_build_that_others_can_write_is_refused(write_repo):
    repo = write_repo(build("build/torch-universal/"))
    (repo / "build" / "torch-universal" / "layers.py").chmod(0o666)
    with pytest.raises(SourceError, match="others can write"):
        source(repo).load()
