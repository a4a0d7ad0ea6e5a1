"""Implementations in hand, and strings that name them."""

from __future__ import annotations

import pytest
import torch

from twinkle.errors import ConfigError, MissingDependencyError, SourceError
from twinkle.sources.code import CodeSource, RepoSource


class Layer(torch.nn.Module):
    def forward(self, x):
        return x + 1


def test_a_class_in_hand_is_the_layer():
    assert CodeSource(Layer, kind="layer").load() is Layer


def test_a_callable_in_hand_is_the_function():
    add = lambda x, y: x + y + 1  # noqa: E731
    assert CodeSource(add, kind="function").load() is add


def test_an_nn_module_class_stands_for_its_forward():
    source = CodeSource(Layer, kind="function")
    assert source.load()(torch.ones(2)).tolist() == [2.0, 2.0]


def test_loading_twice_gives_the_same_object():
    source = CodeSource(Layer, kind="function")
    assert source.load() is source.load()


def test_an_nn_module_class_with_arguments_cannot_be_a_function():
    class Needy(torch.nn.Module):
        def __init__(self, size):
            super().__init__()

    with pytest.raises(SourceError, match="made without arguments"):
        CodeSource(Needy, kind="function").load()


@pytest.mark.parametrize("text", ["fast_ops:Gelu", "fast_ops.Gelu"])
def test_a_string_is_imported_at_the_first_load(site_dir, text):
    source = CodeSource(text, kind="layer")
    (site_dir / "fast_ops.py").write_text("import torch\nclass Gelu(torch.nn.Module): pass\n")
    assert source.load().__name__ == "Gelu"


def test_a_string_may_name_something_inside_a_class(site_dir):
    (site_dir / "fast_ops2.py").write_text("class Ops:\n    @staticmethod\n    def add(x, y): return x + y\n")
    assert CodeSource("fast_ops2:Ops.add", kind="function").load()(1, 2) == 3


@pytest.mark.parametrize("text", ["", "name", ":x", "a:", "a b:c", "a:b:c", "a-b:c"])
def test_a_malformed_string_is_a_config_error(text):
    with pytest.raises(ConfigError, match="malformed func_impl"):
        CodeSource(text, kind="function")


def test_a_missing_module_is_named():
    with pytest.raises(MissingDependencyError, match="no package 'no_such_kernels'"):
        CodeSource("no_such_kernels.fast:f", kind="function", where="twinkle.toml:3").load()


def test_a_missing_submodule_of_a_package_that_is_there_is_named(site_dir):
    (site_dir / "half_there").mkdir()
    (site_dir / "half_there" / "__init__.py").write_text("")
    with pytest.raises(SourceError, match=r"no module 'half_there\.fast'"):
        CodeSource("half_there.fast:f", kind="function").load()


def test_a_missing_dependency_of_the_module_is_named_instead_of_the_module(site_dir):
    (site_dir / "needy_ops.py").write_text("import no_such_dependency\n")
    with pytest.raises(MissingDependencyError, match="needs 'no_such_dependency'") as caught:
        CodeSource("needy_ops:f", kind="function").load()
    assert "needy_ops.py:1" in caught.value.found


def test_a_missing_name_comes_with_what_there_is(site_dir):
    (site_dir / "some_ops.py").write_text("def silu_and_mul(x): pass\n")
    with pytest.raises(SourceError, match="has no function 'silu_and_mull'") as caught:
        CodeSource("some_ops:silu_and_mull", kind="function").load()
    assert caught.value.fix == "did you mean 'silu_and_mul'?"


@pytest.mark.parametrize("line", ["raise ValueError('boom')", "raise SystemExit(3)", "def broken(:"])
def test_a_module_that_raises_is_reported_with_its_line(site_dir, line):
    (site_dir / "bad_ops.py").write_text(f"x = 1\n{line}\n")
    with pytest.raises(SourceError) as caught:
        CodeSource("bad_ops:f", kind="function").load()
    assert "bad_ops.py:2" in caught.value.found
    assert caught.value.__cause__ is not None


def test_a_string_that_names_no_layer_says_what_it_names(site_dir):
    (site_dir / "not_layers.py").write_text("def f(x): pass\nclass C: pass\n")
    for name, found in (("f", "function f"), ("C", "class C")):
        with pytest.raises(SourceError, match="is not a layer class") as caught:
            CodeSource(f"not_layers:{name}", kind="layer").load()
        assert caught.value.found == found


def test_a_repo_object_is_asked_once():
    class Repo:
        calls = 0

        def load(self):
            self.calls += 1
            return Layer

    repo = Repo()
    source = RepoSource(repo, kind="function")
    assert repo.calls == 0
    assert source.load()(1) == 2
    assert source.load() is source.load()
    assert repo.calls == 1


def test_a_repo_object_may_return_a_callable():
    class Repo:
        def load(self):
            return len

    assert RepoSource(Repo(), kind="function").load() is len


def test_a_repo_object_that_raises_is_a_source_error():
    class Repo:
        def load(self):
            raise OSError("gone")

    with pytest.raises(SourceError, match="OSError: gone"):
        RepoSource(Repo(), kind="function").load()


def test_a_repo_object_that_returns_no_function_is_a_source_error():
    class Repo:
        def load(self):
            return 3

    with pytest.raises(SourceError, match="not callable"):
        RepoSource(Repo(), kind="function").load()


def test_a_repo_class_is_not_a_repo_object():
    class Repo:
        def load(self):
            return len

    with pytest.raises(ConfigError, match=r"pass Repo\(\)"):
        RepoSource(Repo, kind="function")


def test_two_lambdas_have_two_descriptions():
    first, second = (
        CodeSource(lambda x: x, kind="function"),
        CodeSource(lambda x: -x, kind="function"),
    )
    assert first.describe() != second.describe()
