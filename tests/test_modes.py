"""Which kernel goes first in which situation."""

from __future__ import annotations

import pytest

from twinkle.errors import ConfigError
from twinkle.modes import Mode, rank

ALL = ("train", "inference", "compile", "train|compile", "inference|compile", None)


def order(*, training: bool, compiling: bool) -> list[str | None]:
    ranked = [(rank(Mode.parse(text), training=training, compiling=compiling), text) for text in ALL]
    kept = [(place, text) for place, text in ranked if place is not None]
    assert len({place for place, _ in kept}) == len(kept), "two modes share a place"
    return [text for _, text in sorted(kept, key=lambda pair: pair[0])]


def test_training_never_uses_an_inference_kernel() -> None:
    assert order(training=True, compiling=False) == ["train", "train|compile", None]


def test_inference_may_use_a_training_kernel() -> None:
    assert order(training=False, compiling=False) == [
        "inference",
        "inference|compile",
        "train",
        "train|compile",
        None,
    ]


def test_compiled_training_prefers_what_was_registered_for_compile() -> None:
    assert order(training=True, compiling=True) == ["train|compile", "compile", None, "train"]


def test_compiled_inference_prefers_what_was_registered_for_compile() -> None:
    assert order(training=False, compiling=True) == [
        "inference|compile",
        "compile",
        "train|compile",
        None,
        "inference",
        "train",
    ]


@pytest.mark.parametrize("text", ALL)
def test_a_kernel_that_cannot_be_compiled_is_not_traced(text: str | None) -> None:
    mode = Mode.parse(text)
    assert rank(mode, training=True, compiling=True, can_torch_compile=False) is None


@pytest.mark.parametrize(("text", "shown"), [("compile | train", "train|compile"), ("COMPILE", "compile")])
def test_spelling_is_normalised(text: str, shown: str) -> None:
    assert str(Mode.parse(text)) == shown


def test_order_of_words_does_not_matter() -> None:
    assert Mode.parse("compile|train") == Mode.parse("train|compile")


@pytest.mark.parametrize("text", [None, "auto"])
def test_auto_is_any_mode(text: str | None) -> None:
    assert Mode.parse(text) is None


@pytest.mark.parametrize("value", ["", "trian", "train,compile", 3, True, "train|"])
def test_an_unknown_mode_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="unknown mode"):
        Mode.parse(value)


def test_a_misspelt_mode_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        Mode.parse("trian")
