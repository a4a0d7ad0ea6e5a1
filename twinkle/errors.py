"""The exceptions and warnings of Twinkle, and the one shape of their messages.

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

__all__ = [
    "ApplyError",
    "ConfigError",
    "KernelError",
    "MissingDependencyError",
    "SourceError",
    "TwinkleError",
    "TwinkleWarning",
    "printable",
    "say",
    "suggest",
    "warn",
]


class TwinkleError(Exception):
    """Anything Twinkle refuses to do.

    The message says what is wrong, and on lines of their own where that is, what was found, what
    was expected and what to do about it.

    Args:
        what: One sentence: what is wrong.
        where: ``file:line (key)`` or the call that brought it in.
        found: What was found there.
        expected: What would have been right.
        fix: What to do.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        found: str | None = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(what, where, found, expected, fix)

    def __str__(self) -> str:
        lines = [_lines(self.what)]
        for label, text in (
            ("where", self.where),
            ("found", self.found),
            ("expected", self.expected),
            ("fix", self.fix),
        ):
            if text is not None:
                lines.append(f"  {label + ':':<10}{printable(text)}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.found, self.expected, self.fix)

    @property
    def reason(self) -> str:
        """The error on one line, as it stands in a report."""
        parts = [self.what]
        if self.found is not None:
            parts.append(f"found {self.found}")
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        return printable("; ".join(parts))


def _rebuild(
    cls: type[TwinkleError],
    what: str,
    where: str | None,
    found: str | None,
    expected: str | None,
    fix: str | None,
) -> TwinkleError:
    return cls(what, where=where, found=found, expected=expected, fix=fix)


class ConfigError(TwinkleError, ValueError):
    """A registration or a configuration that cannot be right, whatever the machine."""


class SourceError(TwinkleError):
    """A kernel that cannot be loaded from where it was said to be."""


class MissingDependencyError(SourceError, ImportError):
    """A source that needs a package which is absent, or whose version does not fit."""


class KernelError(TwinkleError):
    """A kernel that was loaded and does not fit the target it was bound to."""


class ApplyError(TwinkleError, RuntimeError):
    """A binding that could not be put in place although ``strict`` or no fallback was asked for."""


class TwinkleWarning(UserWarning):
    """Something Twinkle left as it was; the message says what and why."""


def suggest(word: str, known: tuple[str, ...] | list[str]) -> str | None:
    """``did you mean …`` for a misspelt word, or ``None``."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else None


def printable(text: str) -> str:
    """``text`` with what a terminal or a log could not take escaped.

    These are control characters and with them the sequences of a terminal, line ends, marks that turn the
    direction of writing, and lone surrogates.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _lines(text: str) -> str:
    """``text`` as :func:`printable` has it, line by line."""
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


def say(text: str, *, end: str = "\n") -> None:
    """Print a line on stderr, where there is one; the one way of every word of Twinkle.

    Nothing goes to stdout, nothing is raised, and nothing stays in a buffer: a closed stderr, a broken pipe
    and a full disk lose the line and leave the exit code of the program as it is.

    Args:
        text: The line, or several; what a terminal would act on is escaped.
        end: What ends it, written as it is.
    """
    import sys

    text = _lines(text) + end

    stream = getattr(sys, "stderr", None)
    if stream is None:  # print() would take stdout
        return
    try:
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        if raw is None:  # the program's own, or a notebook's
            try:
                stream.write(text)
            except UnicodeError:
                stream.write(text.encode("ascii", "backslashreplace").decode())
            stream.flush()
            return
        stream.flush()  # what the program has written comes first
        left = memoryview(text.encode(stream.encoding, "backslashreplace"))
        # Not through the buffer, which Python flushes at exit: what cannot be written would end it with 120.
        while left:
            left = left[raw.write(left) or len(left) :]
    except Exception:
        return


def warn(text: str) -> None:
    """Warn once of something that was left as it was; never an exception, even under ``-W error``.

    The warning stands at the innermost line of the program itself, not at one of Twinkle's, torch's
    or the import system's.
    """
    import sys
    import warnings

    frame = sys._getframe(1)
    while frame.f_back is not None and _is_machinery(frame):
        frame = frame.f_back
    # Not by a stack level: warn() leaves out the frames of imports when it counts.
    names, code = frame.f_globals, frame.f_code
    text = _lines(text)
    registry = names.setdefault("__warningregistry__", {})
    module = str(names.get("__name__", "<unknown>"))
    try:
        warnings.warn_explicit(text, TwinkleWarning, code.co_filename, frame.f_lineno, module, registry)
    except Exception:  # made an error by a filter, or raised by a showwarning of the program's
        say(f"TwinkleWarning: {text}")


def _is_machinery(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    # Generated functions have the globals of the original, and a file name or a free variable of ours.
    code = frame.f_code
    generated = code.co_filename.startswith("<twinkle ") or "_tw" in code.co_freevars
    return generated or package in ("contextlib", "importlib", "torch", "twinkle", "wrapt")
