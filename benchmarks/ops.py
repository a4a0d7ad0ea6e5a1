"""The embedded kernels on a GPU, next to what one would use instead, all in one run.

    python benchmarks/ops.py [--json FILE] [--rounds 20] [--only rms_norm,rotary]

Every figure is the median of the device's time of one call, with the cache flushed and the device kept busy
while the host prepares the call. A share is the fewest bytes that the op has to move, over that time, over
the bandwidth of a large copy (bytes read and written) measured in the same run. Backward is timed alone.
Liger's kernel is used where liger-kernel is installed. Host time is that of eager calls on tiny inputs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from twinkle.ops.gated_mlp.activation import gated_activation
from twinkle.ops.layer_norm import reference as layer_norm_reference
from twinkle.ops.layer_norm import triton_backend as layer_norm_backend
from twinkle.ops.qk_norm_rotary import reference as qk_reference
from twinkle.ops.qk_norm_rotary.triton_backend import qk_norm_rotary
from twinkle.ops.residual_norm import reference as residual_reference
from twinkle.ops.residual_norm.triton_backend import residual_norm
from twinkle.ops.rms_norm import reference as norm_reference
from twinkle.ops.rms_norm.triton_backend import rms_norm
from twinkle.ops.rotary import reference as rotary_reference
from twinkle.ops.rotary.layer import apply_rotary_pos_emb
from twinkle.ops.rotary.triton_backend import rotary as rotary_triton

if TYPE_CHECKING:
    from collections.abc import Callable

LLAMA = next(variant for variant in norm_reference.VARIANTS if variant.name == "llama")
FUSED = next(variant for variant in layer_norm_reference.VARIANTS if variant.name == "fused")
HALF = next(variant for variant in rotary_reference.VARIANTS if variant.name == "half")
RESIDUAL = residual_reference.ResidualNormVariant("rms_norm_llama", LLAMA)
QK = qk_reference.QKNormRotaryVariant("llama_half_head", LLAMA, HALF)
EPS = 1e-6
TARGETS = {
    "rms_norm": (90, 80),
    "residual_norm": (92, 85),
    "gated_activation": (98, 98),
    "rotary": (90, 90),
    "qk_norm_rotary": (85, 75),
}


class Case(NamedTuple):
    """An op at a shape: inputs, what gets gradients, the least bytes each way, the ways to compute it."""

    inputs: tuple[Any, ...]
    wanted: tuple[int, ...]
    bytes_forward: int
    bytes_backward: int
    providers: dict[str, Callable[..., Any]]


def _random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda", dtype=torch.float32) * scale).to(torch.bfloat16)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def norm_case(rows: int, width: int) -> Case:
    def eager(x, w):
        return norm_reference.rms_norm(x, w, EPS, variant=LLAMA)

    providers = {
        "eager": eager,
        "torch.compile": _compiled(eager),
        "F.rms_norm": lambda x, w: F.rms_norm(x, (width,), w, EPS),
        "twinkle": lambda x, w: rms_norm(x, w, EPS, variant=LLAMA),
    }
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        providers["liger"] = lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)
    except ImportError:
        pass
    size = rows * width * 2
    inputs = (_random(rows, width).requires_grad_(), (_random(width) + 1).requires_grad_())
    return Case(inputs, (0, 1), 2 * size, 3 * size, providers)


def layer_norm_case(rows: int, width: int) -> Case:
    def eager(x, w, b):
        return F.layer_norm(x, (width,), w, b, EPS)

    def ours(x, w, b):
        return layer_norm_backend.layer_norm(x, w, b, EPS, variant=FUSED, normalized_shape=(width,))

    providers = {"eager": eager, "torch.compile": _compiled(eager), "twinkle": ours}
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        providers["liger"] = lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS)
    except ImportError:
        pass
    size = rows * width * 2
    inputs = (_random(rows, width), _random(width) + 1, _random(width))
    inputs = tuple(x.requires_grad_() for x in inputs)
    return Case(inputs, (0, 1, 2), 2 * size, 3 * size, providers)


def residual_case(rows: int, width: int) -> Case:
    def eager(x, r, w):
        return residual_reference.residual_norm(x, r, w, EPS, variant=RESIDUAL)

    providers = {
        "eager": eager,
        "torch.compile": _compiled(eager),
        "twinkle": lambda x, r, w: residual_norm(x, r, w, EPS, variant=RESIDUAL),
    }
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        providers["liger"] = lambda x, r, w: LigerFusedAddRMSNormFunction.apply(
            x, r, w, EPS, 0.0, "llama", False
        )[::-1]
    except ImportError:
        pass
    size = rows * width * 2
    inputs = (
        _random(rows, width).requires_grad_(),
        _random(rows, width).requires_grad_(),
        (_random(width) + 1).requires_grad_(),
    )
    return Case(inputs, (0, 1, 2), 4 * size, 4 * size, providers)


def gated_case(rows: int, width: int) -> Case:
    def eager(g, u):
        return F.silu(g) * u

    providers = {"eager": eager, "torch.compile": _compiled(eager), "twinkle": gated_activation}
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        providers["liger"] = LigerSiLUMulFunction.apply
    except ImportError:
        pass
    size = rows * width * 2
    inputs = (_random(rows, width).requires_grad_(), _random(rows, width).requires_grad_())
    return Case(inputs, (0, 1), 3 * size, 5 * size, providers)


def _tables(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.outer(
        torch.arange(tokens, device="cuda"), 1e4 ** -(torch.arange(0, dim, 2, device="cuda") / dim)
    )
    angle = torch.cat((angle, angle), -1)[None]
    return angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16)


def rotary_case(batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> Case:
    def eager(q, k, cos, sin):
        return rotary_reference.rotary(q, k, cos, sin, variant=HALF)

    providers = {"eager": eager, "torch.compile": _compiled(eager), "twinkle": apply_rotary_pos_emb}
    try:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        providers["liger"] = liger_rotary_pos_emb
    except ImportError:
        pass
    q = _random(batch, tokens, heads, dim).transpose(1, 2).requires_grad_()
    k = _random(batch, tokens, kv_heads, dim).transpose(1, 2).requires_grad_()
    size = (q.numel() + k.numel()) * 2
    return Case((q, k, *_tables(tokens, dim)), (0, 1), 2 * size, 2 * size, providers)


def product_case(variant: str, batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> Case:
    """Pairs of channels times complex numbers or matrices; tokens before heads in memory."""
    kind = next(known for known in rotary_reference.VARIANTS if known.name == variant)
    real = torch.float64 if kind.compute == "float64" else torch.float32
    angle = torch.randn(1, 1, tokens, dim // 2, device="cuda", dtype=real)
    table: tuple[torch.Tensor | None, ...] = (torch.polar(torch.ones_like(angle), angle), None)
    if kind.pairs == "matrix":
        rows = (angle.cos(), -angle.sin(), angle.sin(), angle.cos())
        table = torch.stack(rows, -1).unflatten(-1, (2, 2)).unbind(-1)

    def eager(q, k, cos, sin):
        return rotary_reference.rotary(q, k, cos, sin, variant=kind)

    providers = {
        "eager": eager,
        "torch.compile": _compiled(eager),
        "twinkle": lambda q, k, cos, sin: rotary_triton(q, k, cos, sin, variant=kind),
    }
    q = _random(batch, tokens, heads, dim).transpose(1, 2).requires_grad_()
    k = _random(batch, tokens, kv_heads, dim).transpose(1, 2).requires_grad_()
    size = (q.numel() + k.numel()) * 2
    tables = sum(column.numel() * column.element_size() for column in table if column is not None)
    return Case((q, k, *table), (0, 1), 2 * size + tables, 2 * size + tables, providers)


def qk_case(batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> Case:
    def eager(q, k, qw, kw, cos, sin):
        return qk_reference.qk_norm_rotary(q, k, qw, kw, EPS, EPS, cos, sin, head_dim=dim, variant=QK)

    providers = {
        "eager": eager,
        "torch.compile": _compiled(eager),
        "twinkle": lambda q, k, qw, kw, cos, sin: qk_norm_rotary(
            q, k, qw, kw, EPS, EPS, cos, sin, head_dim=dim, variant=QK
        ),
    }
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        def liger(q, k, qw, kw, cos, sin):
            q = LigerRMSNormFunction.apply(q.view(batch, tokens, heads, dim), qw, EPS, 0.0, "llama", False)
            k = LigerRMSNormFunction.apply(k.view(batch, tokens, kv_heads, dim), kw, EPS, 0.0, "llama", False)
            return liger_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

        providers["liger (2 kernels)"] = liger
    except ImportError:
        pass
    q = _random(batch, tokens, heads * dim).requires_grad_()
    k = _random(batch, tokens, kv_heads * dim).requires_grad_()
    size = (q.numel() + k.numel()) * 2
    weights = ((_random(dim) + 1).requires_grad_(), (_random(dim) + 1).requires_grad_())
    return Case((q, k, *weights, *_tables(tokens, dim)), (0, 1, 2, 3), 2 * size, 3 * size, providers)


def cases() -> dict[str, Callable[[], Case]]:
    return {
        "rms_norm": lambda: norm_case(16384, 4096),
        "layer_norm": lambda: layer_norm_case(16384, 4096),
        "layer_norm 768": lambda: layer_norm_case(16384, 768),
        "layer_norm 1024": lambda: layer_norm_case(16384, 1024),
        "layer_norm 2048": lambda: layer_norm_case(16384, 2048),
        "layer_norm 8192": lambda: layer_norm_case(8192, 8192),
        "residual_norm": lambda: residual_case(16384, 4096),
        "gated_activation": lambda: gated_case(16384, 14336),
        "rotary": lambda: rotary_case(4, 4096, 32, 8, 128),
        "rotary complex": lambda: product_case("complex_float32", 4, 4096, 32, 8, 128),
        "rotary complex128": lambda: product_case("complex_float64", 1, 16384, 40, 40, 128),
        "rotary matrix": lambda: product_case("matrix_float32", 4, 4608, 24, 24, 128),
        "qk_norm_rotary": lambda: qk_case(4, 4096, 32, 8, 128),
    }


_flush: list[torch.Tensor] = []


def device_ms(call: Callable[[], Any], rounds: int) -> float:
    """Median device time of a call, the cache cold and the device busy until the host has issued it."""
    if not _flush:
        _flush.append(torch.empty(256 << 20, dtype=torch.uint8, device="cuda"))
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _flush[0].zero_()
        torch.cuda._sleep(2_500_000)
        start.record()
        call()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times)


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second, read plus written, of a copy of 1 GiB."""
    source = _random(1 << 29)
    target = torch.empty_like(source)
    ms = device_ms(lambda: target.copy_(source), rounds)
    return 2 * source.numel() * 2 / ms * 1e3


def errors(case: Case, call: Callable[..., Any]) -> list[float]:
    """Relative error of results and gradients against the eager provider in float32 on a part of the rows."""

    def run(function, dtype):
        inputs = [
            x.detach().to(dtype).requires_grad_(i in case.wanted)
            if x is not None and x.dtype == torch.bfloat16
            else x
            for i, x in enumerate(case.inputs)
        ]
        results = function(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        torch.manual_seed(1)
        gradients = [torch.randn_like(r.float()).to(torch.bfloat16).to(r.dtype) for r in results]
        return [*results, *torch.autograd.grad(results, [inputs[i] for i in case.wanted], gradients)]

    exact = run(case.providers["eager"], torch.float32)
    return [
        float((a.float() - b).norm() / b.norm())
        for a, b in zip(run(call, torch.bfloat16), exact, strict=True)
    ]


def measure(name: str, case: Case, bandwidth: float, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for provider, call in case.providers.items():
        torch._dynamo.reset()  # it gives up on a function after eight shapes
        with torch.no_grad():
            forward = device_ms(lambda call=call: call(*case.inputs), rounds)
        results, wanted = _fresh(case, call)
        gradients = [torch.randn_like(r) for r in results]
        backward = device_ms(
            lambda results=results, wanted=wanted, gradients=gradients: torch.autograd.grad(
                results, wanted, gradients, retain_graph=True
            ),
            rounds,
        )
        rows.append(
            {
                "op": name,
                "provider": provider,
                "forward_ms": forward,
                "backward_ms": backward,
                "forward_share": case.bytes_forward / forward * 1e3 / bandwidth,
                "backward_share": case.bytes_backward / backward * 1e3 / bandwidth,
            }
        )
        del results, wanted, gradients
    return rows


def _fresh(case: Case, call: Callable[..., Any]) -> tuple[Any, Any]:
    """Results of a call on copies of the inputs, and the copies to differentiate by."""
    leaves = [
        x.detach().clone().requires_grad_() if i in case.wanted else x for i, x in enumerate(case.inputs)
    ]
    made = call(*leaves)
    return made if isinstance(made, tuple) else (made,), [leaves[i] for i in case.wanted]


def host_us(name: str) -> dict[str, float]:
    """Microseconds of host time of an eager forward and backward, on inputs that take no time."""
    small = {
        "rms_norm": lambda: norm_case(8, 128),
        "layer_norm": lambda: layer_norm_case(8, 128),
        "residual_norm": lambda: residual_case(8, 128),
        "gated_activation": lambda: gated_case(8, 128),
        "rotary": lambda: rotary_case(1, 8, 4, 2, 64),
        "qk_norm_rotary": lambda: qk_case(1, 8, 4, 2, 64),
    }[name]()
    found = {}
    for provider, call in small.providers.items():
        if provider == "torch.compile":
            continue

        def both(call=call):
            made, wanted = _fresh(small, call)
            torch.autograd.grad(made, wanted, [torch.ones_like(r) for r in made])

        for _ in range(10):
            both()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(100):
            both()
        found[provider] = (time.perf_counter() - started) * 1e4
        torch.cuda.synchronize()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/ops.py needs a GPU")
    bandwidth = copy_bandwidth(options.rounds)
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s, torch {torch.__version__}")
    rows: list[dict[str, Any]] = []
    accuracy, host = {}, {}
    for name, make in cases().items():
        op = name.partition(" ")[0]
        if options.only and not {name, op} & set(options.only.split(",")):
            continue
        torch.manual_seed(0)
        case = make()
        rows += measure(name, case, bandwidth, options.rounds)
        accuracy[name] = {p: errors(case, case.providers[p]) for p in ("eager", "twinkle")}
        del case
        torch.cuda.empty_cache()
        for row in rows:
            if row["op"] == name:
                print(
                    f"{name:17} {row['provider']:18}"
                    f" forward {row['forward_ms']:.3f} ms {row['forward_share']:5.0%}"
                    f"   backward {row['backward_ms']:.3f} ms {row['backward_share']:5.0%}",
                    flush=True,
                )
        print("   errors", {p: [f"{e:.1e}" for e in v] for p, v in accuracy[name].items()})
        if name == op:
            host[op] = host_us(op)
            print("   host us", {p: round(v) for p, v in host[op].items()}, flush=True)
    if options.json:
        versions = {"python": platform.python_version()}
        for package in ("torch", "triton", "liger-kernel"):
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        document = {
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name(),
            "versions": versions,
            "copy_bytes_per_s": bandwidth,
            "targets_percent": TARGETS,
            "results": rows,
            "relative_errors_to_float32": accuracy,
            "host_us_forward_and_backward": host,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
