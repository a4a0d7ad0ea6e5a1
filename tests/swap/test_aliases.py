"""Aliases: every name that holds an object is found, rebound and restored, and nothing is triggered."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys

import pytest

from twinkle.hooks.imports import watch_module
from twinkle.swap import aliases

pytestmark = pytest.mark.usefixtures("clean_hooks")


@pytest.fixture
def original(write):
    """A function and modules that took it in every way."""
    write(
        {
            "tw_defines.py": """
            def f(x):
                return x + 1
        """,
            "tw_takes.py": """
            from tw_defines import f
            from tw_defines import f as other_name
            class Holder:
                bare = f
                static = staticmethod(f)
                def method(self, act=f):
                    return act(1)
            def call():
                return f(1)
        """,
            "tw_keeps.py": """
            import functools
            from tw_defines import f as _f
            table = {"f": _f}
            row = [_f]
            pair = (_f, 1)
            group = {_f}
            part = functools.partial(_f, 1)
            inside = functools.partial(map, _f)
            def default(x=_f): return x
            def keyword(*, x=_f): return x
            def closure(f=_f):
                def inner(): return kept
                kept = f
                return inner
            kept_in = closure()
            def unrelated(x=1): return x
            del _f
        """,
            "tw_package/__init__.py": "from .inner import *",
            "tw_package/inner.py": "from tw_defines import f",
        }
    )
    for name in ("tw_takes", "tw_package"):
        importlib.import_module(name)
    return sys.modules["tw_defines"].f


def replacement(x):
    return x + 100


def places(found):
    return sorted(alias.where for alias in found)


NAMES = [
    "tw_defines.f",
    "tw_package.f",
    "tw_package.inner.f",
    "tw_takes.Holder.bare",
    "tw_takes.Holder.static",
    "tw_takes.f",
    "tw_takes.other_name",
]


def test_every_name_is_found_by_identity(original):
    assert places(aliases.find(original)) == NAMES


def test_an_equal_object_is_no_alias(original, write):
    class Equal:
        def __eq__(self, other):
            raise AssertionError("compared")

        __hash__ = None

    sys.modules["tw_takes"].equal = Equal()
    assert places(aliases.find(original)) == NAMES


def test_names_are_rebound_and_restored(original):
    changed = aliases.rebind(original, replacement)
    assert places(changed) == NAMES
    takes = sys.modules["tw_takes"]
    assert takes.call() == 101
    assert takes.Holder.static(1) == 101
    assert takes.Holder().static(1) == 101
    assert aliases.find(original) == []
    assert aliases.restore(changed) == []
    assert takes.call() == 2
    assert takes.Holder.static(1) == 2
    assert places(aliases.find(original)) == NAMES


def test_a_name_that_someone_else_has_changed_is_left_and_told(original):
    changed = aliases.rebind(original, replacement)
    takes = sys.modules["tw_takes"]
    takes.f = theirs = object()
    assert [alias.where for alias in aliases.restore(changed)] == ["tw_takes.f"]
    assert takes.f is theirs
    assert takes.other_name is original


def test_a_name_taken_after_the_replacement_needs_nothing(write):
    write({"tw_defines.py": "def f(): return 1", "tw_late.py": "from tw_defines import f\nvalue = f()"})
    watch_module("tw_defines", lambda module, name: aliases.rebind(module.f, lambda: 2))
    assert importlib.import_module("tw_late").value == 2


def test_a_name_taken_in_a_circle_is_rebound_by_a_hook_at_the_end_of_the_import(write):
    write(
        {
            "tw_circle.py": "def f(): return 1\nimport tw_taker\nclass Own:\n    act = staticmethod(f)\n",
            "tw_taker.py": "from tw_circle import f",
        }
    )
    seen = []
    watch_module("tw_circle", lambda module, name: seen.extend(aliases.rebind(module.f, lambda: 2)))
    module = importlib.import_module("tw_circle")
    assert places(seen) == ["tw_circle.Own.act", "tw_circle.f", "tw_taker.f"]
    assert sys.modules["tw_taker"].f() == module.f() == module.Own.act() == 2


def test_at_the_end_of_an_import_only_newer_modules_are_read(write):
    write(
        {
            "tw_old.py": "length = len",
            "tw_new.py": "def f(): return 1\nimport tw_newer",
            "tw_newer.py": "from tw_new import f\nlength = len",
        }
    )
    old = importlib.import_module("tw_old")
    found = []

    def callback(module, name):
        old.f = module.f  # nobody can have taken it before it was there
        found.extend([places(aliases.find(module.f)), places(aliases.find(len, target="tw_new"))])

    watch_module("tw_new", callback)
    module = importlib.import_module("tw_new")
    assert found == [["tw_new.f", "tw_newer.f"], ["tw_newer.length"]]
    assert places(aliases.find(module.f)) == ["tw_new.f", "tw_newer.f", "tw_old.f"]
    assert {"tw_newer.length", "tw_old.length"} <= set(places(aliases.find(len, target="tw_new")))


def test_the_originals_that_twinkle_keeps_are_left(original):
    ours = sys.modules["twinkle.tw_keeps"] = type(sys)("twinkle.tw_keeps")
    ours.kept = original
    try:
        assert places(aliases.find(original)) == NAMES
    finally:
        del sys.modules["twinkle.tw_keeps"]


def test_a_class_is_found_and_rebound_too(write):
    write({"tw_defines.py": "class C: pass", "tw_takes.py": "from tw_defines import C as K"})
    takes = importlib.import_module("tw_takes")
    new = type("C", (), {})
    changed = aliases.rebind(takes.K, new)
    assert places(changed) == ["tw_defines.C", "tw_takes.K"]
    assert takes.K is new


def test_no_lazy_module_is_loaded_and_no_attribute_is_looked_up(original, write):
    write({"tw_lazy.py": "raise AssertionError('loaded')"})
    spec = importlib.util.find_spec("tw_lazy")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    lazy = sys.modules["tw_lazy"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lazy)

    class Touchy(type(sys)):
        def __getattribute__(self, name):
            raise AssertionError(f"{name} was looked up")

    class Meta(type):
        def __getattribute__(cls, name):
            raise AssertionError(f"{name} was looked up")

    sys.modules["tw_touchy"] = Touchy("tw_touchy")
    sys.modules["tw_takes"].Touchy = Meta("Touchy", (), {"__module__": "tw_takes", "f": original})
    sys.modules["tw_none"] = None
    sys.modules["tw_object"] = object()
    try:
        found = aliases.find(original)
    finally:
        for name in ("tw_touchy", "tw_none", "tw_object", "tw_lazy"):
            del sys.modules[name]
        del sys.modules["tw_takes"].Touchy
    assert len(found) == len(NAMES) + 1
    assert type(lazy).__name__ == "_LazyModule"


def test_a_module_under_two_names_counts_once(original):
    sys.modules["tw_second_name"] = sys.modules["tw_takes"]
    assert places(aliases.find(original)) == NAMES


def test_a_partial_is_no_alias_of_its_function(original):
    sys.modules["tw_takes"].part = functools.partial(original)
    assert places(aliases.find(original)) == NAMES
