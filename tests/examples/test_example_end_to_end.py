"""The whole way: an unchanged program, a configuration file, and the report that says what became of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from types import ModuleType

    Runner = Callable[..., subprocess.CompletedProcess[str]]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QWEN3 = "transformers.models.qwen3.modeling_qwen3"
ACTIVATE = "import sys, runpy, twinkle; twinkle.activate(); sys.argv = sys.argv[1:]; "
ACTIVATE += "runpy.run_path(sys.argv[0], run_name='__main__')"
# The two ways that work without an installed .pth: the api and the runner.
DOORS = {"api": ("-c", ACTIVATE), "run": ("-m", "twinkle", "run")}

TRAIN = ["--steps", "6", "--batch", "2", "--seq-len", "48", "--hidden-size", "64", "--head-dim", "16"]
TRAIN += ["--layers", "2", "--corpus-bytes", "60000", "--eval-batches", "2", "--threads", "1"]


def plain(module: ModuleType, folder: Path, *arguments: str) -> Any:
    """What the unpatched program wrote, run here."""
    result = folder / "plain.json"
    assert module.main([*arguments, "--json", str(result)]) == 0
    return json.loads(result.read_text())


def patched(
    run_example: Runner, folder: Path, name: str, *arguments: str, config: str, door: str = "run"
) -> tuple[Any, Any]:
    """What the program wrote in a process with this configuration, and the report."""
    result, report = folder / "patched.json", folder / "report.json"
    ended = run_example(
        name,
        *arguments,
        "--json",
        str(result),
        before=DOORS[door],
        TWINKLE_CONFIG=str(EXAMPLES / config),
        TWINKLE_REPORT=str(report),
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(result.read_text()), json.loads(report.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_gives_the_same_losses_with_three_active_bindings(
    program: ModuleType, run_example: Runner, tmp_path: Path, dtype: str
) -> None:
    arguments = [*TRAIN, "--dtype", dtype]
    theirs = plain(program, tmp_path, *arguments)
    ours, report = patched(run_example, tmp_path, "train_qwen3.py", *arguments, config="twinkle.toml")
    bindings = {binding["target"]: binding for binding in report["bindings"]}
    assert {target: binding["state"] for target, binding in bindings.items()} == {
        f"{QWEN3}:Qwen3MLP": "active",
        f"{QWEN3}:Qwen3RMSNorm": "active",
        f"{QWEN3}:apply_rotary_pos_emb": "active",
    }
    assert bindings[f"{QWEN3}:Qwen3MLP"]["most_instances"] == 2
    assert (
        bindings[f"{QWEN3}:Qwen3RMSNorm"]["most_instances"] == 2 * 4 + 1
    )  # two of a layer, two of its heads, the last
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=tolerance)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=tolerance)


@pytest.mark.slow
def test_training_through_activate(run_example: Runner, tmp_path: Path) -> None:
    _, report = patched(run_example, tmp_path, "train_qwen3.py", *TRAIN, config="twinkle.toml", door="api")
    assert [binding["state"] for binding in report["bindings"]] == ["active"] * 3


@pytest.mark.slow
def test_embeddings_are_the_same_with_a_swapped_layer(
    embedder: ModuleType, run_example: Runner, tmp_path: Path
) -> None:
    theirs = plain(embedder, tmp_path)
    ours, report = patched(run_example, tmp_path, "embed_minilm.py", config="minilm.toml")
    (binding,) = report["bindings"]
    assert (binding["target"], binding["state"], binding["most_instances"]) == (
        "transformers.models.bert.modeling_bert:BertIntermediate",
        "active",
        6,
    )
    for mine, original in zip(ours["embeddings"], theirs["embeddings"], strict=True):
        assert mine == pytest.approx(original, abs=1e-6)


def test_both_configurations_are_valid() -> None:
    from twinkle import config

    for name, layers, functions in (("twinkle.toml", 2, 1), ("minilm.toml", 1, 0)):
        settings = config.load([str(EXAMPLES / name)], {}, cwd=str(EXAMPLES))
        assert (len(settings.layers), len(settings.functions)) == (layers, functions)
