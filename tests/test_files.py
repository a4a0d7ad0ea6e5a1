"""Files beside the program: read within bounds whatever they are, and written at once."""

from __future__ import annotations

import ast
import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import twinkle
from twinkle.files import cache_directory, read_bounded, write_whole

PACKAGE = Path(twinkle.__file__).parent


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder with one of everything that is no file to read."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "to_pipe").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    return tmp_path


@pytest.mark.parametrize(
    "name", ["pipe", "folder", "zero", "loop", "to_pipe", "socket", "absent", "a\0b", "x" * 300]
)
def test_what_is_no_file_is_an_error_at_once(odd: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"."):
        read_bounded(str(odd / name), 1000)


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_bounded(file, 5) == b"12345"
    with pytest.raises(OSError, match=r".") as caught:
        read_bounded(file, 4)
    assert caught.value.errno == errno.EFBIG


def test_a_file_that_says_it_is_empty_is_bounded_too() -> None:
    assert read_bounded("/proc/self/status", 1 << 20).startswith(b"Name:")
    with pytest.raises(OSError, match=r"."):
        read_bounded("/proc/self/status", 10)


def test_a_link_is_followed_only_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to("file")
    assert read_bounded(tmp_path / "link", 9) == b"1"
    with pytest.raises(OSError, match=r".") as caught:
        read_bounded(tmp_path / "link", 9, follow=False)
    assert caught.value.errno == errno.ELOOP


def test_what_was_opened_is_what_is_judged(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")

    def refuse(status: os.stat_result) -> None:
        raise PermissionError(status.st_size)

    with pytest.raises(PermissionError):
        read_bounded(tmp_path / "file", 9, check=refuse)


# -- writing --------------------------------------------------------------------------------------


def test_a_planted_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "report.json").symlink_to(victim)
    write_whole(tmp_path / "report.json", b"new")
    assert victim.read_text() == "mine"
    assert not (tmp_path / "report.json").is_symlink()


def test_the_name_beside_it_is_another_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    really = os.open

    def watching(path: str, flags: int, *more: int) -> int:
        opened.append(os.path.basename(path))
        assert flags & os.O_EXCL
        return really(path, flags, *more)

    monkeypatch.setattr("os.open", watching)
    write_whole(tmp_path / "r", b"1")
    write_whole(tmp_path / "r", b"2")
    assert len(set(opened)) == 2
    assert str(os.getpid()) not in opened[0].split(".")


@pytest.mark.parametrize("name", ["pipe", "folder", "zero", "to_pipe"])
def test_a_device_or_a_pipe_is_not_replaced(odd: Path, name: str) -> None:
    before = os.lstat(odd / name)
    with pytest.raises(OSError, match=r"."):
        write_whole(odd / name, b"1")
    assert os.lstat(odd / name).st_ino == before.st_ino


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r").write_bytes(b"old")

    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        with pytest.raises(OSError, match=r"."):
            write_whole(tmp_path / "r", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    assert (tmp_path / "r").read_bytes() == b"old"


# -- where things are kept --------------------------------------------------------------------------


@pytest.mark.parametrize("environ", [{"TWINKLE_CACHE": "~nosuchuser/x"}, {"TWINKLE_CACHE": "off"}])
def test_a_home_that_is_not_there_is_no_directory(environ: dict[str, str]) -> None:
    assert cache_directory(environ) is None


def test_a_user_without_a_home_keeps_nothing() -> None:
    program = (
        "import os; os.environ.pop('HOME', None); os.setuid(1000650000)\n"
        "from twinkle.files import cache_directory; print(cache_directory({}))"
    )
    if os.geteuid():
        pytest.skip("only root can become another user")
    root = str(PACKAGE.parent)
    code = f"import sys; sys.path.insert(0, {root!r}); import twinkle.files, pwd\n{program}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr


# -- the rule ---------------------------------------------------------------------------------------

READ_ELSEWHERE = {
    "config/files.py": "opens, judges and bounds a configuration the same way, with a message for each case",
    "sources/hub/verified.py": "creates a file to write the copy to, and reads none",
    "proof/cache_key.py": "the sources of the installed kernels, which Python has imported",
}


def _readers(file: Path) -> list[int]:
    """The lines that open or read a file by another way than read_bounded."""
    lines = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id == "open":
            lines.append(node.lineno)
        elif isinstance(function, ast.Attribute) and function.attr in ("read_text", "read_bytes", "open"):
            owner = function.value
            if not (isinstance(owner, ast.Name) and owner.id in ("webbrowser",)):
                lines.append(node.lineno)
    return lines


def test_every_file_beside_the_program_is_read_within_bounds() -> None:
    found = {
        file.relative_to(PACKAGE).as_posix(): lines
        for file in sorted(PACKAGE.rglob("*.py"))
        if file != PACKAGE / "files.py" and (lines := _readers(file))
    }
    assert set(found) - set(READ_ELSEWHERE) == set(), found
