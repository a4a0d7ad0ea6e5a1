"""Training steps whose loss stands in the forward: with the logits, and with deferred ones, in one run.

    python benchmarks/other_losses.py [--models nanogpt bert t5 whisper] [--device cuda] [--sizes]

Models have random weights, bf16 parameters and no dropout; only the loss differs. A round is one step of each
way in turn; printed are the medians, their ratio and the memory of a step beside the parameters. `--sizes`
measures a head alone with more and more rows, to find the number of logits at which deferring them pays.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from twinkle.deferred.install import install
from twinkle.match.structure import recognise
from twinkle.ops.plain import at_every_size


class Block(nn.Module):
    """A block of GPT-2's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(width, dim=2)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A model like nanoGPT's: its loss is a cross entropy in the forward."""

    def __init__(self, vocab: int = 50304, width: int = 768, layers: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(1024, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


class Head(nn.Module):
    """A head alone."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, x, targets):
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def build(name: str, small: bool):
    """A model on the CPU, and what it is called with."""
    import transformers as tf

    torch.manual_seed(0)
    one = 1 if small else None
    if name == "nanogpt":
        model = GPT(layers=one or 12)
        ids = torch.randint(0, 50257, (1, 512) if small else (16, 1024))
        return model, {"idx": ids, "targets": ids.roll(-1, 1)}
    if name == "bert":
        config = tf.BertConfig(num_hidden_layers=one or 12)
        model = tf.BertForMaskedLM(config)
        ids = torch.randint(5, 30000, (4, 512) if small else (64, 512))
        picked = torch.rand(ids.shape) < 0.15
        return model, {"input_ids": ids.masked_fill(picked, 103), "labels": ids.masked_fill(~picked, -100)}
    if name == "t5":
        sizes = {"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_layers": one or 12}
        config = tf.T5Config(vocab_size=32128, decoder_start_token_id=0, **sizes)
        model = tf.T5ForConditionalGeneration(config)
        ids = torch.randint(2, 32000, (1, 512) if small else (16, 512))
        return model, {"input_ids": ids, "labels": ids.roll(-1, 1)}
    sizes = {"d_model": 768, "encoder_layers": one or 12, "decoder_layers": one or 12}
    heads = {"encoder_attention_heads": 12, "decoder_attention_heads": 12}
    wide = {"encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
    config = tf.WhisperConfig(vocab_size=51865, **sizes, **heads, **wide)
    model = tf.WhisperForConditionalGeneration(config)
    rows = 1 if small else 16
    return model, {
        "input_features": torch.randn(rows, 80, 3000),
        "labels": torch.randint(2, 50000, (rows, 128 if small else 256)),
    }


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "layerdrop", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def step(model: nn.Module, inputs: dict) -> torch.Tensor:
    output = model(**inputs)
    loss = output[1] if isinstance(output, tuple) else output.loss
    del output
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return loss.detach()


def seconds(run, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(plain: nn.Module, inputs: dict, device: str, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of a step with the logits and without, and its memory in MiB, where it is known."""
    ours = copy.deepcopy(plain)
    made = install(ours, recognise(type(ours)))
    assert not isinstance(made, str), made
    ways = (plain, ours)
    times: list[list[float]] = [[], []]
    memory = []
    for model in ways:
        for _ in range(3):
            step(model, inputs)
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(model, inputs)
            memory.append((torch.cuda.max_memory_allocated() - before) / 2**20)
    for _ in range(rounds):
        for at, model in enumerate(ways):
            times[at].append(1e3 * seconds(lambda model=model: step(model, inputs), device))
    return [statistics.median(t) for t in times], memory


def models(names: list[str], device: str, rounds: int) -> None:
    for name in names:
        model, inputs = build(name, small=device == "cpu")
        model = without_dropout(model).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
        if device == "cuda" and name == "whisper":
            inputs["input_features"] = inputs["input_features"].bfloat16()
        inputs = {key: value.to(device) for key, value in inputs.items()}
        (plain, ours), memory = compare(model.train(), inputs, device, rounds)
        held = f", {memory[0]:.0f} -> {memory[1]:.0f} MiB" if memory else ""
        print(f"{name}: {plain:.2f} -> {ours:.2f} ms, {plain / ours:.3f} x{held}", flush=True)


def sizes(device: str, rounds: int) -> None:
    """Of a head with its loss alone."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for vocab, width in ((8192, 512), (32000, 768), (50304, 768)):
        for rows in (64, 256, 1024, 4096):
            model = Head(vocab, width).to(device, dtype)
            hidden = torch.randn(1, rows, width, device=device, dtype=dtype, requires_grad=True)
            inputs = {"x": hidden, "targets": torch.randint(0, vocab, (1, rows), device=device)}
            with at_every_size():
                (plain, ours), memory = compare(model, inputs, device, rounds)
            held = f", {memory[0]:.0f} -> {memory[1]:.0f} MiB" if memory else ""
            print(f"{rows} x {width} x {vocab}: {plain:.3f} -> {ours:.3f} ms{held}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["nanogpt", "bert", "t5", "whisper"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sizes", action="store_true")
    given = parser.parse_args()
    if given.sizes:
        sizes(given.device, given.rounds)
    else:
        models(given.models, given.device, given.rounds)


if __name__ == "__main__":
    main()
