"""The gradient of a linear layer's bias: torch's sum of the rows and the kernel, as parts of CUDA graphs.

    python benchmarks/bias_gradients.py [--json FILE]
    python benchmarks/bias_gradients.py --tune     ways to share a matrix out, the fastest of each size first

Each way is a graph of ten sums of ten matrices, so that no cache has them; they are replayed in turns. Prints
microseconds of a sum, the median ratio with the smallest and the largest, bytes read in a second, and the
errors of both against float64.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from turns import ratios, versions

SHAPES = [
    (2048, 1024),
    (2048, 4096),
    (3152, 1024),
    (8192, 1024),
    (8192, 4096),
    (25216, 768),
    (25216, 3072),
    (32768, 768),
    (32768, 3072),
]
COPIES = 10


def measure(rows: int, width: int, rounds: int) -> dict[str, Any]:
    import torch

    from twinkle.ops.linear_bias.triton import sum_rows

    given = [torch.randn(rows, width, device="cuda").bfloat16() for _ in range(COPIES)]
    ways = {"torch": lambda one: one.sum(0), "kernel": lambda one: sum_rows(one, one.dtype)}
    exact = given[0].double().sum(0)
    errors = {
        name: float((way(given[0]).double() - exact).norm() / exact.norm()) for name, way in ways.items()
    }
    graphs = {}
    for name, way in ways.items():
        way(given[0])
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for one in given:
                way(one)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            if number:
                times[name].append(start.elapsed_time(end) / COPIES * 1e3)
    us = {name: round(statistics.median(own), 2) for name, own in times.items()}
    return {
        "shape": [rows, width],
        "us": us,
        **ratios(times["torch"], times["kernel"]),
        "kernel_tb_s": round(rows * width * 2 / us["kernel"] / 1e6, 2),
        "errors": errors,
    }


def tune(rows: int, width: int) -> list[tuple[float, Any]]:
    """Microseconds of each way to share a matrix out, the fastest first."""
    import torch

    from twinkle.ops.linear_bias.triton import Tiling, sum_rows

    given = [torch.randn(rows, width, device="cuda").bfloat16() for _ in range(COPIES)]
    found = []
    for tiling in map(Tiling._make, itertools.product((16, 32, 64), (64, 128, 256), (2, 4, 8), (4, 8))):
        sum_rows(given[0], torch.bfloat16, tiling)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for one in given:
                sum_rows(one, one.dtype, tiling)
        times = []
        for _ in range(9):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / COPIES * 1e3)
        found.append((round(statistics.median(times), 2), tiling))
    return sorted(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tune", action="store_true", help="compare ways to share a matrix out")
    options = parser.parse_args()
    if options.tune:
        for shape in SHAPES:
            for us, tiling in tune(*shape)[:4]:
                print(f"{shape[0]:6} x {shape[1]:5}  {us:6.1f} us  {tiling}", flush=True)
        return 0
    found = []
    for shape in SHAPES:
        one = measure(*shape, options.rounds)
        found.append(one)
        us, errors = one["us"], one["errors"]
        print(
            f"{shape[0]:6} x {shape[1]:5}  torch {us['torch']:7.1f} us  kernel {us['kernel']:6.1f} us  "
            f"x{one['ratio']:.2f} ({one['smallest']:.2f} to {one['largest']:.2f})  "
            f"{one['kernel_tb_s']:.2f} TB/s  errors {errors['torch']:.1e}, {errors['kernel']:.1e}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"versions": versions("cuda"), "results": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
