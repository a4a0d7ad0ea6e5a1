from __future__ import annotations

import os
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from twinkle.config import files
from twinkle.config.files import MAX_BYTES, parse, read
from twinkle.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

posix_only = pytest.mark.skipif(os.name != "posix", reason="modes and owners are POSIX")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    own = tmp_path / "own"
    own.mkdir(mode=0o755)
    own.chmod(0o755)
    return own


def written(folder: Path, content: str | bytes, name: str = "twinkle.toml") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(0o644)
    return str(path)


def refused(path: str, name: str | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(path, name)
    error = caught.value
    assert error.where
    assert error.found
    assert error.expected
    assert error.fix
    return error


def test_a_file_is_read_with_the_lines_of_its_keys(folder: Path) -> None:
    document, locations = read(written(folder, "[twinkle]\nlog = 'info'\n"), "t.toml")
    assert document == {"twinkle": {"log": "info"}}
    assert locations(("twinkle", "log")) == "t.toml:2 (twinkle.log)"


def test_toml_beyond_the_plain_is_read_as_well(folder: Path) -> None:
    document, locations = read(written(folder, "n = 0xff\nm = 1_0\n"), "t.toml")
    assert document == {"n": 255, "m": 10}
    assert locations(("m",)) == "t.toml:2 (m)"


def test_an_empty_file_is_an_empty_document(folder: Path) -> None:
    assert read(written(folder, ""))[0] == {}


def test_a_byte_order_mark_is_no_content(folder: Path) -> None:
    assert read(written(folder, b"\xef\xbb\xbflog = 1"))[0] == {"log": 1}


def test_missing_file_names_the_path_and_a_similar_one(folder: Path) -> None:
    written(folder, "")
    error = refused(str(folder / "twinkel.toml"), "twinkel.toml")
    assert error.what == "the configuration file does not exist"
    assert error.where == "twinkel.toml"
    assert str(folder / "twinkel.toml") in error.found
    assert error.fix == "did you mean 'twinkle.toml'?"


def test_missing_folder_says_where_paths_start(folder: Path) -> None:
    assert "working directory" in refused(str(folder / "no" / "twinkle.toml")).fix


def test_a_path_with_a_null_byte_is_refused() -> None:
    assert refused("a\0b").where == "a\\x00b"


@posix_only
def test_unreadable_file_names_the_chmod(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(folder, "")

    def denied(*_: object) -> int:  # root may read everything, so the refusal is played
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(files.os, "open", denied)
    error = refused(path)
    assert error.what == "the configuration file cannot be read"
    assert error.found == "Permission denied"
    assert error.fix == f"chmod u+r {path}"


def test_a_read_that_fails_is_an_error_of_ours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    path = written(folder, "")
    monkeypatch.setattr(files.os, "read", failing)
    assert refused(path).found == "Input/output error"


def test_a_directory_names_the_file_in_it(folder: Path) -> None:
    inside = written(folder, "")
    error = refused(str(folder))
    assert error.what == "the configuration is not a file"
    assert error.found == "a directory"
    assert error.fix == f"name the file in it: {inside}"


@posix_only
def test_a_pipe_is_refused_without_waiting_for_a_writer(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert refused(str(folder / "pipe")).found == "a pipe"


@posix_only
def test_a_device_is_refused() -> None:
    assert refused(os.devnull).found == "a device"


@posix_only
def test_a_socket_is_refused(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.chdir(folder)  # the path of a socket may have no more than about 100 characters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert refused("socket").expected.startswith("a TOML file")


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 64 * MAX_BYTES])
def test_too_large_file_names_both_sizes(folder: Path, size: int) -> None:
    path = written(folder, "")
    os.truncate(path, size)
    error = refused(path)
    assert error.what == "the configuration file is too large"
    assert error.expected == "at most 1 MiB"
    assert error.found in (f"{MAX_BYTES + 1} bytes", "64 MiB")


def test_a_file_that_grows_while_it_is_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(folder, "")
    monkeypatch.setattr(files.os, "read", lambda handle, size: b"#" * size)
    assert refused(path).what == "the configuration file is too large"


def test_text_that_is_not_utf8_names_line_and_byte(folder: Path) -> None:
    error = refused(written(folder, b"a = 1\nb = '\xff'\n"), "t.toml")
    assert error.what == "the configuration is not UTF-8"
    assert error.where == "t.toml:2"
    assert error.found == "byte 0xff"


@pytest.mark.parametrize(
    ("text", "place", "found", "fix"),
    [
        ("[twinkle]\nmode auto\n", "t.toml:2, column 6", "'mode auto'", "toml.io"),
        ("[twinkle]\nmode: auto\n", "t.toml:2, column 5", "'mode: auto'", "mode = value, with an equals"),
        ("[twinkle]\nstrict = True\n", "t.toml:2, column 10", "'strict = True'", "strict = true"),
        ("[twinkle]\nmode = train\n", "t.toml:2, column 8", "'mode = train'", 'mode = "train"'),
        ("[twinkle]\nmode =\nlog = 1", "t.toml:2, column 7", "'mode ='", "give mode a value"),
        ("x = None\n", "t.toml:1, column 5", "'x = None'", "leave the key out"),
        ("[twinkle]\n[layers.X\n\n", "t.toml:2", "'[layers.X'", "toml.io"),
        ("a = [1,\n\n", "t.toml:1", "'a = [1,'", "toml.io"),
    ],
)
def test_syntax_error_shows_line_column_and_text(text: str, place: str, found: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=r"^TOML syntax error: ") as caught:
        parse(text, "t.toml")
    assert str(caught.value.where).startswith(place)
    assert caught.value.found == found
    assert fix in str(caught.value.fix)
    assert caught.value.expected


def test_a_table_written_twice_is_a_syntax_error_with_its_line() -> None:
    with pytest.raises(ConfigError, match="TOML syntax error") as caught:
        parse("[layers.X]\na = 1\n[layers.X]\n", "t.toml")
    assert caught.value.where.startswith("t.toml:3, column")
    assert caught.value.found == "'[layers.X]'"


def test_endless_nesting_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError, match="nested too deeply") as caught:
        parse("a = 1\nb = " + "[" * 10000, "t.toml")
    assert caught.value.where == "t.toml:2"


def test_an_endless_number_is_an_error_of_ours() -> None:
    with pytest.raises(ConfigError, match="TOML syntax error"):
        parse("a = " + "9" * 5000, "t.toml")


def test_a_missing_parser_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(ImportError) as caught:
        parse("n = 0xff", "t.toml")
    assert caught.value.fix == "pip install tomli"


# --- who else can write ---------------------------------------------------------------------------


@pytest.fixture
def _shared_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinkle.sources.permissions.is_private_group", lambda user, group: False)


@posix_only
def test_a_group_of_the_owner_alone_may_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(folder, "a = 1")
    os.chmod(path, 0o664)
    monkeypatch.setattr("twinkle.sources.permissions.is_private_group", lambda user, group: True)
    assert read(path)[0] == {"a": 1}


@posix_only
def test_root_reads_what_the_owner_of_the_program_mounted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, program = written(folder, "a = 1"), folder / "program.py"
    monkeypatch.setattr(files.os, "geteuid", lambda: 0)
    monkeypatch.setattr(files.os, "fstat", fstat_of(os.fstat, uid=4243))
    assert "belongs to another user" in refused(path).what
    program.write_text("")
    monkeypatch.setattr(files.os, "stat", fstat_of(os.stat, uid=4243))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-W", "ignore", "-u", str(program), "argument"])
    assert read(path)[0] == {"a": 1}


def command(error: ConfigError) -> str:
    """The command of a fix, without what it says of mounts whose modes mean nothing."""
    chmod, _, more = str(error.fix).partition("; where modes mean nothing")
    assert "TWINKLE_TRUST_FILES=" in more
    return chmod


@posix_only
@pytest.mark.usefixtures("_shared_group")
@pytest.mark.parametrize(
    ("mode", "who"), [(0o664, "its group"), (0o646, "everyone"), (0o666, "its group and everyone")]
)
def test_a_file_others_can_write_is_refused_with_the_chmod(folder: Path, mode: int, who: str) -> None:
    path = written(folder, "")
    os.chmod(path, mode)
    error = refused(path, "t.toml")
    assert "written by others" in error.what
    assert error.where == "t.toml"
    assert error.found == f"{path} is writable by {who} (mode {mode:04o})"
    assert command(error) == f"chmod go-w {path}"


@posix_only
@pytest.mark.usefixtures("_shared_group")
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_directory_others_can_write_is_refused_with_the_chmod(folder: Path, mode: int) -> None:
    path = written(folder, "")
    folder.chmod(mode)
    error = refused(path)
    assert "directory" in error.what
    assert command(error) == f"chmod go-w {folder}"


@posix_only
def test_a_sticky_directory_is_accepted(folder: Path) -> None:
    path = written(folder, "a = 1")
    folder.chmod(0o1777)
    assert read(path)[0] == {"a": 1}


@posix_only
def test_the_directory_of_a_symbolic_link_counts_too(folder: Path) -> None:
    path = written(folder, "")
    shared = folder / "shared"
    shared.mkdir()
    (shared / "link.toml").symlink_to(path)
    shared.chmod(0o777)
    assert command(refused(str(shared / "link.toml"))) == f"chmod go-w {shared}"


@posix_only
def test_the_directory_behind_a_symbolic_link_counts_too(folder: Path) -> None:
    shared = folder / "shared"
    shared.mkdir()
    path = written(shared, "")
    shared.chmod(0o777)
    (folder / "link.toml").symlink_to(path)
    assert command(refused(str(folder / "link.toml"))) == f"chmod go-w {shared}"


@posix_only
def test_a_file_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(folder, "")
    monkeypatch.setattr(files.os, "geteuid", lambda: 4242)
    monkeypatch.setattr(files.os, "fstat", fstat_of(os.fstat, uid=4243))
    error = refused(path)
    assert "belongs to another user" in error.what
    assert error.found == f"{path} is owned by user 4243; this process runs as user 4242"
    assert error.fix.startswith(f"chown 4242 {path}")


@posix_only
@pytest.mark.parametrize("uid", [0, 4242])
def test_a_file_of_root_or_oneself_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    path = written(folder, "a = 1")
    monkeypatch.setattr(files.os, "geteuid", lambda: 4242)
    monkeypatch.setattr(files.os, "fstat", fstat_of(os.fstat, uid=uid))
    monkeypatch.setattr(files.os, "stat", fstat_of(os.stat, uid=uid))
    assert read(path)[0] == {"a": 1}


@posix_only
def test_the_chmod_quotes_what_a_shell_would_read(folder: Path) -> None:
    path = written(folder, "", name="it's a file.toml")
    os.chmod(path, 0o666)
    assert command(refused(path)) == f"chmod go-w '{folder}/it'\"'\"'s a file.toml'"


def fstat_of(original, *, uid: int):
    def stat_as(handle, **options):
        values = list(original(handle, **options))
        values[4] = uid
        return os.stat_result(values)

    return stat_as


@posix_only
def test_a_directory_that_is_vouched_for_may_have_any_mode(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(folder, "")
    os.chmod(path, 0o666)
    folder.chmod(0o777)
    for entry in (str(folder.parent), f"/elsewhere{os.pathsep}{folder}"):
        monkeypatch.setenv("TWINKLE_TRUST_FILES", entry)
        assert read(path)[0] == {}
    for entry in ("", "1", "/elsewhere", f"{folder}x", f"{folder}/twinkle.toml/x"):
        monkeypatch.setenv("TWINKLE_TRUST_FILES", entry)
        refused(path)


@posix_only
def test_what_nobody_can_write_for_it_is_mounted_read_only_may_have_any_mode(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(folder, "")
    os.chmod(path, 0o666)
    folder.chmod(0o777)
    facts = os.statvfs(path)

    class ReadOnly:
        f_flag = facts.f_flag | os.ST_RDONLY

    monkeypatch.setattr(os, "statvfs", lambda path: ReadOnly)
    assert read(path)[0] == {}
