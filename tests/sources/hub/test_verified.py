"""What was checked is what runs: a locked kernel comes from a private copy of the bytes that were checked."""

from __future__ import annotations

import hashlib
import importlib
import multiprocessing
import os
import py_compile
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

from twinkle.errors import SourceError
from twinkle.runtime import runtime
from twinkle.sources.hub.importer import Locked, import_variant
from twinkle.sources.hub.verified import DAYS, private_copy

RIGHT = "value = 'locked'\n"
WRONG = "value = 'planted'\n"
FILES = {
    "__init__.py": "from . import early\n",
    "early.py": RIGHT,
    "late.py": RIGHT,
    "inner/__init__.py": "",
    "inner/late.py": RIGHT,
    "data.bin": "data",
}


@pytest.fixture
def variant(tmp_path: Path) -> Path:
    """A variant as the client of the Hub leaves it: each file a link to a blob."""
    variant = tmp_path / "hub" / "build" / "torch-cpu"
    for name, text in FILES.items():
        blob = tmp_path / "hub" / "blobs" / hashlib.sha256((name + text).encode()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(text)
        (variant / name).parent.mkdir(parents=True, exist_ok=True)
        (variant / name).symlink_to(os.path.relpath(blob, (variant / name).parent))
    return variant


def digests(files: dict[str, str] = FILES) -> dict[str, str]:
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}


def copied(variant: Path, *homes: Path, locked: dict[str, str] | None = None) -> Path:
    homes = homes or (variant.parents[2] / "own" / "verified",)
    return private_copy(variant, locked or digests(), homes, what="acme/k", where=None)


def imported(variant: Path, copy: Path) -> Any:
    return import_variant(copy, dependencies={}, what="acme/k", where=None, locked=Locked(variant, digests()))


def value(module: Any, name: str) -> str:
    return str(importlib.import_module(f"{module.__name__}.{name}").value)


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path) -> Any:
    before = set(sys.modules)
    runtime.reset()
    yield
    runtime.reset()
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_the_copy_has_the_locked_files_and_no_other(variant: Path) -> None:
    (variant / "planted.py").write_text(WRONG)
    (variant / "layers").symlink_to("/tmp")
    copy = copied(variant)
    found = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if not path.is_dir()}
    assert found == set(FILES)
    assert not any(path.is_symlink() for path in copy.rglob("*"))
    assert not any(path.stat().st_mode & 0o077 for path in (copy.parents[1], copy.parent, copy))


@pytest.mark.parametrize("name", ["late", "inner.late"])
def test_a_submodule_that_is_imported_later_is_the_one_that_was_checked(variant: Path, name: str) -> None:
    module = imported(variant, copied(variant))
    path = variant / (name.replace(".", "/") + ".py")
    path.unlink()
    path.write_text(WRONG)
    assert value(module, name) == "locked"


def test_a_file_that_is_swapped_after_the_check_does_not_get_into_the_copy(variant: Path) -> None:
    (variant / "late.py").unlink()
    (variant / "late.py").write_text(WRONG)
    with pytest.raises(SourceError, match=r"differs from the lock[\s\S]*late.py: its SHA-256"):
        copied(variant)


@pytest.mark.parametrize("odd", ["pipe", "folder", "zero", "missing"])
def test_a_file_that_became_something_else_is_refused_at_once(variant: Path, odd: str) -> None:
    path = variant / "late.py"
    path.unlink()
    if odd == "pipe":
        os.mkfifo(path)
    elif odd == "folder":
        path.mkdir()
    elif odd == "zero":
        path.symlink_to("/dev/zero")
    with pytest.raises(SourceError):
        copied(variant)


def _planted(copy: Path, kind: str) -> None:
    if kind == "changed":
        (copy / "late.py").chmod(0o600)
        (copy / "late.py").write_text(WRONG)
    elif kind == "a package before a module":
        (copy / "late").mkdir()
        (copy / "late" / "__init__.py").write_text(WRONG)
    elif kind == "a link":
        (copy / "late").symlink_to(copy.parent)
    elif kind == "a shared object before a module":
        (copy / f"late{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"\x7fELF")
    elif kind == "bytecode":
        source = copy.parents[2] / "wrong.py"
        source.write_text(WRONG)
        cached = importlib.util.cache_from_source(str(copy / "late.py"))
        py_compile.compile(
            str(source), cached, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )
    elif kind == "a file that others can write":
        (copy / "late.py").chmod(0o666)
    else:
        (copy / "late.py").unlink()


KINDS = [
    "changed",
    "a package before a module",
    "a link",
    "a shared object before a module",
    "bytecode",
    "a file that others can write",
    "a file less",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_that_is_not_whole_is_made_anew(variant: Path, kind: str) -> None:
    copy = copied(variant)
    _planted(copy, kind)
    assert copied(variant) == copy
    assert {path.relative_to(copy).as_posix() for path in copy.rglob("*") if not path.is_dir()} == set(FILES)
    assert value(imported(variant, copy), "late") == "locked"


@pytest.mark.parametrize(
    "kind", ["changed", "bytecode", "a package before a module", "a shared object before a module"]
)
def test_a_module_is_checked_once_more_when_it_is_read(variant: Path, kind: str) -> None:
    copy = copied(variant)
    module = imported(variant, copy)
    _planted(copy, kind)
    importlib.invalidate_caches()
    if kind == "bytecode":
        assert value(module, "late") == "locked"
    else:
        with pytest.raises(ImportError, match="is not the file that is locked"):
            value(module, "late")


def test_data_beside_the_code_is_there(variant: Path) -> None:
    module = imported(variant, copied(variant))
    assert (Path(module.__file__).parent / "data.bin").read_text() == "data"


@pytest.mark.parametrize("why", ["others can write it", "another user's", "a link", "a file", "others above"])
def test_a_place_that_others_can_write_is_passed_over(variant: Path, tmp_path: Path, why: str) -> None:
    bad, good = tmp_path / "bad" / "verified", tmp_path / "good"
    bad.parent.mkdir()
    if why == "a file":
        bad.write_text("")
    elif why == "a link":
        (tmp_path / "there").mkdir(mode=0o777)
        bad.symlink_to(tmp_path / "there")
    else:
        bad.mkdir(mode=0o700)
        if why == "others can write it":
            bad.chmod(0o777)
        elif why == "others above":
            bad.parent.chmod(0o777)
        else:
            if os.geteuid():
                pytest.skip("only root can give a directory away")
            os.chown(bad, 4242, -1)
    assert good in copied(variant, bad, good).parents


def test_without_any_place_it_is_one_of_this_process(variant: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    copy = copied(variant, tmp_path / "file" / "below")
    assert value(imported(variant, copy), "late") == "locked"
    assert copy.stat().st_uid == os.geteuid()


def test_a_child_that_ends_leaves_the_directory_of_its_parent(variant: Path, tmp_path: Path) -> None:
    program = (
        "import os, pathlib, sys\n"
        "from twinkle.sources.hub.verified import private_copy\n"
        f"copy = private_copy(pathlib.Path({str(variant)!r}), {digests()!r}, [], what='k', where=None)\n"
        "if not os.fork(): sys.exit()\n"
        "os.wait()\n"
        "print(copy.exists(), copy)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    there, _, copy = done.stdout.strip().partition(" ")
    assert there == "True", done.stderr
    assert not Path(copy).exists()


def test_names_that_are_one_name_to_the_disk_are_refused(variant: Path) -> None:
    """As on a disk without capitals: what would be written twice under one name is written nowhere."""
    locked = {**digests(), "./late.py": digests()["late.py"]}
    with pytest.raises(SourceError, match="no place for the copy"):
        copied(variant, locked=locked)


def test_copies_that_were_not_used_for_long_go(variant: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinkle.sources.hub.verified.MOST", 0)
    copy = copied(variant)
    others = copy.parents[1] / "someone's", copy.parents[1] / ("0" * 64), copy.parents[1] / ("1" * 64)
    for path in others:
        path.mkdir()
    for path in others[:2]:
        os.utime(path, (time.time() - (DAYS + 1) * 86400,) * 2)
    copied(variant)
    assert [path.exists() for path in (*others, copy)] == [True, False, True, True]


def _copy_in_a_process(variant: Path, answers: Any) -> None:
    answers.put(str(copied(variant)))


def test_processes_that_copy_at_once_share_one_copy(variant: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    children = [context.Process(target=_copy_in_a_process, args=(variant, answers)) for _ in range(8)]
    for child in children:
        child.start()
    assert len({answers.get(timeout=60) for _ in children}) == 1
    for child in children:
        child.join()
    home = variant.parents[2] / "own" / "verified"
    assert len(list(home.iterdir())) == 1, "nothing is left lying about"
