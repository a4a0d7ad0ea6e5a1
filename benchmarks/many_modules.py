"""What looking at every class costs a program that builds many modules, before it calls any.

    python benchmarks/many_modules.py [--rounds 11] [--json FILE]

A program imports torch and builds 10,000 modules, in a process of its own, plain and with TWINKLE_CONFIG=auto
in turns. Two programs: one of torch's own layers alone, and one of twenty classes of its own, half of which
hold what there are kernels for. Processor time: the best of all rounds of each way, and the median of their
ratios.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys, time
import torch
from torch import nn
import torch.nn.functional as F

imported = time.process_time()

def norm(number):
    class Norm(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(d)), 1e-6
        def forward(self, x):
            h = x.float()
            return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight
    Norm.__qualname__ = Norm.__name__ = f"Norm{number}"
    return Norm

def block(number, inner):
    class Block(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.norm, self.up, self.down = inner(d), nn.Linear(d, d), nn.Linear(d, d)
            self.act, self.drop = nn.GELU(), nn.Dropout(0.1)
        def forward(self, x):
            return x + self.drop(self.down(self.act(self.up(self.norm(x)))))
    Block.__qualname__ = Block.__name__ = f"Block{number}"
    return Block

if sys.argv[1] == "own":
    blocks = [block(at, norm(at)) for at in range(10)]
    model = nn.ModuleList(blocks[at % 10](16) for at in range(10000 // 6))
else:
    model = nn.ModuleList(
        nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.Dropout(0.1))
        for at in range(10000 // 6)
    )
built = time.process_time()
print(imported, built - imported, sum(1 for _ in model.modules()))
"""


def run(program: str, **variables: str) -> tuple[float, float]:
    """Processor time of a start and of building, in seconds."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_")}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    environ.update(variables, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    code = f"import twinkle; twinkle.activate(door='pth')\n{PROGRAM}" if variables else PROGRAM
    done = subprocess.run(
        [sys.executable, "-c", code, program], env=environ, capture_output=True, text=True, check=True
    )
    imported, built, _ = done.stdout.split()
    return float(imported), float(built)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for program in ("torch", "own"):
        rounds = []
        for at in range(options.rounds):
            ways = ({}, {"TWINKLE_CONFIG": "auto"})
            found = {bool(way): run(program, **way) for way in (ways if at % 2 else ways[::-1])}
            rounds.append((found[False], found[True]))
        start = [(sum(plain), sum(ours)) for plain, ours in rounds]
        results[program] = {
            "start_and_build_s": [round(min(one[at] for one in start), 4) for at in (0, 1)],
            "build_s": [round(min(one[at][1] for one in rounds), 4) for at in (0, 1)],
            "ratio": round(statistics.median(ours / plain for plain, ours in start), 4),
            "ratio_of_the_best": round(min(o for _, o in start) / min(p for p, _ in start), 4),
        }
        print(program, results[program], flush=True)
    if options.json is not None:
        import torch

        made = {
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "date": str(datetime.date.today()),
            },
            "results": results,
        }
        options.json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
