"""Patterns: the way with ``re`` and the way without it say the same."""

from __future__ import annotations

import re
import sys

import pytest

from twinkle.hooks.patterns import Patterns
from twinkle.targets import pattern_regex

PATTERNS = ["models.*.modeling_*", "any.**.layers", "v?_ops", "**", "*", "a.***", "*.b", "a?", "??", "x.y.*"]
NAMES = [
    "models.llama.modeling_llama",
    "models.llama.deep.modeling_llama",
    "models..modeling_",
    "any.layers",
    "any.a.layers",
    "any.a.b.layers",
    "v1_ops",
    "v._ops",
    "a.b",
    "a.b.c",
    "a",
    "a.",
    "ab",
    "",
    "x.y.z",
    "x.yz",
    "x.y",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_both_ways_agree_with_the_pattern_as_targets_mean_it(pattern, monkeypatch):
    meant = [pattern_regex(pattern).fullmatch(name) is not None for name in NAMES]
    assert [Patterns((pattern,)).match(name) for name in NAMES] == meant
    with monkeypatch.context() as without:
        without.delitem(sys.modules, "re")
        assert [Patterns((pattern,)).match(name) for name in NAMES] == meant


def test_several_patterns_are_any_of_them():
    both = Patterns(["a.b_*", "a.c_*", "d.*"])
    assert [both.match(name) for name in ("a.b_1", "a.c_1", "d.x", "a.d_1", "b_1")] == [1, 1, 1, 0, 0]
    assert not Patterns(()).match("anything")


def test_re_is_not_needed_and_used_once_it_is_there(monkeypatch):
    found = Patterns(["a.*"])
    compiled = []
    compile_ = re.compile
    monkeypatch.setattr(re, "compile", lambda pattern: compiled.append(pattern) or compile_(pattern))
    with monkeypatch.context() as without:
        without.delitem(sys.modules, "re")
        assert found.match("a.b")
        assert not found.match("a.b.c")
        assert "re" not in sys.modules
    assert compiled == []
    assert found.match("a.b")
    assert found.match("a.c")
    assert len(compiled) == 1
