"""Run the training program with and without Twinkle, in turns, and say what it changed.

    python examples/compare.py                                      # about four minutes on two CPU cores
    python examples/compare.py --rounds 1 --steps 10                # a quick look
    python examples/compare.py -- --hidden-size 128 --threads 1     # the rest goes to the program

Each run is a process of its own; the plain ones have no variable of Twinkle's in their environment. Prints
the largest difference between the losses, the speeds and their ratio (the median over the pairs of
neighbouring runs), the peak memory, and what the report says of the bindings. Ends with 1 when the losses
disagree or a binding is not active.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "train_qwen3.py"
CONFIG = HERE / "twinkle.toml"

# The kernels' forward is exact, their gradients differ in the last bits, and each optimizer step builds on
# the one before: how far apart two runs of different rounding may be after some dozens of steps.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}

Run = dict[str, Any]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Compare a training run with and without Twinkle.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs, in alternating order")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each run")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the configuration of the patched runs")
    parser.add_argument(
        "--door",
        choices=("env", "run"),
        default="env",
        help="env: TWINKLE_CONFIG and the installed package; run: python -m twinkle run",
    )
    parser.add_argument("program", nargs="*", help="further options of train_qwen3.py, after --")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1 or chosen.steps < 1:
        parser.error("--rounds and --steps must be at least 1")
    return chosen


def plain_environment() -> dict[str, str]:
    """This environment without any variable of Twinkle's."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_")}


def run_once(options: argparse.Namespace, folder: Path, *, patched: bool) -> tuple[Run, Run | None]:
    """One run of the program. Returns what it measured and, for a patched run, Twinkle's report."""
    result, report = folder / "run.json", folder / "report.json"
    result.unlink(missing_ok=True)
    report.unlink(missing_ok=True)
    environment = plain_environment()
    command = [sys.executable]
    if patched:
        environment["TWINKLE_REPORT"] = str(report)
        if options.door == "run":
            command += ["-m", "twinkle", "run", "--config", str(options.config), "--"]
        else:
            environment["TWINKLE_CONFIG"] = str(options.config)
    command += [str(PROGRAM), "--steps", str(options.steps), "--json", str(result), *options.program]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    if patched and not report.exists():
        raise SystemExit(
            "Twinkle wrote no report, so it was not there: install it (pip install .), or take --door run"
        )
    return json.loads(result.read_text()), json.loads(report.read_text()) if patched else None


def largest_difference(first: list[float], second: list[float]) -> float:
    """The largest distance between two runs' losses at the same step."""
    if len(first) != len(second):
        raise ValueError(f"runs of {len(first)} and {len(second)} steps cannot be compared")
    return max((abs(one - other) for one, other in zip(first, second, strict=True)), default=0.0)


def summarise(pairs: list[tuple[Run, Run]]) -> dict[str, Any]:
    """Figures over pairs of (plain, patched) runs.

    ``ratio`` is the median over the pairs of patched over plain tokens per second: above 1 is faster.
    Neighbouring runs share the machine's mood, so their ratio wanders less than the speeds do.
    """
    ratios = [patched["tokens_per_second"] / plain["tokens_per_second"] for plain, patched in pairs]
    memory = [
        patched["peak_memory_mb"] / plain["peak_memory_mb"]
        for plain, patched in pairs
        if plain.get("peak_memory_mb") and patched.get("peak_memory_mb")
    ]
    return {
        "plain": statistics.median(plain["tokens_per_second"] for plain, _ in pairs),
        "patched": statistics.median(patched["tokens_per_second"] for _, patched in pairs),
        "ratio": statistics.median(ratios),
        "ratio_range": (min(ratios), max(ratios)),
        "processor_ratio": statistics.median(
            plain["processor_seconds"] / patched["processor_seconds"] for plain, patched in pairs
        ),
        "difference": max(largest_difference(plain["losses"], patched["losses"]) for plain, patched in pairs),
        "memory_ratio": statistics.median(memory) if memory else None,
    }


def show(summary: dict[str, Any], pairs: list[tuple[Run, Run]], report: Run) -> bool:
    """Print the comparison. Returns whether the losses agree and every binding is active."""
    plain, patched = pairs[-1]
    dtype = plain["options"]["dtype"]
    agree = summary["difference"] <= TOLERANCE[dtype]
    low, high = summary["ratio_range"]
    first, last, last_patched = plain["losses"][0], plain["losses"][-1], patched["losses"][-1]
    print(f"losses      {first:.4f} -> {last:.4f} plain, -> {last_patched:.4f} patched")
    print(
        f"            at most {summary['difference']:.2e} apart: "
        f"{'agree' if agree else 'DISAGREE'} ({dtype}: {TOLERANCE[dtype]:g})"
    )
    print(f"speed       {summary['plain']:,.0f} -> {summary['patched']:,.0f} tokens per second")
    print(f"ratio       {summary['ratio']:.3f} (median of {len(pairs)} pairs, {low:.3f} to {high:.3f})")
    print(
        f"            {summary['processor_ratio']:.3f} by processor time, which a busy machine disturbs less"
    )
    if summary["memory_ratio"] is not None:
        print(
            f"memory      {plain['peak_memory_mb']:,.0f} -> {patched['peak_memory_mb']:,.0f} MB at the peak, "
            f"ratio {summary['memory_ratio']:.3f}"
        )
    for binding in report["bindings"]:
        reason = f": {binding['reason']}" if binding["reason"] else ""
        bound = f"{binding['target']} <- {binding['kernel']} x{binding['instances']}"
        print(f"{binding['state']:<11} {bound}{reason}")
    active = bool(report["bindings"]) and all(binding["state"] == "active" for binding in report["bindings"])
    return agree and active


def main(arguments: list[str] | None = None) -> int:
    """Run the pairs and print."""
    options = parse_arguments(arguments)
    pairs: list[tuple[Run, Run]] = []
    report: Run = {"bindings": []}
    try:
        with tempfile.TemporaryDirectory() as name:
            for number in range(options.rounds):
                done: dict[bool, Run] = {}
                for patched in (False, True) if number % 2 == 0 else (True, False):
                    done[patched], said = run_once(options, Path(name), patched=patched)
                    report = said or report
                pairs.append((done[False], done[True]))
                speeds = [f"{done[patched]['tokens_per_second']:,.0f}" for patched in (False, True)]
                print(
                    f"pair {number + 1} of {options.rounds}: {speeds[0]} -> {speeds[1]} tokens per second",
                    flush=True,
                )
    except KeyboardInterrupt:
        print("stopped")
        return 130
    return 0 if show(summarise(pairs), pairs, report) else 1


if __name__ == "__main__":
    sys.exit(main())
