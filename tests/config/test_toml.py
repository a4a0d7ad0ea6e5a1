from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from twinkle.config.toml import MAX_DEPTH, scan

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PLAIN = dedent(
    '''\
    # a comment
    top = "a # no comment"  # a comment
    [twinkle]
    strict = true
    verify = 'off'
    [layers."My.MLP"]
    target = [
        "a:B",   # first
        'c:D',
    ]
    attributes = { offset = 0.5, names.first = "x", list = [1, -2, [3e2]] }
    text = """
    one "two" ""three
    four"""
    raw = \'\'\'C:\\path\'\'\'
    escaped = "tab\\t quote\\" \\u00e9 \\U0001F600"
    [[functions.add]]
    device = "cpu"
    [[functions.add]]
    device = "cuda"
    [functions.add.sub]
    x = 1
    '''
)


def same(left: object, right: object) -> bool:
    """Equal in value and in type: 1, 1.0 and true are three things."""
    return repr(left) == repr(right)


def line_of(text: str, *path: str | int) -> int:
    found = scan(text)
    return found.text.count("\n", 0, found.offsets[path]) + 1


def test_plain_text_is_read_as_tomllib_reads_it() -> None:
    assert same(scan(PLAIN).document, tomllib.loads(PLAIN))


@pytest.mark.parametrize(
    "value",
    [
        "0",
        "-0",
        "+7",
        "123",
        "1.5",
        "-0.0",
        "1e3",
        "1E-3",
        "6.02e+23",
        "true",
        "false",
        "''",
        '""',
        "[]",
        "{}",
        "[1,2,]",
        "[ [ ], [[]] ]",
        "{ a = 1, b = { c = [ { d = 2 } ] } }",
        '"\\\\"',
        '"a\\\\"',
        "'''x'''",
        '"""x"""',
        '"""""x"""""',
        "'''''x'''''",
        "'''\n\nx'''",
        "[\n1, # one\n\n2\n]",
    ],
)
def test_value_is_read_without_tomllib(value: str) -> None:
    text = f"key = {value}\n"
    assert same(scan(text).document, tomllib.loads(text))


@pytest.mark.parametrize(
    "text",
    [
        "day = 1979-05-27",
        "when = 1979-05-27 07:32:00",
        "n = 0xff",
        "n = 1_000",
        "n = inf",
        "n = nan",
        'a = """one \\\n   two"""',
        'a = """x\\""" y"""',
        "n = " + "9" * 30,
    ],
)
def test_unusual_toml_is_left_to_tomllib(text: str) -> None:
    tomllib.loads(text)  # it is TOML
    assert scan(text).document is None


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a =",
        "= 1",
        "[a",
        "[a]]",
        "[[a]",
        "[ [a]]",
        "[]",
        "a = 1 b = 2",
        "a = 01",
        "a = 1.",
        "a = .5",
        "a = 1e",
        "a = +",
        "a = tru",
        "a = True",
        "a = x",
        'a = "',
        "a = 'x\n'",
        'a = "\\q"',
        'a = "\\ud800"',
        "a = 1\na = 2",
        "[a]\n[a]",
        "a = 1\n[a]",
        "[a]\nb = 1\n[a.b]",
        "[[a]]\n[a]",
        "[a]\n[[a]]",
        "a.b = 1\n[a]",
        "a = {b = 1}\n[a.c]",
        "a = {b = 1}\na.c = 2",
        "a = []\n[[a]]",
        "a = [{}]\n[a.b]",
        "[a.b]\nc.d = 1\n[a]\nb.c.e = 2",
        "a = {b = 1, b = 2}",
        "a = {b.c = 1, b = 2}",
        "a = {,}",
        "a = [,]",
        "a = [1 2]",
        "a = 1 # \x00",
        "a = '\x7f'",
        "a = 1\r",
        '"""a""" = 1',
        "a..b = 1",
        "a. = 1",
    ],
)
def test_what_tomllib_refuses_is_not_read(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (its message is not ours)
        tomllib.loads(text)
    assert scan(text).document is None


def test_windows_line_ends_are_line_ends() -> None:
    text = '[twinkle]\r\nlog = "info"\r\n'
    assert scan(text).document == {"twinkle": {"log": "info"}}
    assert line_of(text, "twinkle", "log") == 2


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("top",), 2),
        (("twinkle",), 3),
        (("twinkle", "verify"), 5),
        (("layers", "My.MLP"), 6),
        (("layers", "My.MLP", "target"), 7),
        (("layers", "My.MLP", "target", 1), 9),
        (("layers", "My.MLP", "attributes", "names", "first"), 11),
        (("layers", "My.MLP", "raw"), 15),
        (("functions", "add", 0, "device"), 18),
        (("functions", "add", 1), 19),
        (("functions", "add", 1, "device"), 20),
        (("functions", "add", 1, "sub", "x"), 22),
    ],
)
def test_key_has_its_line(path: tuple[str | int, ...], line: int) -> None:
    assert line_of(PLAIN, *path) == line


@pytest.mark.parametrize(
    "odd",
    [
        "day = 1979-05-27 07:32:00Z",
        "n = [0xff, 1_0]",
        'a = """x\\"""\n[no]\ny"""',
        "a = {\n x = 1,\n}",
        "[",
        "x",
    ],
)
def test_keys_after_something_odd_still_have_their_lines(odd: str) -> None:
    text = f"[a]\n{odd}\n[twinkle]\nlog = 'info'\n"
    assert line_of(text, "twinkle", "log") == text.count("\n")


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 5000, "a = " + "{a=" * 5000, ".".join(["a"] * 5000) + " = 1"]
)
def test_endless_nesting_is_noticed(text: str) -> None:
    assert scan(text).too_deep is not None


def test_nesting_within_the_limit_is_read() -> None:
    depth = MAX_DEPTH - 1
    text = "a = " + "[" * depth + "]" * depth
    assert scan(text).too_deep is None
    assert same(scan(text).document, tomllib.loads(text))


def test_reading_plain_toml_imports_nothing_more() -> None:
    code = (
        "import sys; from twinkle.config.toml import scan; before = set(sys.modules);"
        f"assert scan({PLAIN!r}).document; print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- fuzz -----------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    ["a", "b", "c", "a.b", "b.c", "a.b.c", '"a"', "'b'", "a . c", '"\\u0061"', "1", "-", '""']
)
SCALARS = st.sampled_from(
    [
        "1",
        "-1",
        "+0",
        "01",
        "1.0",
        "1.",
        "1e5",
        "1_0",
        "0x1f",
        "true",
        "false",
        "True",
        "nan",
        "1979-05-27",
        '"x"',
        "'x'",
        '""',
        '"\\n"',
        '"\\x"',
        '"""a"b"""',
        "'''a\n'b'''",
        '"""\\\n  a"""',
        '"""a\\""""',
        "",
        '"""a""""',
        "'''a'''''",
        "07:32:00",
        "1979-05-27 07:32:00",
        '"é"',
        '"\\"',
        "'\\'",
        "0.0e-0",
        "-.1",
    ]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[" + ", ".join(items) + "]"),
        st.lists(inner, max_size=3).map(lambda items: "[\n" + ",\n".join(items) + ", # end\n]"),
        st.lists(st.tuples(KEYS, inner), max_size=3).map(
            lambda items: "{" + ", ".join(f"{key} = {value}" for key, value in items) + "}"
        ),
    ),
    max_leaves=5,
)
STATEMENTS = st.one_of(
    st.builds("{} = {}".format, KEYS, VALUES),
    st.builds("{}={} # c".format, KEYS, VALUES),
    KEYS.map("[{}]".format),
    KEYS.map("[[{}]]".format),
    st.sampled_from(["", "  ", "# note", "\t", "[ a ]", "[[ a.b ]] # c", "=", "]", "}"]),
)
TEXTS = st.builds(
    lambda statements, end: end.join(statements),
    st.lists(STATEMENTS, max_size=8),
    st.sampled_from(["\n", "\r\n", "\n", " \n"]),
)


def judge(text: str) -> object:
    """What ``tomllib`` reads, or ``None`` when it refuses."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError):
        return None


@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TEXTS)
@example("a.b = 1\n[a.c]")
@example("[[a]]\nb.c = 1\n[a.b]")
def test_what_is_read_is_what_tomllib_reads(text: str) -> None:
    document = scan(text).document
    if document is not None:
        assert same(document, judge(text))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab=.[]{}\"'\\#\n\r\t ,10u-e+_t", max_size=60))
def test_any_characters_are_read_as_tomllib_reads_them_or_left(text: str) -> None:
    document = scan(text).document
    if document is not None:
        assert same(document, judge(text))


def paths_of(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path]
    for key, inner in pairs:
        found += paths_of(inner, (*path, key))
    return found


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TEXTS)
def test_every_key_that_tomllib_reads_has_a_place(text: str) -> None:
    document = judge(text)
    if document is not None:
        assert set(paths_of(document)) - {()} <= set(scan(text).offsets)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TEXTS)
def test_a_key_stands_where_its_name_is(text: str) -> None:
    found = scan(text)
    if judge(text) is None:
        return
    for path, offset in found.offsets.items():
        line = found.text[offset:].partition("\n")[0]
        assert line.strip(), path
