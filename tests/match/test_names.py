"""Targets by name and by pattern."""

from __future__ import annotations

import pytest
from torch import nn

from twinkle.errors import ConfigError
from twinkle.targets import class_path, defining_match, parse_target


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
    target = parse_target(pattern)
    assert (target.matches_module(module) and target.matches_name(name)) is matches


@pytest.mark.parametrize("text", ["", "a.b.C", ":C", "a.b:", "a:b:c", "a b:C", "a..b:C", "a.b:1C"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a target"):
        parse_target(text)


def test_a_dot_in_place_of_the_colon_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r'write "a\.b:C"'):
        parse_target("a.b.C")


def test_a_subclass_that_inherits_forward_matches() -> None:
    assert defining_match(Inherits, Base) is Base


def test_a_subclass_that_overrides_forward_does_not() -> None:
    assert defining_match(Overrides, Base) is None


def test_a_class_is_found_by_its_path() -> None:
    assert defining_match(Inherits, parse_target(class_path(Inherits))) is Inherits
