"""Messages: nothing in them acts on a terminal, and none of them raises."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from twinkle.errors import ConfigError, TwinkleWarning, say, warn

ROOT = str(Path(__file__).resolve().parents[1])
ODD = ["\x1b[2Jgone", "\x07", "line\r", "\x9b31m", "\u202etxt", "\ud800", "a\x00b", "\x7f"]


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("field", ["what", "where", "found", "expected", "fix"])
def test_a_message_shows_what_a_terminal_would_act_on(field: str, text: str) -> None:
    error = ConfigError(**{"what": "wrong", field: text})
    for shown in (str(error), error.reason):
        assert shown.replace("\n", "").isprintable()


def test_a_value_cannot_add_lines_to_a_message() -> None:
    error = ConfigError("wrong", found="x\n  fix:      rm -rf /")
    assert str(error).splitlines() == ["wrong", "  found:    x\\n  fix:      rm -rf /"]


@pytest.mark.parametrize("text", ODD)
def test_say_and_warn_escape_too(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    say(text)
    assert capfd.readouterr().err.replace("\n", "").isprintable()
    with pytest.warns(TwinkleWarning) as caught:
        warn(text)
    assert str(caught[0].message).isprintable()


class _Ascii(io.StringIO):
    """A stderr of the program's own that takes ASCII only."""

    def write(self, text: str) -> int:
        text.encode("ascii")
        return super().write(text)


def test_a_stream_that_takes_ascii_only_gets_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := _Ascii())
    say("größer 漢 \ud800")
    assert stream.getvalue() == "gr\\xf6\\xdfer \\u6f22 \\\\ud800\n".replace("\\\\ud", "\\ud")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8:strict", "utf-16"])
def test_no_encoding_of_stderr_makes_a_message_fail(encoding: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {ROOT!r})\n"
        "from twinkle.errors import say; say('ü漢\\ud800'); print('on')"
    )
    environ = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=environ, capture_output=True)
    assert done.returncode == 0
    assert done.stdout.decode("utf-16" if encoding == "utf-16" else "ascii").split() == ["on"]
    assert done.stderr
