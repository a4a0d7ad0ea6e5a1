"""Training steps under two checkouts of Twinkle, which take turns on one machine: is the new one as fast?

    git worktree add /tmp/before <commit>
    python benchmarks/two_versions.py /tmp/before [--models qwen3-0.6b gemma3-1b] [--json FILE]

Each checkout has a process of its own, and the two run a round of steps in turn, so that whatever else the
host does hits both. Prints the milliseconds of a step (medians), the median of the rounds' ratios (above 1:
this checkout is faster) with the smallest and the largest, the launches of a step, and how many bindings are
active in each. The loss after the same number of steps must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("qwen3-0.6b", "gemma3-1b", "llama-8b-8l", "tiny")


class Side:
    """A process that trains under one checkout."""

    def __init__(self, checkout: Path, model: str) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_")}
        paths = [str(checkout), *filter(None, [environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environ, "PYTHONPATH": os.pathsep.join(paths), "TWINKLE_CACHE": "off"},
        )

    def ask(self, word: str) -> dict[str, Any]:
        """What the process answers to one word."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise SystemExit(f"a process ended with {self.process.wait()}")

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def worker(name: str) -> None:
    """Train when told to, under the Twinkle that ``PYTHONPATH`` leads to."""
    import torch

    import twinkle

    twinkle.activate()
    sys.path.insert(0, str(Path(__file__).parent))
    from train_step import SHAPES, anatomy, build

    model = build(name)
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_gpu)
    generator = torch.Generator(device="cpu").manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, SHAPES[name], generator=generator).to(device)

    def step() -> torch.Tensor:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def settled(count: int) -> tuple[float, float]:
        started = time.perf_counter()
        for _ in range(count):
            loss = step()
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / count * 1e3, loss.item()

    for line in sys.stdin:
        word = line.strip()
        if word == "first":
            answer: dict[str, Any] = {"ms": settled(1)[0]}
        elif word == "round":
            ms, loss = settled(4)
            answer = {"ms": ms, "loss": loss}
        else:
            states = [binding["state"] for binding in twinkle.report.snapshot()["bindings"]]
            answer = {
                "twinkle": str(Path(twinkle.__file__).parent.parent),
                "active": states.count("active"),
                "bindings": len(states),
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
                "launches": anatomy(step)["launches"] if on_gpu else None,
            }
        print("@" + json.dumps(answer), flush=True)


def compare(before: Path, model: str, rounds: int) -> dict[str, Any]:
    """The figures of one model under both checkouts."""
    sides = {"before": Side(before, model), "now": Side(ROOT, model)}
    first = {name: side.ask("first")["ms"] for name, side in sides.items()}
    for side in sides.values():
        side.ask("round")
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in ("before", "now") if number % 2 else ("now", "before"):
            seen[name].append(sides[name].ask("round"))
    facts = {name: side.ask("facts") for name, side in sides.items()}
    for side in sides.values():
        side.close()
    ratios = [a["ms"] / b["ms"] for a, b in zip(seen["before"], seen["now"], strict=True)]
    return {
        "model": model,
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "rounds": rounds,
        **{
            name: {
                "ms": statistics.median(one["ms"] for one in seen[name]),
                "first_step_ms": first[name],
                "loss": seen[name][-1]["loss"],
                **{key: value for key, value in facts[name].items() if key != "twinkle"},
            }
            for name in sides
        },
    }


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", nargs="?", type=Path, help="the other checkout")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS[:2]))
    parser.add_argument("--rounds", type=int, default=9, help="rounds of four steps for each checkout")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--worker", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    if options.before is None or not (options.before / "twinkle" / "__init__.py").is_file():
        parser.error(f"{options.before} is no checkout of Twinkle")
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    result: dict[str, Any] = {
        "date": str(date.today()),
        "device": card,
        "torch": torch.__version__,
        "models": [],
    }
    for model in options.models:
        row = compare(options.before.resolve(), model, options.rounds)
        result["models"].append(row)
        print(
            f"{model:12} {row['before']['ms']:8.2f} -> {row['now']['ms']:8.2f} ms"
            f"  ratio {row['ratio']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})"
            f"  launches {row['before']['launches']} -> {row['now']['launches']}"
            f"  active {row['before']['active']} -> {row['now']['active']}"
            f"  loss {row['before']['loss']:.5f} -> {row['now']['loss']:.5f}",
            flush=True,
        )
        if options.json:
            Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
