"""Targets by name and by pattern."""

from __future__ import annotations

import pytest
from torch import nn

from twinkle.errors import ConfigError
from twinkle.targets import Class, Name, Op, Pattern, class_path, defining_match, parse_target


class Base(nn.Module):
    def forward(self, x: object) -> object:
        return x


class Inherits(Base):
    pass


class Overrides(Base):
    def forward(self, x: object) -> object:
        return None


@pytest.mark.parametrize(
    ("pattern", "module", "name", "matches"),
    [
        ("a.b:C", "a.b", "C", True),
        ("a.b:C", "a.bc", "C", False),
        ("a.*.c:D", "a.b.c", "D", True),
        ("a.*.c:D", "a.b.b.c", "D", False),
        ("a.**.c:D", "a.b.b.c", "D", True),
        ("a.b:*MLP", "a.b", "Qwen3MLP", True),
        ("a.b:*MLP", "a.b", "Outer.Qwen3MLP", False),
        ("a.b:?C", "a.b", "DC", True),
        (
            "transformers.models.*.modeling_*:*MLP",
            "transformers.models.qwen2.modeling_qwen2",
            "Qwen2MLP",
            True,
        ),
    ],
)
def test_a_pattern_means(pattern: str, module: str, name: str, matches: bool) -> None:
    cls = type("Named", (), {"__module__": module, "__qualname__": name})
    assert parse_target(pattern).means(cls) is matches


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("a.b:C.D", Name("a.b", "C.D")),
        (" a.b : C ", Name("a.b", "C")),
        ("a.*:C", Pattern("a.*", "C")),
        ("a.b:?C", Pattern("a.b", "?C")),
        ("match:rms_norm", Op("rms_norm")),
    ],
)
def test_a_text_is_a_target_of_one_type(text: str, target: Name | Pattern | Op) -> None:
    assert parse_target(text) == target
    assert parse_target(str(target)) == target


def test_targets_are_the_same_when_type_and_text_are() -> None:
    assert Class(Base) == Class(Base) != Class(Inherits)
    assert Class(Base) != parse_target(class_path(Base))
    assert Op("rms_norm") != Name("match", "rms_norm")
    assert len({Class(Base), Class(Base), Op("rotary"), Op("rotary"), Name("a", "B"), Name("a", "B")}) == 3


@pytest.mark.parametrize("text", ["", "a.b.C", ":C", "a.b:", "a:b:c", "a b:C", "a..b:C", "a.b:1C"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a target"):
        parse_target(text)


def test_a_dot_in_place_of_the_colon_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r'write "a\.b:C"'):
        parse_target("a.b.C")


def test_a_subclass_that_inherits_forward_matches() -> None:
    assert defining_match(Inherits, Class(Base)) is Base


def test_a_subclass_that_overrides_forward_does_not() -> None:
    assert defining_match(Overrides, Class(Base)) is None


def test_a_class_is_found_by_its_path() -> None:
    assert defining_match(Inherits, parse_target(class_path(Inherits))) is Inherits
