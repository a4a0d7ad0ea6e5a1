"""A training step of real shapes on one GPU: eager, liger-kernel, torch.compile and Twinkle in one run.

    python benchmarks/train_step.py [--models qwen3-0.6b llama-8b-8l gemma3-1b] [--providers eager twinkle]

Every provider runs in a process of its own: bf16, sdpa, fused AdamW, random weights and tokens from one seed.
Prints milliseconds a step (median), tokens a second, peak memory and the loss after the last step, and
ratios to the first provider; then what one step is made of: the kernels launched, the milliseconds the device
is busy with them and the milliseconds the host needs to issue them. `--profile` adds the costliest kernels.
Providers whose package is missing are left out, which is said.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "qwen3-0.6b": (8, 2048),
    "llama-8b-8l": (4, 4096),
    "gemma3-1b": (4, 2048),
    "tiny": (2, 64),
}
PROVIDERS = ("eager", "liger", "compile", "twinkle", "compile+twinkle")


def build(name: str):
    import torch
    import transformers as tf

    if name == "qwen3-0.6b":
        config = tf.Qwen3Config(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            tie_word_embeddings=True,
        )
        cls = tf.Qwen3ForCausalLM
    elif name == "llama-8b-8l":
        config = tf.LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=8,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=8192,
        )
        cls = tf.LlamaForCausalLM
    elif name == "gemma3-1b":
        config = tf.Gemma3TextConfig(
            hidden_size=1152,
            intermediate_size=6912,
            num_hidden_layers=26,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            vocab_size=262144,
            query_pre_attn_scalar=256,
        )
        cls = tf.Gemma3ForCausalLM
    else:
        config = tf.Qwen3Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=256,
        )
        cls = tf.Qwen3ForCausalLM
    config.use_cache = False
    config._attn_implementation = "sdpa"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        return cls(config).to(torch.bfloat16).train()


def anatomy(step: Callable[[], object]) -> dict[str, object]:
    """What one step is made of on the device."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    issued = time.perf_counter() - started
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in seen.key_averages() if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    return {
        "launches": sum(event.count for event in kernels),
        "device_ms": sum(event.self_device_time_total for event in kernels) / 1e3,
        "issue_ms": issued * 1e3,
        "kernels": [
            [event.key[:100], event.count, event.self_device_time_total / 1e3] for event in kernels[:25]
        ],
    }


def one(name: str, provider: str, steps: int) -> dict[str, object]:
    """Train; run in a process of its own, where Twinkle is active or not."""
    import torch

    started = time.perf_counter()
    model = build(name)
    if provider == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if provider.startswith("compile"):
        model = torch.compile(model)
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_gpu)
    batch, length = SHAPES[name]
    generator = torch.Generator(device="cpu").manual_seed(1)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(vocabulary, (batch, length), generator=generator).to(device)

    def step() -> torch.Tensor:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    first = time.perf_counter()
    loss = step()
    loss.item()
    first = time.perf_counter() - first
    for _ in range(3):
        step()
    times = []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    result = {
        "model": name,
        "provider": provider,
        "ms": statistics.median(times) * 1e3,
        "tokens_per_second": batch * length / statistics.median(times),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "first_step_s": first,
        "start_to_first_step_s": time.perf_counter() - started,
        "loss": loss.item(),
        "torch": torch.__version__,
    }
    if on_gpu:
        result |= anatomy(step)
    if provider.endswith("twinkle"):
        from twinkle import report

        result["bindings"] = [
            [
                b["target"].rpartition(":")[2],
                b["kernel"],
                b["state"],
                b["instances"],
                b["proof"] or b["reason"],
            ]
            for b in report.snapshot()["bindings"]
        ]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES)[:3])
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS[:4]))
    parser.add_argument("--steps", type=int, default=12, help="timed steps")
    parser.add_argument("--profile", action="store_true", help="print the costliest kernels of a step")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "PROVIDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        if args.one[1].endswith("twinkle"):
            import twinkle

            twinkle.activate()
        print("RESULT " + json.dumps(one(args.one[0], args.one[1], args.steps)))
        return
    results = []
    for name in args.models:
        base = None
        for provider in args.providers:
            if provider == "liger" and importlib.util.find_spec("liger_kernel") is None:
                print(f"{name:12} liger           left out: liger-kernel is not installed")
                continue
            environ = {key: value for key, value in os.environ.items() if not key.startswith("TWINKLE_")}
            if provider.endswith("twinkle"):
                environ["TWINKLE_CONFIG"] = "auto"
            environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")]))
            command = [sys.executable, __file__, "--one", name, provider, "--steps", str(args.steps)]
            done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                print(f"{name:12} {provider:15} failed: {done.stderr.strip().splitlines()[-1:]}")
                continue
            result = json.loads(lines[-1].removeprefix("RESULT "))
            results.append(result)
            if args.json:  # After each, since a run is long and may be cut off.
                data = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
                Path(args.json).write_text(json.dumps({**data, "results": results}, indent=2) + "\n")
            base = base or result
            peak = f"{result['peak_gb']:6.1f} GB" if result["peak_gb"] else "        -"
            print(
                f"{name:12} {provider:15} {result['ms']:8.1f} ms {result['tokens_per_second']:9.0f} tok/s "
                f"x{base['ms'] / result['ms']:.2f} {peak}  loss {result['loss']:.4f}",
                flush=True,
            )
            if "launches" in result:
                print(
                    f"{'':12} {result['launches']} launches, device {result['device_ms']:.1f} ms, "
                    f"issued in {result['issue_ms']:.1f} ms, first step {result['first_step_s']:.1f} s"
                )
            for key, count, ms in result["kernels"] if args.profile else ():
                print(f"{'':14}{ms:8.2f} ms {count:5}  {key}")
            for binding in result.get("bindings", []):
                print("             ", *binding)


if __name__ == "__main__":
    main()
