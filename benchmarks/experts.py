"""Mixture of experts beside what the model runs by itself, in one run.

    python benchmarks/experts.py [--json FILE] [--only qwen3_30b,mixtral] [--rounds 10]
    python benchmarks/experts.py --device cpu

``products`` are the six grouped matrix products of a step alone, on rows that are sorted already: nothing
that computes the gradients is faster. ``loop`` and ``grouped_mm`` are the model's own: its forward as
written, and what transformers takes by default. ``twinkle (triton)`` has its products in triton as well,
``twinkle (torch)`` in torch wherever it has them; ``twinkle`` chooses.
Times are medians, on a GPU those of the device; memory is the peak beyond what was there before the step;
errors are relative to the loop in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from twinkle.ops.experts import products, reference
from twinkle.ops.experts.layer import experts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Shape(NamedTuple):
    """Sizes of one layer of experts."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    k: int
    dtype: torch.dtype = torch.bfloat16


CUDA = {
    "qwen3_30b": Shape(8192, 2048, 768, 128, 8),
    "mixtral": Shape(8192, 4096, 14336, 8, 2),
    "qwen3_30b_short": Shape(512, 2048, 768, 128, 8),
    "qwen3_30b_decode": Shape(4, 2048, 768, 128, 8),
    "mixtral_short": Shape(128, 4096, 14336, 8, 2),
    "mixtral_decode": Shape(4, 4096, 14336, 8, 2),
    "olmoe_float32": Shape(4096, 2048, 1024, 64, 8, torch.float32),
}
CPU = {
    "small": Shape(512, 512, 256, 32, 4, torch.float32),
    "small_bfloat16": Shape(512, 512, 256, 32, 4),
    "tiny": Shape(64, 64, 32, 8, 2, torch.float32),
}


class Layer:
    """Parameters and inputs of a shape, and the ways to compute it."""

    def __init__(self, shape: Shape, device: str) -> None:
        torch.manual_seed(0)
        self.shape = shape
        given = {"device": device, "dtype": shape.dtype}
        self.x = torch.randn(shape.tokens, shape.hidden, **given)
        # Some experts are liked more than others, as routers do.
        liking = torch.randn(shape.tokens, shape.experts, device=device)
        liking += torch.randn(shape.experts, device=device) / 2
        found = liking.softmax(-1).topk(shape.k)
        self.indices = found.indices
        self.weights = (found.values / found.values.sum(-1, keepdim=True)).to(shape.dtype)
        self.gate_up = torch.randn(shape.experts, 2 * shape.inner, shape.hidden, **given).mul_(0.02)
        self.down = torch.randn(shape.experts, shape.hidden, shape.inner, **given).mul_(0.02)
        self.leaves = (self.x, self.weights, self.gate_up, self.down)
        for leaf in self.leaves:
            leaf.requires_grad_()

    def loop(self) -> Any:
        """The definition, which is the forward of the model as written."""
        return reference.experts(
            self.x,
            self.indices,
            self.weights,
            self.gate_up,
            self.down,
            self.shape.experts,
            variant=reference.VARIANTS[0],
        )

    def twinkle(self) -> Any:
        """The embedded kernel."""
        return experts(self.x, self.indices, self.weights, self.gate_up, self.down, self.shape.experts)

    def own(self) -> Callable[[str], Callable[[], Any]] | None:
        """What transformers runs for an implementation, where it has such a layer."""
        try:
            from transformers import Qwen3MoeConfig
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
        except ImportError:
            return None
        config = Qwen3MoeConfig(
            hidden_size=16,
            moe_intermediate_size=16,
            num_experts=self.shape.experts,
            num_experts_per_tok=self.shape.k,
        )
        layer = Qwen3MoeExperts(config)
        layer.gate_up_proj = torch.nn.Parameter(self.gate_up)
        layer.down_proj = torch.nn.Parameter(self.down)
        self.leaves = (self.x, self.weights, layer.gate_up_proj, layer.down_proj)
        self.gate_up, self.down = self.leaves[2:]

        def call(name: str) -> Any:
            layer.config._experts_implementation = name
            return layer(self.x, self.indices, self.weights)

        return lambda name: partial(call, name)


def ways(layer: Layer, device: str) -> Iterator[tuple[str, Callable[[], Any], bool | None]]:
    """Name, forward, and whether its products are triton's (None: as it is chosen)."""
    own = layer.own()
    yield "twinkle", layer.twinkle, None
    if device == "cuda":
        yield "twinkle (triton)", layer.twinkle, True
        yield "twinkle (torch)", layer.twinkle, False
    if own is not None:
        yield "grouped_mm", own("grouped_mm"), None
        if layer.shape.tokens <= 16:
            yield "batched_mm", own("batched_mm"), None
    yield "loop", layer.loop, None


def milliseconds(call: Callable[[], Any], device: str, rounds: int) -> float:
    """Median time of a call; on a GPU that of the device, busy until the host has issued the call."""
    times = []
    for number in range(rounds + 2):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(2_500_000)
            start.record()
            call()
            end.record()
            end.synchronize()
            taken = start.elapsed_time(end)
        else:
            begun = time.perf_counter()
            call()
            taken = (time.perf_counter() - begun) * 1e3
        if number >= 2:
            times.append(taken)
    return statistics.median(times)


def measure(layer: Layer, call: Callable[[], Any], device: str, rounds: int) -> dict[str, float]:
    with torch.no_grad():
        forward = milliseconds(call, device, rounds)
    taken = {"forward_ms": forward, "backward_ms": _backward(layer, call(), device, rounds)}
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = torch.autograd.grad(call(), layer.leaves, torch.ones_like(layer.x))
        taken["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        del found
    return taken


def _backward(layer: Layer, y: torch.Tensor, device: str, rounds: int) -> float:
    gradient = torch.randn_like(y)
    again = partial(torch.autograd.grad, y, layer.leaves, gradient, retain_graph=True)
    return milliseconds(again, device, rounds)


def alone(layer: Layer, device: str, rounds: int) -> dict[str, float]:
    """The products, of rows in their order."""
    shape = layer.shape
    rows = shape.tokens * shape.k
    counts = torch.bincount(layer.indices.flatten(), minlength=shape.experts)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)
    given = {"device": device, "dtype": shape.dtype}
    x, h, a = (torch.randn(rows, width, **given) for width in (shape.hidden, 2 * shape.inner, shape.inner))
    gate_up, down = layer.gate_up.detach(), layer.down.detach()

    def forward() -> None:
        products.rows(x, gate_up.transpose(1, 2), offsets, rows)
        products.rows(a, down.transpose(1, 2), offsets, rows)

    def backward() -> None:
        products.rows(x, down, offsets, rows)
        products.outer(x, a, offsets)
        products.rows(h, gate_up, offsets, rows)
        products.outer(h, x, offsets)

    return {
        "forward_ms": milliseconds(forward, device, rounds),
        "backward_ms": milliseconds(backward, device, rounds),
    }


def errors(layer: Layer, call: Callable[[], Any]) -> list[float]:
    """Of the result and the gradients, relative to the loop in float32."""
    y = call()
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    ours = [y, *torch.autograd.grad(y, layer.leaves, gradient)]
    exact = [t.detach().float().requires_grad_() for t in layer.leaves]
    x, weights, gate_up, down = exact
    variant = reference.VARIANTS[0]
    best = reference.experts(x, layer.indices, weights, gate_up, down, layer.shape.experts, variant=variant)
    theirs = [best, *torch.autograd.grad(best, exact, gradient.float())]
    pairs = zip(ours, theirs, strict=True)
    return [float((a.detach().float() - b.detach()).norm() / b.detach().norm()) for a, b in pairs]


def _answer(ours: bool, *_: Any) -> bool:
    return ours


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU: --device cpu")
    if device == "cpu":
        torch.set_num_threads(1)
    machine = torch.cuda.get_device_name() if device == "cuda" else "one CPU core"
    print(f"{machine}, torch {torch.__version__}")
    found: dict[str, dict[str, Any]] = {}
    chosen = products.is_few
    for name, shape in (CUDA if device == "cuda" else CPU).items():
        if options.only and name not in options.only.split(","):
            continue
        layer = Layer(shape, device)
        here = found[name] = {"products": alone(layer, device, options.rounds)}
        for way, call, ours in ways(layer, device):
            products.is_few = chosen if ours is None else partial(_answer, ours)
            # The loop waits for the host at every expert, and its backward writes all experts for each.
            rounds = 2 if way == "loop" else options.rounds
            here[way] = measure(layer, call, device, rounds)
            if shape.experts <= 64 or shape.tokens <= 16:
                here[way]["errors"] = errors(layer, call)
            products.is_few = chosen
        print(name, *(f"{field}={value}" for field, value in shape._asdict().items()))
        for way, taken in here.items():
            peak = f"   peak {taken['peak_gb']:.2f} GB" if "peak_gb" in taken else ""
            off = f"   errors {' '.join(f'{e:.1e}' for e in taken['errors'])}" if "errors" in taken else ""
            print(
                f"  {way:17} forward {taken['forward_ms']:8.3f} ms   backward {taken['backward_ms']:8.3f} ms"
                f"{peak}{off}",
                flush=True,
            )
        del layer, call
        if device == "cuda":
            torch.cuda.empty_cache()
    if options.json:
        document = {"device": machine, "torch": torch.__version__, "results": found}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
