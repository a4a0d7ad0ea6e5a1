"""``twinkle verify``: what it prints, what it keeps, and how it ends."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import twinkle.ops.causal_lm_loss.samples as loss_samples
from twinkle.cli import main
from twinkle.ops import launch
from twinkle.ops.cases import cases, sampled_ops, variants
from twinkle.proof import verify as rerun
from twinkle.proof.compare import compare

if TYPE_CHECKING:
    from pathlib import Path

QUICK = ["verify", "--op", "causal_lm_loss", "--dtype", "float32", "--device", "cpu", "--seed", "1"]


@pytest.fixture(autouse=True)
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two variants of the loss, two shapes each; verdicts go to a directory of the test."""
    monkeypatch.setenv("TWINKLE_CACHE", str(tmp_path))
    monkeypatch.setattr(loss_samples, "variants", lambda: (loss_samples.LossVariant("plain"), _BIASED))
    shapes = {name: loss_samples.SHAPES[name] for name in ("one row", "ragged")}
    monkeypatch.setattr(loss_samples, "SHAPES", shapes)


_BIASED = loss_samples.LossVariant("bias", bias=True)


def wrong_with_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss_samples.kernel

    def kernel(variant: Any) -> Any:
        return (lambda *args: right(variant)(*args) * 1.01) if variant.bias else right(variant)

    monkeypatch.setattr(loss_samples, "kernel", kernel)


def test_a_line_for_each_variant_with_both_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(QUICK) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:4] == ["device", "op", "variant", "by"]
    assert [line.split()[2] for line in out[1:3]] == ["plain", "bias"]
    assert all(line.endswith("proven") for line in out[1:3])
    assert out[3].startswith("4 of 4 comparisons proven, seed 1")


def test_all_shapes_have_a_line_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    main([*QUICK, "--all"])
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_a_rejection_is_exit_code_1_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong_with_a_bias(monkeypatch)
    assert main(QUICK) == 1
    out = capsys.readouterr().out
    assert out.count("REJECTED: result off by 1.0e-02") == 2
    assert "2 of 4 comparisons proven" in out


def test_json_has_every_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["comparisons"]) == 4
    first = document["comparisons"][0]
    assert (first["op"], first["variant"], first["dtype"], first["ok"]) == (
        "causal_lm_loss",
        "plain",
        "float32",
        True,
    )
    assert 0 <= first["error"] < 1e-5
    assert document["seed"] == 1
    assert not document["interrupted"]


def interrupt_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the comparison of that number."""
    begun: list[int] = []

    def until(*args: Any, **kwargs: Any) -> Any:
        begun.append(1)
        if len(begun) == number:
            raise KeyboardInterrupt
        return compare(*args, **kwargs)

    monkeypatch.setattr(rerun, "compare", until)


def kept(directory: Path) -> int:
    return len(list((directory / "proofs").glob("*.json")))


def test_ctrl_c_prints_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(4, monkeypatch)
    assert main(QUICK) == 130
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in out[1:3]] == ["plain", "bias"]
    assert out[3].startswith("3 of 3 comparisons proven")
    assert out[3].endswith("interrupted")


def test_ctrl_c_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(4, monkeypatch)
    main(QUICK)
    assert kept(tmp_path) == 3


def test_verdicts_are_kept_before_the_next_variant_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def looking(*args: Any, **kwargs: Any) -> Any:
        seen.append(kept(tmp_path))
        return compare(*args, **kwargs)

    monkeypatch.setattr(rerun, "compare", looking)
    main(QUICK)
    assert seen == [0, 0, 2, 2]


def test_a_line_for_each_op_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    main(QUICK)
    (line,) = capsys.readouterr().err.splitlines()
    number, _seconds, _, *about = line.split()
    assert [number, *about] == ["0/2", "cpu", "causal_lm_loss"]


def test_a_terminal_has_one_line_that_ends_empty(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    main(QUICK)
    err = capsys.readouterr().err
    assert "\n" not in err
    shown = [text.split() for text in err.split("\r")[1:]]
    assert [words[:1] + words[-2:] for words in shown[:2]] == [
        ["0/2", "plain", "float32"],
        ["1/2", "bias", "float32"],
    ]
    assert shown[2:] == [[], []]


def test_verdicts_are_kept_and_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(QUICK)
    assert kept(tmp_path) == 4
    assert main(["verify", "--clear"]) == 0
    assert "4 verdicts forgotten" in capsys.readouterr().out
    assert kept(tmp_path) == 0


def test_without_a_file_there_is_nothing_to_forget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TWINKLE_CACHE", "off")
    assert main(["verify", "--clear"]) == 0
    assert "TWINKLE_CACHE is off" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--op", "nothing"], ["--device", "cuda:99"], ["--dtype", "int8"]])
def test_what_there_is_not_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["verify", *words])
    assert end.value.code == 2
    assert words[1] in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    text = capsys.readouterr().out
    assert all(
        word in text for word in ("twice what the definition", "TWINKLE_CACHE", "--clear", "exit code")
    )


def test_bfloat16_says_nothing_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "DEVICE_TYPES", frozenset({"cpu"}))
    cpu = torch.device("cpu")
    assert "truncates" in str(rerun.skipped(cpu, "bfloat16"))
    assert rerun.skipped(cpu, "float16") is None


@pytest.mark.parametrize("op", [op for op in sampled_ops() if op != "causal_lm_loss"])
def test_every_op_has_samples_of_every_shape(op: str) -> None:
    variant = variants(op)[0]
    shapes = [case.shape for case in cases(op, variant, torch.float16, torch.device("cpu"))]
    assert {"plain", "ragged", "wide"} <= set(shapes)
    assert len(shapes) == len(set(shapes))
