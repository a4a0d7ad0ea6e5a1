"""`capture` and `capture_memory`: in a file, as variables, in force, and in what the commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from twinkle import config
from twinkle._bootstrap import settle
from twinkle.cli import main
from twinkle.config.amounts import memory, size_in_words
from twinkle.errors import ConfigError
from twinkle.options import Options
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from pathlib import Path

KEYS = {"capture", "capture_memory"}


def from_file(tmp_path: Path, text: str) -> config.Settings:
    tmp_path.chmod(0o755)
    path = tmp_path / "t.toml"
    path.write_text(f"[twinkle]\n{text}\n", encoding="utf-8")
    path.chmod(0o644)
    return config.load([path], {}, cwd=str(tmp_path))


def from_variables(**variables: str) -> config.Settings:
    return config.load(["auto"], {f"TWINKLE_{name}": text for name, text in variables.items()}, cwd="/work")


def test_by_default_a_tenth_of_the_device_may_hold_captures(tmp_path: Path) -> None:
    for settings in (config.load([], {}), from_file(tmp_path, "strict = false"), Options()):
        assert (settings.capture, settings.capture_memory) == ("auto", 0.1)


@pytest.mark.parametrize("word", ["auto", "off", "inference", "train"])
def test_capture_is_one_of_four_words(tmp_path: Path, word: str) -> None:
    assert from_file(tmp_path, f'capture = "{word}"').capture == word
    assert from_variables(CAPTURE=word).capture == word


@pytest.mark.parametrize(
    ("written", "amount"),
    [
        ("0.25", 0.25),
        ("1", 1.0),
        ("1.0", 1.0),
        ('"0.25"', 0.25),
        ('"2GiB"', 2 * 1024**3),
        ('"500MB"', 500_000_000),
        ('"1.5 gib"', 3 * 1024**3 // 2),
        ('"64 KiB"', 65536),
        ('"4096B"', 4096),
        ('"1TB"', 10**12),
    ],
)
def test_an_amount_is_a_share_or_a_size(tmp_path: Path, written: str, amount: float) -> None:
    for settings in (
        from_file(tmp_path, f"capture_memory = {written}"),
        from_variables(CAPTURE_MEMORY=written.strip('"')),
    ):
        assert settings.capture_memory == amount
        assert type(settings.capture_memory) is type(amount)


@pytest.mark.parametrize(
    ("line", "found", "expected", "fix"),
    [
        ("capture = 'of'", "'of' (a string)", "auto, off, inference or train", "did you mean 'off'?"),
        (
            "capture = 'training'",
            "'training' (a string)",
            "auto, off, inference or train",
            "did you mean 'train'",
        ),
        ("capture = true", "True (a boolean)", "auto, off, inference or train", 'write "auto"'),
        ("capture_memory = 1.5", "1.5 (a float)", "a share of the device", '"2GiB"'),
        ("capture_memory = -0.1", "-0.1 (a float)", "above 0, at most 1", '"2GiB"'),
        ("capture_memory = nan", "nan (a float)", "a share of the device", '"2GiB"'),
        ("capture_memory = 2147483648", "2147483648 (an integer)", "or a size", '"2GiB"'),
        ("capture_memory = true", "True (a boolean)", "a share of the device", '"2GiB"'),
        ("capture_memory = '2G'", "'2G' (a string)", "or a size", '"2GiB"'),
        ("capture_memory = '2.GiB5'", "'2.GiB5' (a string)", "or a size", '"2GiB"'),
        ("capture_memory = '10%'", "'10%' (a string)", "a share of the device", '"2GiB"'),
        ("capture_memory = '1e-1'", "'1e-1' (a string)", "a share of the device", '"2GiB"'),
        ("capture_memory = ''", "'' (a string)", "a share of the device", '"2GiB"'),
        ("capture_memory = '0.4B'", "'0.4B' (a string)", "a share of the device", '"2GiB"'),
        ("capture_memory = 0", "0 (an integer)", "above 0", 'capture = "off"'),
        ("capture_memory = 'off'", "'off' (a string)", "above 0", 'capture = "off"'),
    ],
)
def test_a_mistake_says_where_and_what_to_write(
    tmp_path: Path, line: str, found: str, expected: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_file(tmp_path, line)
    error = caught.value
    assert str(error.where).endswith(f"t.toml:2 (twinkle.{line.partition(' ')[0]})")
    assert error.found == found
    assert expected in str(error.expected)
    assert fix in str(error.fix)


@pytest.mark.parametrize(
    ("variable", "text", "fix"),
    [
        ("CAPTURE", "infrence", "did you mean 'inference'?"),
        ("CAPTURE", "1", "set TWINKLE_CAPTURE"),
        ("CAPTURE_MEMORY", "lots", "set TWINKLE_CAPTURE_MEMORY"),
        ("CAPTURE_MEMORY", "0", 'capture = "off"'),
    ],
)
def test_a_mistake_in_a_variable_names_it(variable: str, text: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_variables(**{variable: text})
    assert caught.value.where == f"environment variable TWINKLE_{variable}"
    assert text in str(caught.value.found)
    assert fix in str(caught.value.fix)


@pytest.mark.parametrize(
    ("word", "with_gradients", "without"),
    [("auto", True, True), ("off", False, False), ("inference", False, True), ("train", True, False)],
)
def test_a_mode_restricts_to_calls_of_one_kind(word: str, with_gradients: bool, without: bool) -> None:
    options = Options()
    options.capture = word
    assert options.captures(gradients=True) is with_gradients
    assert options.captures(gradients=False) is without


@pytest.mark.parametrize(
    ("amount", "most"), [(0.25, 2 << 30), (1.0, 8 << 30), (1 << 30, 1 << 30), (1 << 40, 8 << 30)]
)
def test_a_bound_is_in_bytes_of_the_device(amount: float, most: int) -> None:
    options = Options()
    options.capture_memory = amount
    assert options.capture_bytes(8 << 30) == most


@pytest.mark.usefixtures("clean_registry")
def test_variables_are_in_force_for_a_program_that_calls_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_CAPTURE", "inference")
    monkeypatch.setenv("TWINKLE_CAPTURE_MEMORY", "512MiB")
    assert settle()
    assert (runtime.options.capture, runtime.options.capture_memory) == ("inference", 512 << 20)


def test_the_command_check_prints_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TWINKLE_CAPTURE", "train")
    monkeypatch.setenv("TWINKLE_CAPTURE_MEMORY", "1MiB")
    assert main(["check", "auto"]) == 0
    printed = capsys.readouterr().out
    assert "  capture            train\n" in printed
    assert "  capture_memory     1048576 bytes\n" in printed


def test_the_command_env_prints_both_and_knows_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TWINKLE_CAPTURE", "off")
    monkeypatch.setenv("TWINKLE_CAPTURE_MEMORY", "0.5")
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "TWINKLE_CAPTURE=off" in printed
    assert "TWINKLE_CAPTURE_MEMORY=0.5" in printed
    assert config.load(["auto"], {"TWINKLE_CAPTURE": "off", "TWINKLE_CAPTURE_MEMORY": "0.5"}).warnings == []


def test_amounts_of_other_types_are_none() -> None:
    assert [memory(value) for value in (None, [], b"1GB", float("inf"), "inf", "-1GB", "１GB", "9" * 30)] == [
        None
    ] * 8


def test_a_size_reads_well() -> None:
    assert [size_in_words(n) for n in (0, 512, 2048, 3 << 20, 3 << 29, 5 << 40)] == [
        "0 B",
        "512 B",
        "2.0 KiB",
        "3.0 MiB",
        "1.5 GiB",
        "5.0 TiB",
    ]
