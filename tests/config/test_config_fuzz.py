"""Whatever comes in: a valid configuration or one error of ours."""

from __future__ import annotations

import copy
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twinkle import config
from twinkle.config.environment import VARIABLES
from twinkle.config.fields import FUNCTION_KEYS, LAYER_KEYS, SETTING_KEYS
from twinkle.config.schema import validate
from twinkle.errors import TwinkleError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

relaxed = settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

KEYS = sorted({*LAYER_KEYS, *FUNCTION_KEYS, *SETTING_KEYS})
WORDS = [
    "train",
    "cuda:0",
    "auto",
    "m:A",
    "m.f",
    "a/b",
    "*",
    "m.*:*",
    "",
    " ",
    "1",
    ">=1",
    "\n",
    "\0",
    "\ud800",
]
words = st.one_of(st.sampled_from(WORDS), st.text(max_size=8))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words)
names = st.one_of(st.sampled_from(KEYS), words)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=4,
)
specs = st.dictionaries(names, values, max_size=6)
sections = st.one_of(
    values,
    st.dictionaries(words, st.one_of(specs, st.lists(specs, max_size=2)), max_size=3),
    st.lists(specs, max_size=2),
)
documents = st.one_of(
    values,
    st.fixed_dictionaries({}, optional={"twinkle": specs, "layers": sections, "functions": sections}),
)

# Specs that are right more often than not, so that records are reached.
good_layers = st.fixed_dictionaries(
    {"layer_impl": st.just("k:A")},
    optional={
        "target": st.sampled_from(["m:A", "m.*:B*", ["m:A", "m:C"]]),
        "device": st.sampled_from(["cpu", "cuda:1", "auto"]),
        "mode": st.sampled_from(["train", "compile|inference", "auto"]),
        "verify": st.sampled_from(["auto", "off"]),
        "attributes": st.dictionaries(st.sampled_from(["a", "b"]), scalars, max_size=2),
        "enabled": st.booleans(),
    },
)


@contextmanager
def fine_or_one_error(*mentioned: str) -> Iterator[None]:
    """Nothing is raised, or one error of ours that can be printed and mentions its place."""
    try:
        yield
    except TwinkleError as error:
        text = str(error)
        text.encode("utf-8")  # what cannot be printed was escaped
        missing = [word for word in mentioned if word not in text]
        if missing or not error.reason:
            pytest.fail(f"{missing} is not in {text}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    path.chmod(0o755)
    return path


def load_bytes(folder: Path, content: bytes) -> None:
    path = folder / "twinkle.toml"
    path.write_bytes(content)
    path.chmod(0o644)
    with fine_or_one_error(str(path)):
        config.load([str(path)], {}).records()


@relaxed
@given(st.binary(max_size=80))
def test_any_bytes_are_a_configuration_or_one_error(folder: Path, content: bytes) -> None:
    load_bytes(folder, content)


LINES = st.one_of(
    st.sampled_from(["[twinkle]", "[layers]", "[layers.A]", "[[layers.A]]", "[functions.f]", "[layers.A.b]"]),
    st.builds(
        "{} = {}".format, st.sampled_from(KEYS), st.sampled_from(['"m:A"', "1", "true", "[]", "{}", "x"])
    ),
    st.text(alphabet="=[]{}\"'#.,a1 \\", max_size=6),
)


@relaxed
@given(st.lists(LINES, max_size=8), st.sampled_from(["\n", "\r\n", "\r"]))
def test_any_lines_are_a_configuration_or_one_error(folder: Path, lines: list[str], end: str) -> None:
    load_bytes(folder, end.join(lines).encode())


@relaxed
@given(documents, st.booleans())
def test_any_structure_is_a_configuration_or_one_error(document: Any, objects: bool) -> None:
    before = copy.deepcopy(document)
    with fine_or_one_error("train.py:7"):
        validate(document, where="train.py:7", allow_objects=objects).records()
    assert repr(document) == repr(before)


@relaxed
@given(st.dictionaries(st.sampled_from("ABC"), st.lists(good_layers, min_size=1, max_size=2), max_size=3))
def test_right_specs_are_accepted_unless_they_collide(layers: dict[str, list[dict[str, Any]]]) -> None:
    try:
        kernels, _, _ = validate({"layers": layers}).records()
    except TwinkleError as error:
        assert "two kernels for" in str(error) or "bound to two kernel names" in str(error)  # noqa: PT017
    else:
        enabled = [spec for specs in layers.values() for spec in specs if spec.get("enabled", True)]
        assert len(kernels) == len(enabled)


@relaxed
@given(
    st.dictionaries(
        st.sampled_from(sorted(set(VARIABLES) - {"TWINKLE_CONFIG"})) | words.map("TWINKLE_{}".format),
        words
        | st.sampled_from(
            ['A = { layer_impl = "k:A" }', '{"A": {}}', '{"', "[A", "a = 1", "x,y", "{}", "off"]
        ),
        max_size=4,
    )
)
def test_any_variables_are_a_configuration_or_one_error(environ: dict[str, str]) -> None:
    with fine_or_one_error("TWINKLE_"):
        config.load(["auto"], environ, cwd="/").records()


@relaxed
@given(st.text(max_size=12).map(lambda text: text.replace("..", "")))
def test_any_path_is_a_configuration_or_one_error(folder: Path, path: str) -> None:
    with fine_or_one_error():
        config.load([], {"TWINKLE_CONFIG": os.pathsep.join(["auto", path])}, cwd=str(folder))
