"""Train a small byte-level Qwen3 on the text that every Python installation carries.

The model has the proportions of Qwen3-0.6B (query heads twice as wide as the hidden size, half as many
key heads, an MLP three times as wide), random weights and a vocabulary of the 256 bytes. The text is
Python's own: the language reference that ``help()`` shows, then the sources of the standard library with
their docstrings. Nothing is downloaded.

    python train_qwen3.py                               # about a minute on two CPU cores
    python train_qwen3.py --steps 20 --json run.json    # short, and keep the losses
    python train_qwen3.py --hidden-size 512 --layers 8 --dtype bfloat16 --device cuda

The same seed and settings give the same losses, number for number, on the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; every option says what it is in tokens, bytes or seconds."""
    parser = argparse.ArgumentParser(
        description="Train a small byte-level Qwen3 on Python's own documentation and sources.",
        epilog="One step reads BATCH x SEQ-LEN bytes; a byte is a token. A loss of 5.55 (ln 256) "
        "is guessing; below 2.5 the model writes words.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run = parser.add_argument_group("how long")
    run.add_argument("--steps", type=int, default=40, help="optimizer steps")
    run.add_argument("--batch", type=int, default=8, help="sequences in a step")
    run.add_argument("--seq-len", type=int, default=256, help="tokens in a sequence")
    run.add_argument(
        "--lr", type=float, default=2e-3, help="peak learning rate: warmed up, then cosine to a tenth"
    )
    model = parser.add_argument_group("how large")
    model.add_argument("--hidden-size", type=int, default=256, help="width of the residual stream")
    model.add_argument("--layers", type=int, default=4, help="decoder layers")
    model.add_argument("--head-dim", type=int, default=64, help="width of one attention head")
    data = parser.add_argument_group("on what")
    data.add_argument("--corpus-bytes", type=int, default=4_000_000, help="read at most this much text")
    data.add_argument(
        "--eval-split", type=float, default=0.05, help="share of the text kept for the final loss"
    )
    data.add_argument(
        "--eval-batches", type=int, default=8, help="batches of held-out text in the final loss"
    )
    where = parser.add_argument_group("where")
    where.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps ...")
    where.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="weights and activations"
    )
    where.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for torch's own choice")
    where.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the text")
    where.add_argument("--json", metavar="FILE", help="write losses, speed and settings here")
    chosen = parser.parse_args(arguments)
    for name in ("steps", "batch", "hidden_size", "layers", "head_dim"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(chosen, name)}")
    if chosen.seq_len < 2:
        parser.error(f"--seq-len must be at least 2 (a byte and the one it predicts), not {chosen.seq_len}")
    if not 0 <= chosen.eval_split < 1:
        parser.error(f"--eval-split is a share from 0 up to 1, not {chosen.eval_split}")
    if chosen.head_dim % 2:
        parser.error(f"--head-dim must be even (rotary embeddings turn pairs), not {chosen.head_dim}")
    return chosen


def read_corpus(limit: int) -> bytes:
    """Text found on any machine, in the same order on the same Python: at most ``limit`` bytes."""
    parts: list[bytes] = []
    total = 0
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some minimal images leave it out; the sources below are enough
        topics = {}
    for _, text in sorted(topics.items()):
        parts.append(text.encode())
        total += len(parts[-1])
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if total >= limit:
            break
        parts.append(path.read_bytes())
        total += len(parts[-1])
    return b"\n\n".join(parts)[:limit]


def split(corpus: bytes, share: float, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out bytes; the held-out ones are the end of the text."""
    data = torch.frombuffer(bytearray(corpus), dtype=torch.uint8)
    held_out = int(len(data) * share)
    train, test = data[: len(data) - held_out], data[len(data) - held_out :]
    if len(train) < seq_len or (held_out and held_out < seq_len):
        raise SystemExit(f"the text is too short: {len(train)} + {held_out} bytes for sequences of {seq_len}")
    return train, test


def draw(data: torch.Tensor, batch: int, seq_len: int, generator: torch.Generator) -> torch.Tensor:
    """Random windows of the text: ``[batch, seq_len]`` tokens."""
    starts = torch.randint(len(data) - seq_len + 1, (batch, 1), generator=generator)
    return data[starts + torch.arange(seq_len)].long()


def build_model(options: argparse.Namespace) -> Qwen3ForCausalLM:
    """A Qwen3 from its configuration, with random weights of the seed."""
    query_heads = max(2, 2 * options.hidden_size // options.head_dim)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=query_heads - query_heads % 2,
        num_key_value_heads=query_heads // 2,
        head_dim=options.head_dim,
        max_position_embeddings=max(512, options.seq_len),
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(options.seed)
    return Qwen3ForCausalLM(config).to(device=options.device, dtype=getattr(torch, options.dtype))


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Linear warm-up over a tenth of the run, then a cosine down to a tenth of the peak."""
    warmup = max(1, options.steps // 10)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, options.steps - warmup)
    return options.lr * (0.55 + 0.45 * math.cos(math.pi * done))


def synchronize(device: str) -> None:
    """Wait for the device, so that the clock measures work and not its announcement."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device.startswith("mps"):
        torch.mps.synchronize()


def train(
    model: Qwen3ForCausalLM, data: torch.Tensor, options: argparse.Namespace
) -> tuple[list[float], list[tuple[float, float]], bool]:
    """Run the steps.

    Returns the losses, the seconds of each step (clock, processor), and whether Ctrl-C ended it early.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.1, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(options.seed)
    losses: list[float] = []
    seconds: list[tuple[float, float]] = []
    model.train()
    with tqdm(total=options.steps, unit="step", disable=None, dynamic_ncols=True) as bar:
        try:
            for step in range(options.steps):
                tokens = draw(data, options.batch, options.seq_len, generator).to(options.device)
                synchronize(options.device)
                started = time.perf_counter(), time.process_time()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, options)
                loss = model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
                synchronize(options.device)
                seconds.append((time.perf_counter() - started[0], time.process_time() - started[1]))
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.3f}", tok_s=f"{tokens.numel() / seconds[-1][0]:,.0f}")
                if bar.disable and (step + 1) % max(1, options.steps // 10) == 0:  # no terminal: lines
                    print(f"step {step + 1} of {options.steps}, loss {losses[-1]:.3f}", file=sys.stderr)
        except KeyboardInterrupt:
            return losses, seconds[: len(losses)], True
    return losses, seconds, False


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, data: torch.Tensor, options: argparse.Namespace) -> float | None:
    """Mean loss on held-out text, or ``None`` when none was kept."""
    if not len(data) or not options.eval_batches:
        return None
    generator = torch.Generator().manual_seed(options.seed)
    model.eval()
    total = 0.0
    for _ in range(options.eval_batches):
        tokens = draw(data, options.batch, options.seq_len, generator).to(options.device)
        total += model(input_ids=tokens, labels=tokens).loss.item()
    return total / options.eval_batches


def peak_memory_mb(device: str) -> float | None:
    """The most memory held so far: of the GPU, else of this process; ``None`` where nobody counts."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main(arguments: list[str] | None = None) -> int:
    """Read the text, build the model, train, evaluate, print."""
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    train_data, test_data = split(read_corpus(options.corpus_bytes), options.eval_split, options.seq_len)
    model = build_model(options)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"Qwen3 with {parameters / 1e6:.2f} M parameters in {options.dtype} on {options.device}; "
        f"{len(train_data) / 1e6:.2f} MB of text to learn, {len(test_data) / 1e6:.2f} MB held out",
        flush=True,
    )
    losses, seconds, interrupted = train(model, train_data, options)
    if not losses:
        print("stopped before the first step")
        return 130
    # The first steps allocate and warm up; the median of the rest is the speed.
    steady, processor = (
        statistics.median(times) for times in zip(*seconds[min(3, len(seconds) - 1) :], strict=True)
    )
    tokens_per_second = options.batch * options.seq_len / steady
    memory = peak_memory_mb(options.device)
    held_out = None if interrupted else evaluate(model, test_data, options)

    print(
        f"loss        {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps" + " (stopped)" * interrupted
    )
    if held_out is not None:
        print(f"held out    {held_out:.4f}")
    print(f"speed       {tokens_per_second:,.0f} tokens per second ({steady * 1e3:.0f} ms a step)")
    if memory is not None:
        print(f"memory      {memory:,.0f} MB at the peak")
    if options.json:
        result = {
            "losses": losses,
            "eval_loss": held_out,
            "step_seconds": [clock for clock, _ in seconds],
            "processor_seconds": processor,
            "tokens_per_second": tokens_per_second,
            "peak_memory_mb": memory,
            "parameters": parameters,
            "interrupted": interrupted,
            "options": vars(options),
        }
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
