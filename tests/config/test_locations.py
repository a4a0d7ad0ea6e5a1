from __future__ import annotations

import pytest

from twinkle.config.locations import Locations, dotted, printable
from twinkle.config.toml import scan

TEXT = "[layers.X]\ndevice = 'cuda'\n\n[layers.X.attributes]\noffset = 0.0\n"


@pytest.fixture
def places() -> Locations:
    return Locations("twinkle.toml", TEXT, scan(TEXT).offsets)


def test_a_key_is_written_with_file_line_and_path(places: Locations) -> None:
    assert places(("layers", "X", "device")) == "twinkle.toml:2 (layers.X.device)"


def test_an_unknown_key_has_the_line_of_its_nearest_parent(places: Locations) -> None:
    assert places(("layers", "X", "attributes", "scale", "deep")) == (
        "twinkle.toml:4 (layers.X.attributes.scale.deep)"
    )


def test_a_key_without_known_parent_has_line_one(places: Locations) -> None:
    assert places.line(("functions", "f")) == 1


def test_a_dict_has_no_lines() -> None:
    assert Locations("train.py:7")(("layers", "X")) == "train.py:7 (layers.X)"


def test_a_prefix_is_shown_and_not_looked_up() -> None:
    text = "\nX = { device = 'cuda' }"
    places = Locations("TWINKLE_LAYERS", text, scan(text).offsets, prefix=("layers",))
    assert places(("layers", "X", "device")) == "TWINKLE_LAYERS:2 (layers.X.device)"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (("layers", "X", 0, "target", 1), "layers.X[0].target[1]"),
        (("layers", "a.b"), "layers.'a.b'"),
        (("layers", ""), "layers.''"),
        (("layers", "a\nb"), "layers.'a\\nb'"),
        ((), ""),
    ],
)
def test_paths_are_written_as_toml_writes_them(path: tuple[str | int, ...], text: str) -> None:
    assert dotted(path) == text


def test_unprintable_names_are_escaped() -> None:
    assert printable("a\n\udcff\x1bé") == "a\\n\\udcff\\x1bé"
