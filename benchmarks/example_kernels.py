"""What the kernels of examples/my_kernels save, next to transformers' own, on this machine.

    python benchmarks/example_kernels.py                       # about three minutes on two CPU cores
    python benchmarks/example_kernels.py --hidden-size 128 --rounds 40 --threads 1

Every figure is the median of interleaved runs: each round times the original and the kernel one after the
other. The ratio is original over kernel (above 1 is faster), the median of the rounds' ratios. "Kept" is the
memory that backward holds on to. The whole step (forward, backward, AdamW) is that of train_qwen3.py with one
kernel at a time, then all of them, put on the classes by hand: Twinkle is not involved.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, Qwen3Config
from transformers.models.bert.modeling_bert import BertIntermediate
from transformers.models.qwen3 import modeling_qwen3 as qwen3

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import my_kernels
import train_qwen3

Call = Callable[[], Any]


def interleaved(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, a round of all of them at a time, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(original: list[float], kernel: list[float]) -> float:
    """Median over the rounds of how many times faster the kernel was."""
    return statistics.median(before / after for before, after in zip(original, kernel, strict=True))


def kept_mb(call: Call) -> float:
    """Megabytes of distinct memory that backward keeps after a forward."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(kept.values()) / 2**20


def show(name: str, original: Call, kernel: Call, wanted: list[torch.Tensor], rounds: int) -> None:
    """One line for the forward without gradients, one for forward and backward when a gradient is wanted."""
    with torch.no_grad():
        seconds = interleaved({"original": original, "kernel": kernel}, rounds)
    line(name, "forward", seconds, "")
    if not wanted:
        return
    results = original()
    results = results if isinstance(results, tuple) else (results,)
    gradients = tuple(torch.randn_like(result) for result in results)

    def both(call: Call) -> Call:
        return lambda: torch.autograd.grad(call(), wanted, gradients)

    seconds = interleaved({"original": both(original), "kernel": both(kernel)}, rounds)
    line(name, "forward+backward", seconds, f"  kept {kept_mb(original):.1f} -> {kept_mb(kernel):.1f} MB")


def line(name: str, what: str, seconds: dict[str, list[float]], rest: str) -> None:
    """Print medians and ratio."""
    before, after = (statistics.median(seconds[which]) * 1e3 for which in ("original", "kernel"))
    times = f"{before:9.3f} -> {after:9.3f} ms"
    print(
        f"{name:<36}{what:<18}{times}  x{ratio(seconds['original'], seconds['kernel']):.2f}{rest}", flush=True
    )


def single_kernels(options: argparse.Namespace) -> None:
    """Each kernel on the shapes that the training program gives it."""
    dtype = getattr(torch, options.dtype)
    tokens, size, head = (options.batch, options.seq_len), options.hidden_size, options.head_dim
    heads = max(2, 2 * size // head)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    for name, shape in (
        ("RMSNorm, hidden", (*tokens, size)),
        ("RMSNorm, query heads", (*tokens, heads, head)),
    ):
        norm, x = qwen3.Qwen3RMSNorm(shape[-1]).to(dtype), random(*shape)
        show(
            f"{name} {shape}",
            lambda norm=norm, x=x: norm(x),
            lambda norm=norm, x=x: my_kernels.layers.RMSNorm.forward(norm, x),
            [x, norm.weight],
            options.rounds,
        )

    q, k = random(*tokens, heads, head).transpose(1, 2), random(*tokens, heads // 2, head).transpose(1, 2)
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    angles = torch.rand(1, options.seq_len, head // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    show(
        f"rotary {tuple(q.shape)}",
        lambda: qwen3.apply_rotary_pos_emb(q, k, cos, sin),
        lambda: my_kernels.functions.apply_rotary_pos_emb(q, k, cos, sin),
        [q, k],
        options.rounds,
    )

    mlp = qwen3.Qwen3MLP(Qwen3Config(hidden_size=size, intermediate_size=3 * size)).to(dtype)
    x = random(*tokens, size)
    show(
        f"GatedMLP {size} x {3 * size}",
        lambda: mlp(x),
        lambda: my_kernels.layers.GatedMLP.forward(mlp, x),
        [x, *mlp.parameters()],
        options.rounds,
    )
    gate, up = random(*tokens, 3 * size), random(*tokens, 3 * size)
    show(
        "  of it silu(gate) * up",
        lambda: mlp.act_fn(gate) * up,
        lambda: my_kernels.layers._SiluMul.apply(gate, up),
        [gate, up],
        options.rounds,
    )

    dense = BertIntermediate(BertConfig(hidden_size=384, intermediate_size=1536)).to(dtype).eval()
    x = random(32, 128, 384)
    show(
        "DenseGelu 384 x 1536 (MiniLM)",
        lambda: dense(x),
        lambda: my_kernels.layers.DenseGelu.forward(dense, x),
        [],
        options.rounds,
    )


def whole_step(options: argparse.Namespace) -> None:
    """A training step with none, one and all of the kernels on the classes."""
    originals = (qwen3.Qwen3RMSNorm.forward, qwen3.Qwen3MLP.forward, qwen3.apply_rotary_pos_emb)
    kernels = (
        my_kernels.layers.RMSNorm.forward,
        my_kernels.layers.GatedMLP.forward,
        my_kernels.functions.apply_rotary_pos_emb,
    )
    settings = train_qwen3.parse_arguments(
        [
            f"--{name.replace('_', '-')}={getattr(options, name)}"
            for name in ("batch", "seq_len", "hidden_size", "head_dim", "layers", "dtype")
        ]
    )
    data, _ = train_qwen3.split(train_qwen3.read_corpus(1_000_000), 0.0, options.seq_len)
    model = train_qwen3.build_model(settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = train_qwen3.draw(data, options.batch, options.seq_len, torch.Generator().manual_seed(0))

    def step(mask: tuple[bool, bool, bool]) -> Call:
        chosen = [kernel if use else own for own, kernel, use in zip(originals, kernels, mask, strict=True)]

        def call() -> None:
            qwen3.Qwen3RMSNorm.forward, qwen3.Qwen3MLP.forward, qwen3.apply_rotary_pos_emb = chosen
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return call

    steps = {
        "original": step((False, False, False)),
        "RMSNorm": step((True, False, False)),
        "GatedMLP": step((False, True, False)),
        "rotary": step((False, False, True)),
        "all three": step((True, True, True)),
    }
    try:
        seconds = interleaved(steps, max(3, options.rounds // 2))
    finally:
        qwen3.Qwen3RMSNorm.forward, qwen3.Qwen3MLP.forward, qwen3.apply_rotary_pos_emb = originals
    for name in list(steps)[1:]:
        line(f"step with {name}", "train", {"original": seconds["original"], "kernel": seconds[name]}, "")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description="Time the example kernels next to transformers' own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=30, help="interleaved runs of each kernel")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--hidden-size", type=int, default=256, help="width of the residual stream")
    parser.add_argument("--head-dim", type=int, default=64, help="width of one attention head")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the whole step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of everything")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}, {options.dtype}"
    )
    single_kernels(options)
    whole_step(options)


if __name__ == "__main__":
    main()
