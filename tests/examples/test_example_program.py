"""``train_qwen3.py`` and ``embed_minilm.py`` as the ordinary programs they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from types import ModuleType

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = ["--batch", "2", "--seq-len", "32", "--hidden-size", "32", "--head-dim", "16", "--layers", "1"]
SMALL += ["--corpus-bytes", "60000", "--eval-batches", "1", "--threads", "1"]


@pytest.mark.parametrize("name", ["train_qwen3.py", "embed_minilm.py"])
def test_the_programs_have_never_heard_of_us(name: str) -> None:
    assert "twinkle" not in (EXAMPLES / name).read_text().lower()


def test_a_few_steps_lower_the_loss_and_are_written_down(program: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert program.main([*SMALL, "--steps", "12", "--json", str(file)]) == 0
    run = json.loads(file.read_text())
    assert len(run["losses"]) == len(run["step_seconds"]) == 12
    assert run["losses"][-1] < run["losses"][0]
    assert run["tokens_per_second"] > 0
    assert run["eval_loss"] > 0


def test_the_seed_decides_every_loss(program: ModuleType, tmp_path: Path) -> None:
    losses = []
    for number, seed in enumerate((1, 1, 2)):
        file = tmp_path / f"{number}.json"
        program.main([*SMALL, "--steps", "3", "--seed", str(seed), "--json", str(file)])
        losses.append(json.loads(file.read_text())["losses"])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_the_output_names_loss_speed_and_memory(
    program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    program.main([*SMALL, "--steps", "2"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("loss ", "held out ", "tokens per second", "MB at the peak"))


def test_nothing_held_out_means_no_final_loss(
    program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    program.main([*SMALL, "--steps", "1", "--eval-split", "0"])
    assert "held out " not in capsys.readouterr().out.partition("loss ")[2]


def test_held_out_text_is_never_trained_on(program: ModuleType) -> None:
    train, test = program.split(bytes(range(200)), 0.25, 16)
    assert (len(train), len(test)) == (150, 50)
    assert torch.equal(torch.cat((train, test)), torch.arange(200, dtype=torch.uint8))


def test_windows_reach_the_last_byte(program: ModuleType) -> None:
    data = torch.arange(10, dtype=torch.uint8)
    tokens = program.draw(data, 200, 4, torch.Generator().manual_seed(0))
    assert (tokens.min(), tokens.max()) == (0, 9)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--steps", "0"], "--steps"), (["--seq-len", "1"], "--seq-len"), (["--head-dim", "15"], "--head-dim")],
)
def test_a_wrong_option_is_named(
    program: ModuleType, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        program.parse_arguments(arguments)
    assert ended.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_ends_cleanly_and_keeps_the_losses(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TWINKLE_")}
    command = [
        sys.executable,
        str(EXAMPLES / "train_qwen3.py"),
        *SMALL,
        "--steps",
        "300",
        "--json",
        str(file),
    ]
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as child:
        try:
            assert child.stderr is not None
            line = child.stderr.readline()
            while line and not line.startswith("step "):
                line = child.stderr.readline()
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=240)
        finally:
            child.kill()
    assert child.returncode == 130
    assert "Traceback" not in err
    run = json.loads(file.read_text())
    assert run["interrupted"] is True
    assert len(run["losses"]) > 0


@pytest.mark.slow
def test_like_sentences_are_found(embedder: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert embedder.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Shares lost" in lines[lines.index("The stock market fell sharply on Monday.") + 1]
