"""The loss without the logits beside what a user would take instead, on one GPU, in one run.

    python benchmarks/loss.py --out benchmarks/results/loss-h200.json
    python benchmarks/loss.py --only grid          # or: main, check, tune

Forward and backward with gradients for hidden states and weight, bfloat16, random data. ``products`` are
the three matrix products alone, in chunks of 2048 rows: nothing that computes the gradients is faster.
Errors are relative to float32 (`check`), those of the plain way in bfloat16 beside them. The grid ends
with the shapes at which Twinkle does worst beside the best of the others. All of it takes about five
minutes on an H200, most of them torch.compile's.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from twinkle.ops.causal_lm_loss import chunks
from twinkle.ops.causal_lm_loss.linear_cross_entropy import linear_cross_entropy
from twinkle.ops.causal_lm_loss.row_loss import RowLoss

MAIN = [(16384, 1024, 151936), (16384, 4096, 128256), (8192, 1152, 262144)]
GRID = list(itertools.product((1024, 8192, 32768), (1024, 4096, 8192), (32000, 128256, 262144)))
PEERS = ("liger", "torch", "torch.compile")


def plain(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def products(hidden, weight, labels):
    rows, vocab = hidden.shape[0], weight.shape[0]
    logits = hidden.new_empty(2048, vocab)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    for start in range(0, rows, 2048):
        part = hidden[start : start + 2048]
        torch.mm(part, weight.t(), out=logits[: part.shape[0]])
        torch.mm(logits[: part.shape[0]], weight, out=grad_hidden[start : start + 2048])
        torch.mm(logits[: part.shape[0]].t(), part, out=grad_weight)


def providers():
    found = {"products": products, "twinkle": linear_cross_entropy}
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["liger"] = lambda h, w, y: liger_fused_linear_cross_entropy(h, w, y)
    found["torch.compile"] = None
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = lambda h, w, y: F.linear_cross_entropy(h, w, y)
    return found


def data(rows, hidden, vocab, dtype=torch.bfloat16):
    torch.manual_seed(0)
    states = torch.randn(rows, hidden, device="cuda", dtype=torch.float32)
    weight = torch.randn(vocab, hidden, device="cuda", dtype=torch.float32) / hidden**0.5
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    return states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def step(function, hidden, weight, labels):
    hidden.grad = weight.grad = None
    with torch.no_grad() if function is products else torch.enable_grad():
        loss = function(hidden, weight, labels)
    if loss is not None:
        loss.backward()


def milliseconds(run, repeats, seconds=None):
    """The median time of a run; fewer of them where all together would take more than ``seconds``."""
    run()
    times = []
    while len(times) < repeats:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The device is kept busy while the host issues the work, or host time is what is measured.
        torch.cuda._sleep(8_000_000)
        first.record()
        run()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
        if seconds is not None and len(times) >= 3 and sum(times) > 1000 * seconds:
            break
    # The first is a warm-up like the one before it.
    return statistics.median(times[1:])


def measure(shape, repeats=8, seconds=None):
    """One row of figures: every provider at a shape."""
    row = {"rows": shape[0], "hidden": shape[1], "vocab": shape[2]}
    try:
        hidden, weight, labels = data(*shape)
    except torch.OutOfMemoryError:
        return {**row, "error": "does not fit"}
    for name, function in providers().items():
        if name == "torch.compile":
            torch._dynamo.reset()
            function = torch.compile(plain, dynamic=False)
        hidden.grad = weight.grad = None
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            spent = milliseconds(lambda f=function: step(f, hidden, weight, labels), repeats, seconds)
            row[name] = {"ms": round(spent, 3)}
            row[name]["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        except Exception as error:
            row[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
    own = row["twinkle"].get("ms", float("inf"))
    row["over_products"] = round(own / row["products"]["ms"], 3)
    best = min(PEERS, key=lambda name: row.get(name, {}).get("ms", float("inf")))
    if "ms" in row.get(best, {}):
        row["best_peer"], row["over_best_peer"] = best, round(own / row[best]["ms"], 3)
    measured = {name: value for name, value in row.items() if isinstance(value, dict)}
    times = " ".join(f"{name} {value.get('ms', 'failed')}" for name, value in measured.items())
    peaks = " ".join(f"{name} {value.get('peak_mib')}" for name, value in measured.items())
    beside = (
        f"x{row['over_products']} of the products, x{row.get('over_best_peer')} of {row.get('best_peer')}"
    )
    print(f"{shape!s:24} {times} ms | {beside} | {peaks} MiB", flush=True)
    return row


def grid(shapes, seconds):
    """All shapes, and those where a peer comes closest or is ahead."""
    started, rows = time.monotonic(), []
    for shape in shapes:
        rows.append(measure(shape, seconds=seconds))
    compared = [row for row in rows if "over_best_peer" in row]
    compared.sort(key=lambda row: -row["over_best_peer"])
    slower = sum(row["over_best_peer"] > 1 for row in compared)
    print(
        f"grid: {len(compared)} shapes in {time.monotonic() - started:.0f} s, "
        f"slower than the best peer at {slower}; the worst:"
    )
    for row in compared[:5]:
        shape = (row["rows"], row["hidden"], row["vocab"])
        print(f"  {shape!s:24} x{row['over_best_peer']} of {row['best_peer']}")
    return rows


def check(shape):
    """Errors against float32, ``||x - exact|| / ||exact||``, of ours and of the plain way."""
    exact, results = None, {}
    for name, function, dtype in (
        ("exact", plain, torch.float32),
        ("plain", plain, torch.bfloat16),
        ("twinkle", linear_cross_entropy, torch.bfloat16),
    ):
        hidden, weight, labels = data(*shape)
        labels[::3] = -100
        hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
        loss = function(hidden, weight, labels)
        (3 * loss).backward()
        found = [t.float() for t in (loss.detach(), hidden.grad, weight.grad)]
        if exact is None:
            exact = found
            continue
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
        results[name] = dict(zip(("loss", "grad_hidden", "grad_weight"), errors, strict=True))
    results["right"] = all(
        results["twinkle"][k] <= 2 * results["plain"][k] + 1e-6 for k in results["twinkle"]
    )
    print(f"{shape!s:24} {results}", flush=True)
    return {"rows": shape[0], "hidden": shape[1], "vocab": shape[2], **results}


def tune():
    """The row kernel alone by block and warps, and the whole by rows of a chunk."""
    from twinkle.ops.causal_lm_loss import triton as kernel

    original = chunks.chunk_rows
    for rows, hidden, vocab in MAIN:
        logits = torch.randn(2048, vocab, device="cuda", dtype=torch.bfloat16)
        labels = torch.randint(0, vocab, (2048,), device="cuda")
        losses = torch.empty(2048, device="cuda")
        line = []
        for kernel.WARPS, kernel.BLOCK in itertools.product((8, 16, 32), (8192, 16384)):
            arguments = (logits, None, labels, losses, None, RowLoss(), True)
            ms = milliseconds(functools.partial(kernel.row_losses, *arguments), 3)
            line.append(f"{kernel.WARPS}/{kernel.BLOCK}: {4 * logits.numel() / ms / 1e9:.2f}")
        print(f"row kernel, vocab {vocab}, TB/s: " + "; ".join(line), flush=True)
        kernel.WARPS, kernel.BLOCK = 32, 16384
        del logits, arguments
        line = []
        for size in (2048, 4096, 8192):
            chunks.chunk_rows = lambda rows, *_, size=size, **__: min(size, rows)
            tensors = data(rows, hidden, vocab)
            torch.cuda.reset_peak_memory_stats()
            ms = milliseconds(lambda t=tensors: step(linear_cross_entropy, *t), 5)
            line.append(f"{size}: {ms:.2f} ms {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
        chunks.chunk_rows = original
        print(f"rows of a chunk, {rows, hidden, vocab}: " + "; ".join(line), flush=True)
        del tensors


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", choices=("main", "grid", "check", "tune"), action="append")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    only = options.only or ["check", "main", "grid"]
    if not torch.cuda.is_available():
        sys.exit("benchmarks/loss.py: no GPU here")
    document = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bfloat16"}
    if "check" in only:
        document["check"] = [check((4096, *shape[1:])) for shape in MAIN]
    if "tune" in only:
        tune()
    if "main" in only:
        document["main"] = [measure(shape) for shape in MAIN]
    if "grid" in only:
        document["grid"] = grid(GRID, seconds=0.7)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
