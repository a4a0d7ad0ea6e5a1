"""Losses of a real small training with Twinkle, beside eager runs that differ in the order of their sums.

    python benchmarks/loss_curve.py --json results/loss_curve-h200.json
    python benchmarks/loss_curve.py --read results/loss_curve-h200.json --plot docs/loss_curve.svg

A Qwen3 with random weights reads Python's own sources, two bytes a token (a vocabulary of 65536), in bf16 on
a GPU. Every run has the same weights and the same sequences in each step. The eager runs see the sequences of
a step in different orders, so that only the order of floating-point sums differs: their distance from each
other is the noise that any kernel is allowed. Prints the root mean square distance of every pair of runs, by
steps: training is chaotic, and once two runs have parted, how far is a matter of chance.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("eager-0", "eager-1", "eager-2", "twinkle-0", "twinkle-1")
WINDOWS = ((0, 20), (20, 50), (50, 100), (100, 150), (150, 200))
BATCH, LENGTH = 16, 512


def text(tokens: int) -> bytes:
    """Python's own sources, in the order of their names, two bytes a token."""
    parts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= 2 * tokens:
            break
    return b"".join(parts)[: 2 * tokens]


def train(run: str, steps: int, small: bool) -> dict[str, object]:
    """One training; in a process of its own, where Twinkle is active or not."""
    import torch
    import transformers as tf

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch, length = (4, 64) if small else (BATCH, LENGTH)
    size = 64 if small else 512
    config = tf.Qwen3Config(
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=2 if small else 8,
        num_attention_heads=4 if small else 16,
        num_key_value_heads=2 if small else 8,
        head_dim=32 if small else 64,
        vocab_size=65536,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = tf.Qwen3ForCausalLM(config).to(device=device, dtype=dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1, fused=device == "cuda")
    warm_up = min(20, steps // 4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up))
    raw = torch.frombuffer(bytearray(text(200 * BATCH * LENGTH)), dtype=torch.uint8).to(torch.int64)
    tokens = raw[0::2][: len(raw) // 2] * 256 + raw[1::2][: len(raw) // 2]
    sequences = tokens[: len(tokens) // length * length].view(-1, length)
    picks = torch.Generator().manual_seed(1)
    orders = torch.Generator().manual_seed(100 + int(run.rpartition("-")[2]))
    losses = []
    for step in range(steps):
        chosen = torch.randint(len(sequences), (batch,), generator=picks)
        ids = sequences[chosen[torch.randperm(batch, generator=orders)]].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if sys.stderr.isatty():
            print(f"\r{run} {step + 1}/{steps}", end="", file=sys.stderr)
    result: dict[str, object] = {
        "run": run,
        "losses": [value.item() for value in losses],
        "dtype": str(dtype),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "transformers": tf.__version__,
        "tokens_per_step": batch * length,
    }
    if run.startswith("twinkle"):
        from twinkle import report

        result["bindings"] = [
            [b["target"].rpartition(":")[2], b["kernel"], b["state"], b["instances"], b["proof"]]
            for b in report.snapshot()["bindings"]
        ]
    return result


def distance(one: list[float], other: list[float]) -> float:
    """Root mean square of the differences of two curves, in nats."""
    return (sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one)) ** 0.5


def describe(runs: list[dict[str, object]]) -> dict[str, dict[str, float]]:
    """The distance of every pair, printed: in the whole and by steps."""
    steps = len(runs[0]["losses"])  # type: ignore[arg-type]
    windows = [(0, steps), *((a, b) for a, b in WINDOWS if b <= steps)]
    print(f"{'':24}" + "".join(f"{f'{a}-{b}':>10}" for a, b in windows))
    pairs = {}
    for one, other in itertools.combinations(runs, 2):
        name = f"{one['run']} {other['run']}"
        first: list[float] = one["losses"]  # type: ignore[assignment]
        second: list[float] = other["losses"]  # type: ignore[assignment]
        pairs[name] = {f"{a}-{b}": distance(first[a:b], second[a:b]) for a, b in windows}
        print(f"{name:24}" + "".join(f"{value:10.1e}" for value in pairs[name].values()))
    return pairs


def plot(runs: list[dict[str, object]], path: str) -> None:
    """The curves, and below them each one's difference from the first."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "twinkle"
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    first: list[float] = runs[0]["losses"]  # type: ignore[assignment]
    for run in runs:
        losses: list[float] = run["losses"]  # type: ignore[assignment]
        style = {"lw": 1.6, "color": "#c0392b"} if str(run["run"]).startswith("twinkle") else {"lw": 0.9}
        above.plot(losses, label=run["run"], **style)
        if run is not runs[0]:
            below.plot([a - b for a, b in zip(losses, first, strict=True)], **style)
        else:
            below.plot([0.0] * len(losses), **style)
    above.set_ylabel("loss, nats a token")
    above.legend()
    below.set_ylabel(f"minus {runs[0]['run']}")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="a model for two CPU cores, to try the script")
    parser.add_argument("--json", metavar="FILE", help="write losses and distances there")
    parser.add_argument("--read", metavar="FILE", help="train nothing: take the losses of an earlier run")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves as SVG (needs matplotlib)")
    parser.add_argument("--one", metavar="RUN", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        if args.one.startswith("twinkle"):
            import twinkle

            twinkle.activate()
        print("RESULT " + json.dumps(train(args.one, args.steps, args.small)))
        return
    if args.read:
        runs = json.loads(Path(args.read).read_text())["runs"]
    else:
        runs = []
        for run in RUNS:
            environ = {key: value for key, value in os.environ.items() if not key.startswith("TWINKLE_")}
            if run.startswith("twinkle"):
                environ["TWINKLE_CONFIG"] = "auto"
            environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")]))
            command = [sys.executable, __file__, "--one", run, "--steps", str(args.steps)]
            command += ["--small"] * args.small
            done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
            [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            runs.append(json.loads(line.removeprefix("RESULT ")))
            print(f"{run:12} first {runs[-1]['losses'][0]:.4f} last {runs[-1]['losses'][-1]:.4f}", flush=True)
            for binding in runs[-1].get("bindings", []):
                print("            ", *binding)
    distances = describe(runs)
    if args.json:
        data = {"date": time.strftime("%Y-%m-%d"), "rms_distances": distances, "runs": runs}
        Path(args.json).write_text(json.dumps(data, indent=1) + "\n")
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
