"""The embedded kernels in plain torch on a CPU, next to the code they replace.

    python benchmarks/cpu_ops.py [--json FILE] [--rounds 15] [--threads 1,2] [--only rms_norm]

Both ways run in turn, so that what else the machine does falls on both. Figures are medians over the rounds,
in ms: forward with gradients recorded, backward, and forward alone. One thread is timed by its own CPU time,
more by the clock. A way that is not faster at a shape is the definition there, and shows as about 1.0.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from twinkle.ops.layer_norm import reference as layer_norm_reference
from twinkle.ops.layer_norm import torch_backend as layer_norm_torch
from twinkle.ops.rms_norm import cpu_backend as norm_cpu
from twinkle.ops.rms_norm import reference as norm_reference
from twinkle.ops.rotary import cpu_backend as rotary_cpu
from twinkle.ops.rotary import reference as rotary_reference

if TYPE_CHECKING:
    from collections.abc import Callable

NORMS = {variant.name: variant for variant in norm_reference.VARIANTS}
ROTATIONS = {variant.name: variant for variant in rotary_reference.VARIANTS}
COHERE = next(variant for variant in layer_norm_reference.VARIANTS if variant.name == "cohere")
EPS = 1e-6


class Case(NamedTuple):
    """An op at a shape: its inputs, how many of them get gradients, and the two ways to compute it."""

    op: str
    shape: str
    inputs: tuple[torch.Tensor, ...]
    wanted: int
    original: Callable[..., Any]
    ours: Callable[..., Any]


def norm_case(name: str, rows: int, width: int, dtype: torch.dtype) -> Case:
    variant = NORMS[name]
    x, w = torch.randn(rows, width).to(dtype), (torch.randn(width) + 1).to(dtype)
    return Case(
        f"rms_norm ({name})",
        f"{rows}x{width}",
        (x, w),
        2,
        lambda x, w: norm_reference.rms_norm(x, w, EPS, variant=variant),
        lambda x, w: norm_cpu.rms_norm(x, w, EPS, variant=variant),
    )


def layer_norm_case(rows: int, width: int, dtype: torch.dtype) -> Case:
    x, w = torch.randn(rows, width).to(dtype), (torch.randn(width) + 1).to(dtype)
    return Case(
        "layer_norm (cohere)",
        f"{rows}x{width}",
        (x, w),
        2,
        lambda x, w: layer_norm_reference.layer_norm(x, w, None, EPS, variant=COHERE),
        lambda x, w: layer_norm_torch.layer_norm(x, w, None, EPS, variant=COHERE),
    )


def rotary_case(name: str, batch: int, tokens: int, dtype: torch.dtype) -> Case:
    variant = ROTATIONS[name]
    heads, kv_heads, dim = 16, 8, 128
    width = dim // 2 if variant.part != "all" else dim
    q = torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2)
    k = torch.randn(batch, tokens, kv_heads, dim).to(dtype).transpose(1, 2)
    cos, sin = (torch.randn(batch, tokens, width).to(dtype) for _ in range(2))
    if variant.pairs == "complex":
        real = torch.float64 if variant.compute == "float64" else torch.float32
        table = torch.randn(batch, 1, tokens, dim // 2, dtype=real)
        cos, sin = torch.polar(torch.ones_like(table), table), None
    elif variant.broadcast == "given":
        cos, sin = torch.randn(batch, 1, tokens, dim // 2, 2, 2).unbind(-1)
    return Case(
        f"rotary ({name})",
        f"{batch}x{tokens}x{heads}+{kv_heads}x{dim}",
        (q, k, cos, sin),
        2,
        lambda *x: rotary_reference.rotary(*x, variant=variant),
        lambda *x: rotary_cpu.rotary(*x, variant=variant),
    )


class _Gated(torch.autograd.Function):
    """What a gated activation would be: in chunks, with its activation computed again in backward."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        flat = [x.view(-1) for x in (gate, up, out)]
        for g, u, y in zip(*(x.split(1 << 16) for x in flat), strict=True):
            torch.ops.aten.silu.out(g, out=y).mul_(u)
        return out

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        flat = [x.reshape(-1) for x in (dy, gate, up, dgate, dup)]
        for d, g, u, dg, du in zip(*(x.split(1 << 16) for x in flat), strict=True):
            torch.ops.aten.silu.out(g, out=du).mul_(d)
            torch.ops.aten.silu_backward.grad_input(d * u, g, grad_input=dg)
        return dgate, dup


def gated_case(rows: int, width: int, dtype: torch.dtype) -> Case:
    inputs = tuple(torch.randn(rows, width).to(dtype) for _ in range(2))
    return Case(
        "gated activation (not in use)",
        f"{rows}x{width}",
        inputs,
        2,
        lambda g, u: F.silu(g) * u,
        _Gated.apply,
    )


def cases(dtype: torch.dtype) -> list[Callable[[], Case]]:
    norms = [
        (n, r, w) for n in ("llama", "gemma") for r, w in ((2048, 1024), (512, 4096), (16384, 128), (1, 1024))
    ]
    return [
        *(lambda a=arguments: norm_case(*a, dtype) for arguments in norms),
        *(lambda a=arguments: layer_norm_case(*a, dtype) for arguments in ((2048, 1024), (1, 1024))),
        *(
            lambda a=arguments: rotary_case(*a, dtype)
            for arguments in (
                ("half", 1, 2048),
                ("half", 1, 1),
                ("half_float32", 1, 2048),
                ("partial", 1, 2048),
                ("interleaved", 1, 2048),
                ("complex_float32", 1, 2048),
                ("complex_float64", 1, 2048),
                ("matrix_float32", 1, 2048),
                ("matrix", 1, 2048),
            )
        ),
        *([lambda: gated_case(2048, 3072, dtype)] if torch.get_num_threads() == 1 else []),
    ]


def measure(case: Case, rounds: int, clock: Callable[[], float]) -> dict[str, tuple[float, float, float]]:
    """Median ms of forward with gradients recorded, of backward and of forward alone, for each way."""
    ways = {"original": case.original, "twinkle": case.ours}
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    pushes: list[torch.Tensor] = []
    for number in range(rounds + 3):
        for name, call in ways.items():
            leaves = [x.detach().requires_grad_() for x in case.inputs[: case.wanted]]
            inputs = (*leaves, *case.inputs[case.wanted :])
            started = clock()
            made = call(*inputs)
            forward = clock() - started
            made = made if isinstance(made, tuple) else (made,)
            pushes = pushes or [torch.randn_like(y) for y in made]
            started = clock()
            torch.autograd.grad(made, leaves, pushes)
            backward = clock() - started
            del made
            with torch.no_grad():
                started = clock()
                call(*inputs)
                inference = clock() - started
            if number >= 3:
                times[name].append((forward, backward, inference))
    return {
        name: tuple(statistics.median(column) * 1e3 for column in zip(*found, strict=True))
        for name, found in times.items()
    }  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        clock = time.thread_time if threads == 1 else time.perf_counter
        for dtype in (torch.float32, torch.bfloat16):
            for make in cases(dtype):
                torch.manual_seed(0)
                case = make()
                if options.only not in case.op:
                    continue
                found = measure(case, options.rounds, clock)
                ratios = [a / b for a, b in zip(found["original"], found["twinkle"], strict=True)]
                rows.append(
                    {
                        "op": case.op,
                        "shape": case.shape,
                        "dtype": str(dtype).removeprefix("torch."),
                        "threads": threads,
                        **{f"{name}_ms": [round(ms, 3) for ms in times] for name, times in found.items()},
                        "times_faster": [round(ratio, 2) for ratio in ratios],
                    }
                )
                shown = "  ".join(
                    f"{what} {a:8.3f} -> {b:8.3f} ({r:.2f}x)"
                    for what, a, b, r in zip(
                        ("forward", "backward", "inference"), *found.values(), ratios, strict=True
                    )
                )
                row = rows[-1]
                print(
                    f"{row['op']:30} {row['shape']:18} {row['dtype']:9} {threads} thread(s)  {shown}",
                    flush=True,
                )
    if options.json:
        document = {
            "date": datetime.date.today().isoformat(),
            "cpus": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "columns": ["forward", "backward", "inference"],
            "results": rows,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
