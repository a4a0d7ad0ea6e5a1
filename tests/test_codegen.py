"""Source text compiled at run time: the ``def`` line, and what tracebacks show of it."""

from __future__ import annotations

import inspect
import traceback
from typing import Any

import pytest

from twinkle.codegen import compile_source, def_line


def positional(a, b=1):
    pass


def positional_only(a, /, b):
    pass


def all_positional_only(a, b, /):
    pass


def keyword_only(a, *, b, c=1):
    pass


def rest(a, *args, b, **kwargs):
    pass


def nothing():
    pass


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (positional, "def f(a, b):"),
        (positional_only, "def f(a, /, b):"),
        (all_positional_only, "def f(a, b, /):"),
        (keyword_only, "def f(a, *, b, c):"),
        (rest, "def f(a, *args, b, **kwargs):"),
        (nothing, "def f():"),
    ],
)
def test_a_def_line_has_the_parameters_of_a_signature(function: Any, line: str) -> None:
    assert def_line("f", inspect.signature(function).parameters.values()) == line


def test_defaults_are_expressions_by_name() -> None:
    parameters = inspect.signature(keyword_only).parameters.values()
    assert def_line("f", parameters, {"c": "default_c"}) == "def f(a, *, b, c=default_c):"


def test_a_definition_lands_in_its_scope() -> None:
    scope: dict[str, Any] = {"two": 2}
    compile_source("def f(x):\n    return x * two\n", "doubling", scope)
    assert scope["f"](21) == 42


def test_tracebacks_and_inspect_find_the_text() -> None:
    scope: dict[str, Any] = {}
    compile_source("def f(x):\n    return x / 0\n", "division", scope)
    with pytest.raises(ZeroDivisionError) as caught:
        scope["f"](1)
    assert "return x / 0" in "".join(traceback.format_exception(caught.value))
    assert inspect.getsource(scope["f"]).startswith("def f(x):")


def test_two_texts_of_one_title_have_two_files() -> None:
    one: dict[str, Any] = {}
    other: dict[str, Any] = {}
    compile_source("def f():\n    return 1\n", "twice", one)
    compile_source("def f():\n    return 2\n", "twice", other)
    names = [scope["f"].__code__.co_filename for scope in (one, other)]
    assert names[0] != names[1]
    assert inspect.getsource(one["f"]).endswith("return 1\n")
