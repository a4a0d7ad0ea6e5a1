"""What proofs cost in the first training step of a process.

    python benchmarks/proof_cost.py                       # a small and a mid-size model, on what is here
    python benchmarks/proof_cost.py --model qwen3-0.6b --batch 8 --tokens 2048 --dtype bfloat16

Each line is a process of its own with the embedded kernels: nothing is compared (``off``), compared and
kept (``cold``), and found (``warm``). Seconds are those of the first step and of the second; ``proofs`` is
the time spent in comparisons and their file, as a share of the first step. On a GPU the first step compiles
triton's kernels: with ``--keep-triton`` they are those of earlier processes, which is what a second run of a
program finds. ``compiled`` counts those that a process of its own compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MODELS = {
    "small": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 1000,
    },
    "mid": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
WAYS = {"off": {"TWINKLE_VERIFY": "off"}, "cold": {}, "warm": {}}
_MARK = "proof_cost "


def main() -> None:
    """Measure each model in each way, in processes of their own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", choices=MODELS, help="default: small and mid")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--keep-triton", action="store_true", help="compiled triton kernels of earlier processes"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options)
        return
    rows = []
    head = f"{'model':<12}{'verify':<8}{'first step s':>14}{'second s':>10}{'proofs s':>10}"
    print(f"{head}{'share':>8}{'peak GB':>9}{'compiled':>9}")
    for model in options.model or ("small", "mid"):
        with tempfile.TemporaryDirectory() as cache:
            for way, variables in WAYS.items():
                row = _measure(options, model, way, cache, variables)
                rows.append(row)
                share = f"{100 * row['proofs'] / row['first']:.1f} %"
                figures = f"{row['first']:>14.3f}{row['second']:>10.3f}{row['proofs']:>10.3f}{share:>8}"
                kernels = len(row["compiled"])
                print(f"{model:<12}{way:<8}{figures}{row['peak_gb']:>9.2f}{kernels:>9}", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"options": vars(options), "rows": rows}, file, indent=1)


def _measure(
    options: argparse.Namespace, model: str, way: str, cache: str, variables: dict[str, str]
) -> dict[str, Any]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TWINKLE_")}
    environ |= {"TWINKLE_CONFIG": "auto", "TWINKLE_CACHE": cache, **variables}
    if not options.keep_triton:
        environ["TRITON_CACHE_DIR"] = os.path.join(cache, f"triton-{way}")
    words = ["--batch", str(options.batch), "--tokens", str(options.tokens), "--dtype", options.dtype]
    done = subprocess.run(
        [sys.executable, "-m", "twinkle", "run", __file__, "--child", model, *words],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith(_MARK)), None)
    if line is None:
        raise SystemExit(f"{model}, {way}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    compiled = sorted(path.stem for path in Path(environ.get("TRITON_CACHE_DIR", cache)).rglob("*.cubin"))
    return {"model": model, "way": way, **json.loads(line.removeprefix(_MARK)), "compiled": compiled}


def _child(options: argparse.Namespace) -> None:
    import time

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from twinkle.deferred import proof as loss
    from twinkle.proof import first_use

    spent = [0.0]

    def timed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait()
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                wait()
                spent[0] += time.perf_counter() - started

        return call

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")

    def wait() -> None:
        if gpu:
            torch.cuda.synchronize()

    first_use.prove = timed(first_use.prove)
    first_use.inputs_for = timed(first_use.inputs_for)
    loss.prove_loss = timed(loss.prove_loss)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**MODELS[options.child])).to(device, getattr(torch, options.dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(model.config.vocab_size, (options.batch, options.tokens), device=device)
    steps = []
    for _ in range(2):
        wait()
        started = time.perf_counter()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        steps.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0
    figures = {"first": steps[0], "second": steps[1], "proofs": spent[0], "peak_gb": peak}
    print(_MARK + json.dumps(figures))


if __name__ == "__main__":
    main()
