"""Every word of Twinkle goes to stderr, or nowhere: never to stdout, and never at the program's cost."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import sys
import warnings
from pathlib import Path

import pytest

import twinkle
from twinkle.errors import TwinkleWarning, say, warn

PACKAGE = Path(twinkle.__file__).parent


class Raises:
    encoding = "utf-8"

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def write(self, text: str) -> None:
        raise self.error

    def flush(self) -> None:
        raise self.error


STREAMS = {
    "none": lambda: None,
    "closed": lambda: _closed(io.StringIO()),
    "broken pipe": lambda: Raises(BrokenPipeError()),
    "value": lambda: Raises(ValueError("I/O operation on closed file")),
    "anything": lambda: Raises(RuntimeError("a stream of the program's")),
    "no stream": lambda: object(),
    "full disk": lambda: open("/dev/full", "w"),  # noqa: SIM115
    "read only": lambda: open(os.devnull),  # noqa: SIM115
    "descriptor that is gone": lambda: _gone(),
}


def _closed(stream):
    stream.close()
    return stream


def _gone():
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS.keys())
def test_what_cannot_be_said_is_lost_and_nothing_stays_behind(make, monkeypatch, capsys):
    stream = make()
    monkeypatch.setattr(sys, "stderr", stream)
    say("a word")
    monkeypatch.undo()
    if isinstance(stream, io.TextIOWrapper):
        stream.close()  # raises where something is left in the buffer
    assert capsys.readouterr().out == ""


def test_stderr_that_is_deleted(monkeypatch, capsys):
    monkeypatch.delattr(sys, "stderr")
    say("a word")
    monkeypatch.undo()
    assert capsys.readouterr().out == ""


def test_words_come_behind_what_the_program_wrote_and_can_be_redirected(tmp_path):
    with open(tmp_path / "words", "w") as stream, contextlib.redirect_stderr(stream):
        stream.write("first ")
        say("second")
    assert (tmp_path / "words").read_text() == "first second\n"
    with contextlib.redirect_stderr(io.StringIO()) as kept:
        say("kept")
    assert kept.getvalue() == "kept\n"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_characters_that_the_encoding_does_not_have_are_escaped(encoding, tmp_path):
    with (
        open(tmp_path / "words", "w", encoding=encoding) as stream,
        contextlib.redirect_stderr(stream),
    ):
        say("…\ud800")
    assert (tmp_path / "words").read_text(encoding) in ("\\u2026\\ud800\n", "…\\ud800\n")


def test_a_showwarning_that_raises_is_no_error_of_the_program(monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("a logger that is closed")

    with warnings.catch_warnings():
        warnings.simplefilter("always", TwinkleWarning)
        monkeypatch.setattr(warnings, "showwarning", broken)
        warn("left as it was")
    assert "left as it was" in capsys.readouterr().err


def test_nothing_of_the_package_writes_to_stderr_in_another_way():
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            to = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "file"]
            if "sys.stderr" in to or ast.unparse(node.func) in ("sys.stderr.write", "sys.stdout.write"):
                found.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert found == []


def test_only_commands_print():
    found = [
        f"{file.relative_to(PACKAGE)}:{node.lineno}"
        for file in PACKAGE.rglob("*.py")
        if file.parent.name != "cli"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert found == []
