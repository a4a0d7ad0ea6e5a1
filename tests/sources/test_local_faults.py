"""What is said when a local repository is not what it should be."""

from __future__ import annotations

import os
import sys

import pytest

from twinkle.errors import MissingDependencyError, SourceError
from twinkle.sources import permissions
from twinkle.sources.local import LocalSource

posix = pytest.mark.skipif(os.name != "posix", reason="mode bits")


def error_of(repo, name="Doubled", package="my_kernels", kind="layer") -> SourceError:
    source = LocalSource(str(repo), package, name, kind=kind, where="twinkle.toml:3 (layers.A)")
    with pytest.raises(SourceError) as caught:
        source.load()
    assert caught.value.where == "twinkle.toml:3 (layers.A)"
    return caught.value


def test_a_missing_directory_is_named_with_the_nearest_that_exists(seed_repo):
    error = error_of(seed_repo.parent / "rep")
    assert "no such directory" in error.what
    assert str(seed_repo.parent) in error.found
    assert error.fix == "did you mean 'repo'?"


def test_a_file_is_no_repository(seed_repo):
    error = error_of(seed_repo / "my_kernels" / "layers.py")
    assert "repo_path is a file" in error.what
    assert str(seed_repo) in error.fix


def test_a_missing_package_comes_with_what_there_is(seed_repo):
    error = error_of(seed_repo, package="my_kernel")
    assert error.found == "my_kernels"
    assert error.fix == "did you mean 'my_kernels'?"


def test_a_package_path_with_another_package_name_is_told_so(seed_repo):
    assert "no package 'fast'" in error_of(seed_repo / "my_kernels", package="fast").what


def test_an_empty_directory_says_so(tmp_path):
    assert error_of(tmp_path).found == "no package at all"


def test_a_missing_layers_module_is_named(write_repo):
    error = error_of(write_repo({"my_kernels/__init__.py": ""}))
    assert "no layers module" in error.what


def test_a_missing_layer_comes_with_the_layers_there_are(seed_repo):
    error = error_of(seed_repo, "Doubles")
    assert error.found == "Doubled"
    assert error.fix == "did you mean 'Doubled'?"


def test_a_function_is_no_layer(write_repo):
    repo = write_repo({"my_kernels/layers.py": "def Doubled(x): return x\n"})
    error = error_of(repo)
    assert "is not a layer class" in error.what
    assert error.found == "function Doubled"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("raise ValueError('boom')", "ValueError: boom"),
        ("raise SystemExit(2)", "SystemExit: 2"),
        ("class :", "SyntaxError"),
        ("import json; json.loads('{')", "JSONDecodeError"),
    ],
)
def test_a_kernel_that_raises_is_reported_with_its_own_line(write_repo, line, expected):
    repo = write_repo({"my_kernels/__init__.py": "", "my_kernels/layers.py": f"\n\n{line}\n"})
    error = error_of(repo)
    assert "raised on import" in error.what
    assert expected in error.found
    assert error.found.endswith(f"{repo}/my_kernels/layers.py:3")
    assert error.__cause__ is not None


def test_a_missing_dependency_is_named(write_repo):
    repo = write_repo({"my_kernels/__init__.py": "import no_such_thing\n"})
    error = error_of(repo)
    assert isinstance(error, MissingDependencyError)
    assert error.fix.startswith("pip install no-such-thing")


def test_a_module_beside_the_package_is_not_looked_for_in_pip(write_repo):
    repo = write_repo({"my_kernels/__init__.py": "import common\n", "common.py": ""})
    assert "from .. import common" in error_of(repo).fix


@posix
@pytest.mark.parametrize("place", ["my_kernels/layers.py", "my_kernels", "."])
def test_code_that_every_user_can_write_is_refused_with_the_command(seed_repo, place):
    path = seed_repo / place
    path.chmod(path.stat().st_mode | 0o002)
    error = error_of(seed_repo)
    assert "others can write" in error.what
    assert "chmod" in error.fix
    assert "go-w" in error.fix
    os.system(error.fix.partition(";")[0])
    LocalSource(str(seed_repo), "my_kernels", "Doubled", kind="layer").load()


@posix
def test_what_is_refused_is_not_run(write_repo):
    repo = write_repo({"my_kernels/__init__.py": "import sys\nsys.twinkle_test_ran = True\n"})
    (repo / "my_kernels" / "__init__.py").chmod(0o666)
    error_of(repo)
    assert not hasattr(sys, "twinkle_test_ran")


@posix
def test_the_target_of_a_link_counts(seed_repo, tmp_path):
    shared = tmp_path / "shared.py"
    shared.write_text("")
    shared.chmod(0o666)
    (seed_repo / "my_kernels" / "extra.py").symlink_to(shared)
    assert "others can write" in error_of(seed_repo).what


@posix
def test_a_directory_above_that_every_user_can_write_is_refused_unless_sticky(seed_repo):
    seed_repo.parent.chmod(0o777)
    assert "others can write" in error_of(seed_repo).what
    seed_repo.parent.chmod(0o1777)
    LocalSource(str(seed_repo), "my_kernels", "Doubled", kind="layer").load()


@posix
def test_a_group_that_can_write_is_refused_unless_it_is_the_owner_alone(tmp_path, monkeypatch):
    file = tmp_path / "a.py"
    file.write_text("")
    file.chmod(0o664)
    monkeypatch.setattr(permissions, "is_private_group", lambda user, group: False)
    assert "group" in permissions.writable_by_others(str(file))
    monkeypatch.setattr(permissions, "is_private_group", lambda user, group: True)
    assert permissions.writable_by_others(str(file)) is None


def test_a_group_with_another_member_is_not_private(monkeypatch):
    grp, pwd = pytest.importorskip("grp"), pytest.importorskip("pwd")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: pwd.struct_passwd(("ann", "x", 7, 7, "", "", "")))
    for members, private in (([], True), (["ann"], True), (["ann", "bob"], False)):
        group = grp.struct_group(("ann", "x", 7, members))
        monkeypatch.setattr(grp, "getgrgid", lambda gid, group=group: group)
        assert permissions.is_private_group(7, 7) is private


def test_bytecode_directories_do_not_count(seed_repo):
    cache = seed_repo / "my_kernels" / "__pycache__"
    cache.mkdir()
    cache.chmod(0o777)
    (cache / "x.pyc").write_bytes(b"")
    (cache / "x.pyc").chmod(0o666)
    LocalSource(str(seed_repo), "my_kernels", "Doubled", kind="layer").load()
