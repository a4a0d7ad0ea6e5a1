"""What it costs a call that a kernel is guarded: the dispatch function, with and without the guards.

    python benchmarks/survival.py

Rounds take turns; each figure is the smallest time of a call, in nanoseconds, and the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import timeit
import warnings
from datetime import date
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from twinkle.kernel import kernelize_model, register_external_layer, register_layer_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS, REPEATS = 1000, 40


class Plain(nn.Module):
    """One tensor in, one out."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Kernel(nn.Module):
    """The same."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def shortest(function: Callable[[], Any]) -> float:
    return min(timeit.repeat(function, number=CALLS, repeat=REPEATS)) / CALLS * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", metavar="PATH", help="write the figures there")
    options = parser.parse_args()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    x = torch.randn(2, 8)
    plain = Plain()
    register_layer_kernel("plain", layer_impl=Kernel)
    register_external_layer(Plain, "plain")
    kernelize_model(nn.Sequential(plain))
    for _ in range(3):
        plain.forward(x)
    bare = Kernel()
    pairs = {
        "guards of one tensor": (lambda: plain.forward(x), lambda: bare.forward(x)),
        "x.shape (for comparison)": (lambda: x.shape, lambda: None),
    }
    figures: dict[str, float] = {}
    for name, (with_it, without) in pairs.items():
        rounds = [shortest(with_it) - shortest(without) for _ in range(options.rounds)]
        figures[name] = round(statistics.median(rounds), 1)
        print(f"{name:34} {figures[name]:8.1f} ns  ({min(rounds):.1f} to {max(rounds):.1f})", flush=True)
    if options.json:
        result = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": platform.machine(),
            "ns a call": figures,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
