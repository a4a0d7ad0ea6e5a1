"""A TOML reader that imports nothing and records where each key stands.

``tomllib`` costs 12 to 23 ms at interpreter start (it imports ``re``, ``typing``, ``datetime``), more
than the whole start-up may take, and it gives no line numbers. :func:`scan` walks the text once. A
text of tables, strings, plain numbers, booleans, arrays and inline tables is read completely; when
anything else appears (a date, a hexadecimal number, a table opened twice, a mistake) ``document`` is
``None`` and the caller asks ``tomllib``, which stays the judge of what is TOML. The positions are kept
either way. The tests hold both to the same answer on generated texts.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Path = tuple[str | int, ...]

__all__ = ["MAX_DEPTH", "Scan", "scan"]

MAX_DEPTH = 32

_BARE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPES = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", '"': '"', "\\": "\\"}
_CONTROL = "".join(chr(code) for code in range(32) if chr(code) not in "\t\n") + "\x7f"

# How a table came to be, which decides what may be added to it later.
_HEADER, _IMPLICIT, _DOTTED, _INLINE = "header", "implicit", "dotted", "inline"


class _OddError(Exception):
    """The statement cannot be followed; the scan goes on at the next line."""


class Scan:
    r"""The result of one walk over a text.

    Attributes:
        document: The tables, or ``None`` when only ``tomllib`` can say what the text means.
        text: The text, with ``\n`` line ends.
        offsets: Where each key path starts in ``text``; array elements count as keys (0, 1, …).
        too_deep: Where keys or brackets are nested deeper than :data:`MAX_DEPTH`, if they are.
    """

    __slots__ = ("document", "offsets", "text", "too_deep")

    def __init__(
        self, document: dict[str, Any] | None, text: str, offsets: dict[Path, int], too_deep: int | None
    ) -> None:
        self.document = document
        self.text = text
        self.offsets = offsets
        self.too_deep = too_deep


def scan(text: str) -> Scan:
    """Walk ``text`` once; never raises, whatever the text."""
    scanner = _Scanner(text.replace("\r\n", "\n"))
    scanner.run()
    document = scanner.root if scanner.plain else None
    return Scan(document, scanner.text, scanner.offsets, scanner.too_deep)


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.size = len(text)
        self.at = 0
        self.plain = not any(char in text for char in _CONTROL)
        self.root: dict[str, Any] = {}
        self.table: dict[str, Any] = self.root
        self.path: Path = ()
        self.offsets: dict[Path, int] = {}
        self.too_deep: int | None = None
        # By id: every table stays reachable from the root, so an id is never used twice while the
        # text is plain; when it is not, the kinds no longer decide anything.
        self.kinds: dict[int, str] = {id(self.root): _HEADER}

    # --- statements ---------------------------------------------------------------------------

    def run(self) -> None:
        while True:
            self.skip_blank()
            if self.at >= self.size:
                return
            try:
                if self.text[self.at] == "[":
                    self.header()
                else:
                    self.assignment(self.table, self.path)
                    self.end_of_line()
            except _OddError:
                self.plain = False
                newline = self.text.find("\n", self.at)
                self.at = self.size if newline < 0 else newline + 1

    def header(self) -> None:
        start = self.at
        array = self.text.startswith("[[", start)
        self.at += 2 if array else 1
        keys = self.keys()
        if not self.text.startswith("]]" if array else "]", self.at):
            raise _OddError
        self.at += 2 if array else 1
        self.end_of_line()
        table, path = self.root, ()  # type: tuple[dict[str, Any], Path]
        for key in keys[:-1]:
            table, path = self.step_in(table, path, key, start)
        key = keys[-1]
        path = (*path, key)
        there = table.get(key)
        if array:
            if there is None:
                there = table[key] = []
                self.kinds[id(there)] = _HEADER
                self.offsets[path] = start
            if not isinstance(there, list) or self.kinds.get(id(there)) != _HEADER:
                raise _OddError
            path = (*path, len(there))
            self.table = self.new_table(_HEADER)
            there.append(self.table)
        elif there is None:
            self.table = table[key] = self.new_table(_HEADER)
        elif isinstance(there, dict):
            if self.kinds.get(id(there)) != _IMPLICIT:
                self.plain = False
            self.kinds[id(there)] = _HEADER
            self.table = there
        else:
            raise _OddError
        self.path = path
        self.offsets[path] = start

    def step_in(self, table: dict[str, Any], path: Path, key: str, start: int) -> tuple[dict[str, Any], Path]:
        """Descend one level of a header, into a table or the last table of an array."""
        path = (*path, key)
        there = table.get(key)
        if there is None:
            there = table[key] = self.new_table(_IMPLICIT)
            self.offsets[path] = start
        elif isinstance(there, list) and self.kinds.get(id(there)) == _HEADER:
            path = (*path, len(there) - 1)
            there = there[-1]
        elif self.kinds.get(id(there)) not in (_HEADER, _IMPLICIT):
            self.plain = False
        if not isinstance(there, dict):
            raise _OddError
        return there, path

    def assignment(self, table: dict[str, Any], path: Path, depth: int = 0) -> None:
        start = self.at
        keys = self.keys()
        if not self.text.startswith("=", self.at):
            raise _OddError
        self.at += 1
        for key in keys[:-1]:
            path = (*path, key)
            self.offsets.setdefault(path, start)
            there = table.get(key)
            if there is None:
                there = table[key] = self.new_table(_DOTTED)
            elif not isinstance(there, dict):
                raise _OddError
            elif self.kinds.get(id(there)) != _DOTTED:
                self.plain = False
            table = there
        path = (*path, keys[-1])
        self.offsets.setdefault(path, start)
        self.skip_space()
        value = self.value(path, depth)
        if keys[-1] in table:
            self.plain = False
        table[keys[-1]] = value

    def keys(self) -> list[str]:
        start = self.at
        keys = []
        while True:
            self.skip_space()
            keys.append(self.key())
            self.skip_space()
            if not self.text.startswith(".", self.at):
                break
            self.at += 1
        if len(keys) > MAX_DEPTH:
            self.deep(start)
        return keys

    def key(self) -> str:
        text, start = self.text, self.at
        if text.startswith('"', start):
            return self.basic_string()
        if text.startswith("'", start):
            return self.literal_string()
        at = start
        while at < self.size and text[at] in _BARE:
            at += 1
        if at == start:
            raise _OddError
        self.at = at
        return text[start:at]

    # --- values -------------------------------------------------------------------------------

    def value(self, path: Path, depth: int) -> Any:
        text, at = self.text, self.at
        if depth > MAX_DEPTH:
            self.deep(at)
        first = text[at : at + 1]
        if first == '"':
            return self.long_string('"""') if text.startswith('"""', at) else self.basic_string()
        if first == "'":
            return self.long_string("'''") if text.startswith("'''", at) else self.literal_string()
        if first == "[":
            return self.array(path, depth)
        if first == "{":
            return self.inline_table(path, depth)
        return self.word()

    def array(self, path: Path, depth: int) -> list[Any]:
        self.at += 1
        values: list[Any] = []
        while True:
            self.skip_blank()
            if self.text.startswith("]", self.at):
                self.at += 1
                return values
            element = (*path, len(values))
            self.offsets[element] = self.at
            values.append(self.value(element, depth + 1))
            self.skip_blank()
            if self.text.startswith(",", self.at):
                self.at += 1
            elif not self.text.startswith("]", self.at):
                raise _OddError

    def inline_table(self, path: Path, depth: int) -> dict[str, Any]:
        self.at += 1
        table = self.new_table(_INLINE)
        self.skip_inline()
        if self.text.startswith("}", self.at):
            self.at += 1
            return table
        while True:
            self.assignment(table, path, depth + 1)
            self.skip_inline()
            if self.text.startswith("}", self.at):
                self.at += 1
                return table
            if not self.text.startswith(",", self.at):
                raise _OddError
            self.at += 1
            self.skip_inline()
            if self.text.startswith("}", self.at):  # a trailing comma: TOML 1.1
                self.plain = False
                self.at += 1
                return table

    def word(self) -> Any:
        """Read a boolean or a number; leave anything else up to the next delimiter to ``tomllib``."""
        text, start = self.text, self.at
        at = start
        while at < self.size and text[at] not in ",]}# \t\n":
            at += 1
        self.at = at
        word = text[start:at]
        if word == "true":
            return True
        if word == "false":
            return False
        number = _number(word)
        if number is None:
            self.plain = False
            while at < self.size and text[at] not in ",]}#\n":
                at += 1
            self.at = at
        return number

    def literal_string(self) -> str:
        start = self.at + 1
        end = self.text.find("'", start)
        value = self.text[start:end]
        if end < 0 or "\n" in value:
            raise _OddError
        self.at = end + 1
        return value

    def basic_string(self) -> str:
        text, start = self.text, self.at + 1
        end = text.find('"', start)
        if end < 0:
            raise _OddError
        value = text[start:end]
        if "\\" not in value:
            if "\n" in value:
                raise _OddError
            self.at = end + 1
            return value
        parts: list[str] = []
        at = start
        while True:
            char = text[at : at + 1]
            if char == '"':
                self.at = at + 1
                return "".join(parts)
            if char in ("", "\n"):
                raise _OddError
            if char != "\\":
                parts.append(char)
                at += 1
                continue
            escape = text[at + 1 : at + 2]
            at += 2
            if escape in _ESCAPES:
                parts.append(_ESCAPES[escape])
                continue
            digits = {"u": 4, "U": 8}.get(escape, 0)
            code = text[at : at + digits]
            if not digits or len(code) < digits or not _HEX.issuperset(code):
                self.plain = False
                continue
            at += digits
            point = int(code, 16)
            if point > 0x10FFFF or 0xD800 <= point <= 0xDFFF:
                self.plain = False
                continue
            parts.append(chr(point))

    def long_string(self, quotes: str) -> str:
        text = self.text
        start = self.at + 3
        end = text.find(quotes, start)
        if quotes == '"""':
            slash = text.find("\\", start)
            if 0 <= slash < end:
                self.plain = False
            while 0 <= slash < end:
                end = text.find(quotes, max(end, slash + 2))
                slash = text.find("\\", slash + 2)
        if end < 0:
            raise _OddError
        # Up to two quotes may stand directly before the closing three.
        for _ in range(2):
            if text.startswith(quotes[0], end + 3):
                end += 1
        self.at = end + 3
        if text.startswith("\n", start):
            start += 1
        return text[start:end]

    # --- between ------------------------------------------------------------------------------

    def skip_space(self) -> None:
        text, at = self.text, self.at
        while text[at : at + 1] in (" ", "\t"):
            at += 1
        self.at = at

    def skip_blank(self) -> None:
        """Skip spaces, line ends and comments."""
        text, at = self.text, self.at
        while at < self.size:
            char = text[at]
            if char == "#":
                newline = text.find("\n", at)
                at = self.size if newline < 0 else newline
            elif char in " \t\n":
                at += 1
            else:
                break
        self.at = at

    def skip_inline(self) -> None:
        """Skip spaces inside an inline table; line ends there are TOML 1.1."""
        self.skip_space()
        if self.text[self.at : self.at + 1] in ("\n", "#"):
            self.plain = False
            self.skip_blank()

    def end_of_line(self) -> None:
        self.skip_space()
        if self.text.startswith("#", self.at):
            newline = self.text.find("\n", self.at)
            self.at = self.size if newline < 0 else newline
        if self.at < self.size and self.text[self.at] != "\n":
            raise _OddError

    def new_table(self, kind: str) -> dict[str, Any]:
        table: dict[str, Any] = {}
        self.kinds[id(table)] = kind
        return table

    def deep(self, offset: int) -> None:
        if self.too_deep is None:
            self.too_deep = offset
        raise _OddError


def _number(word: str) -> int | float | None:
    """A decimal integer or float in its plain spelling, else ``None``."""
    digits = word[1:] if word[:1] in ("+", "-") else word
    if _digits(digits):
        return int(word) if digits == "0" or digits[0] != "0" else None
    mantissa, _, exponent = digits.replace("E", "e").partition("e")
    if "e" in digits or "E" in digits:
        if not _digits(exponent[1:] if exponent[:1] in ("+", "-") else exponent):
            return None
    elif "." not in digits:
        return None
    whole, point, fraction = mantissa.partition(".")
    if not _digits(whole) or (len(whole) > 1 and whole[0] == "0") or (point and not _digits(fraction)):
        return None
    return float(word)


def _digits(text: str) -> bool:
    # 18 digits fit in 64 bits; a longer number is tomllib's to judge.
    return text.isascii() and text.isdigit() and len(text) <= 18
