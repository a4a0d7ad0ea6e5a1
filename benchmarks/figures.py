"""The figures Twinkle promises for every program: start, import, construction, calls, kernelizing.

    python benchmarks/figures.py [--rounds 15] [--json FILE]

Ratios and medians of interleaved rounds. Needs transformers and kernels. The figures of the
interpreter's start are those of ``benchmarks/startup.py``, which this script runs as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent

BUILD = """
import time
start = time.process_time()
import torch, transformers
from transformers import Qwen3Config, Qwen3ForCausalLM
with torch.device("meta"):
    model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=28, hidden_size=1024))
elapsed = time.process_time() - start
from twinkle.report import snapshot
print(elapsed, sum(binding["instances"] for binding in snapshot()["bindings"]))
"""


def build_ratio(rounds: int) -> dict[str, float]:
    """Import transformers and build a 28-layer Qwen3 on ``meta``, with the example's bindings and without."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_")}
    active = {**plain, "TWINKLE_CONFIG": str(ROOT / "examples" / "twinkle.toml")}
    ratios, seconds = [], []
    for number in range(rounds):
        times = {}
        order = (("plain", plain), ("active", active))
        for name, environ in order if number % 2 else reversed(order):
            code = BUILD if name == "plain" else f"import twinkle; twinkle.activate()\n{BUILD}"
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, cwd=ROOT)
            elapsed, instances = done.stdout.split()
            if (int(instances) > 0) != (name == "active"):
                raise SystemExit(f"{name}: {instances} layers are swapped")
            times[name] = float(elapsed)
        ratios.append(times["active"] / times["plain"])
        seconds.append(times["plain"])
    return {
        "import and build, plain (s)": statistics.median(seconds),
        "import and build, active / plain": statistics.median(ratios),
    }


def interleaved(
    rounds: int,
    calls: int,
    best: Callable[[list[float]], float] = statistics.median,
    **runs: Callable[[], object],
) -> dict[str, float]:
    """Seconds a call, the median (or ``best``) over rounds in which every one has its turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            times[name].append((time.perf_counter() - start) / calls)
    return {name: best(values) for name, values in times.items()}


def call_cost(rounds: int) -> dict[str, float]:
    """What a call of a swapped layer costs over a call of a class whose ``forward`` is the kernel."""
    import torch
    from torch import nn

    from twinkle.kernel import kernelize_model, register_external_layer, register_layer_kernel

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 1

    class Direct(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class OneMode(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 1

    register_layer_kernel("any", layer_impl=Direct)
    register_external_layer(Layer, "any")
    register_layer_kernel("one", layer_impl=Direct, mode="train", device="cpu")
    register_external_layer(OneMode, "one")
    direct, swapped, chosen = Direct(), kernelize_model(Layer(), "train"), kernelize_model(OneMode(), "train")
    x = torch.ones(1)
    for layer in (direct, swapped, chosen):
        if layer(x) is not x:
            raise SystemExit(f"{layer} does not run the kernel")
    times = interleaved(
        rounds, 20000, direct=lambda: direct(x), swapped=lambda: swapped(x), chosen=lambda: chosen(x)
    )
    return {
        "a call, kernel for any device and mode (us)": (times["swapped"] - times["direct"]) * 1e6,
        "a call, kernel for one device and mode (us)": (times["chosen"] - times["direct"]) * 1e6,
    }


def guard_cost(rounds: int) -> dict[str, float]:
    """What it costs a call to ask whether all that a kernel was recognised by is still so.

    The text of the guard stands in a function as it does in a dispatcher; the same function without it is
    what it is measured against.
    """
    import torch
    from transformers import Qwen3Config, Qwen3MoeConfig
    from transformers.models.qwen3 import modeling_qwen3 as qwen3
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

    from twinkle.match.reads import KEPT, Guard
    from twinkle.match.structure import check_instance, recognise
    from twinkle.swap.scope import Scope

    config = Qwen3Config(hidden_size=8, intermediate_size=8)
    mixture = Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=8, num_experts=2)
    mixture._experts_implementation = "eager"
    asked = {}
    for name, layer in (
        ("norm", qwen3.Qwen3RMSNorm(8)),
        ("gated MLP", qwen3.Qwen3MLP(config)),
        ("mixture of experts", qwen3_moe.Qwen3MoeExperts(mixture)),
    ):
        facts = check_instance(recognise(type(layer)), layer)
        asked[name] = (facts.handed_guard.of(type(layer)), layer, type(layer).forward)
    rotation = qwen3.apply_rotary_pos_emb
    asked["rotation"] = (Guard(recognise(rotation).reads), None, rotation)
    figures = {}
    for name, (guard, layer, original) in asked.items():
        scope = Scope(original, ["_tw_type"])
        text, names = guard.inline("self", "_tw_guard0_")
        names |= {"_tw_type": type, "_tw_kept": KEPT, "_tw_compiling": torch.compiler.is_compiling}
        for key, value in names.items():
            scope[key] = value
        lines = "def forward(self):\n    try:\n        holds = {}\n    except BaseException:\n"
        lines += "        holds = False\n    if not holds:\n        return False\n    return True\n"
        guarded, nothing = (scope.function(lines.format(test), name) for test in (text, "True"))
        if not guarded(layer):
            raise SystemExit(f"the guard of a {name} fails")
        times = interleaved(
            rounds, 20000, nothing=partial(nothing, layer), guard=partial(guarded, layer), best=min
        )
        figures[f"a call, the guards of a {name} (us)"] = (times["guard"] - times["nothing"]) * 1e6
    return figures


def kernelize_cost(rounds: int, modules: int = 10_000) -> dict[str, float]:
    """``kernelize_model`` and ``kernels.kernelize`` on the same model of many modules, each replaced."""
    import kernels
    import torch
    from kernels import LocalLayerRepository, Mode, use_kernel_mapping
    from kernels.layer import use_kernel_forward_from_hub
    from torch import nn

    from twinkle.kernel import kernelize_model, register_layer_kernel, unkernelize_model

    @use_kernel_forward_from_hub("BenchmarkNorm")
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states * self.weight

    layers = """
import torch.nn as nn
class BenchmarkNorm(nn.Module):
    can_torch_compile = True
    def forward(self, hidden_states):
        return hidden_states + self.weight
"""
    metadata = {
        "name": "benchmark-kernel",
        "id": "_benchmark_kernel_0000001",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    model = nn.Sequential(*(Norm() for _ in range(modules)))
    x = torch.ones(1)
    with tempfile.TemporaryDirectory() as folder:
        variant = Path(folder) / "build" / "torch-cpu"
        variant.mkdir(parents=True)
        (variant / "__init__.py").write_text("from . import layers\n")
        (variant / "layers.py").write_text(layers)
        (variant / "metadata.json").write_text(json.dumps(metadata))
        register_layer_kernel("BenchmarkNorm", repo_path=folder, package_name="benchmark_kernel")
        mapping = {"BenchmarkNorm": {"cpu": LocalLayerRepository(Path(folder), layer_name="BenchmarkNorm")}}
        times: dict[str, list[float]] = {"twinkle": [], "kernels": []}
        for _ in range(rounds):
            start = time.perf_counter()
            kernelize_model(model, mode="inference")
            times["twinkle"].append(time.perf_counter() - start)
            if model[-1](x) != 2:
                raise SystemExit("kernelize_model did not replace the last module")
            unkernelize_model(model)
            with use_kernel_mapping(mapping):
                start = time.perf_counter()
                kernels.kernelize(model, mode=Mode.INFERENCE, device="cpu")
                times["kernels"].append(time.perf_counter() - start)
            if model[-1](x) != 2:
                raise SystemExit("kernels.kernelize did not replace the last module")
            for module in model:
                module.__dict__.pop("forward", None)
    twinkle, theirs = (statistics.median(times[name]) for name in ("twinkle", "kernels"))
    return {
        f"kernelize_model, {modules} modules (ms)": twinkle * 1e3,
        f"kernels.kernelize, {modules} modules (ms)": theirs * 1e3,
        "kernelize_model / kernels.kernelize": twinkle / theirs,
    }


LIMITS = {
    "import and build, active / plain": 1.03,
    "a call, kernel for any device and mode (us)": 0.2,
    "a call, kernel for one device and mode (us)": 0.2,
    "a call, the guards of a norm (us)": 0.2,
    "a call, the guards of a gated MLP (us)": 0.2,
    "a call, the guards of a mixture of experts (us)": 0.2,
    "a call, the guards of a rotation (us)": 0.2,
    "kernelize_model / kernels.kernelize": 1.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what Twinkle costs a program.")
    parser.add_argument("--rounds", type=int, default=15, help="rounds in which everything has its turn")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--no-startup", action="store_true", help="leave out benchmarks/startup.py")
    args = parser.parse_args()
    figures: dict[str, float] = {}
    for part in (call_cost, guard_cost, kernelize_cost, build_ratio):
        print(f"measuring {part.__name__} ...", file=sys.stderr)
        figures.update(part(args.rounds))
    for name, value in figures.items():
        limit = f"   at most {LIMITS[name]}" if name in LIMITS else ""
        print(f"{name:<48} {value:10.3f}{limit}")
    if args.json:
        import torch
        import transformers

        data = {
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cores": os.cpu_count(),
            "figures": figures,
        }
        Path(args.json).write_text(json.dumps(data, indent=2) + "\n")
    if not args.no_startup:
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / "startup.py")], check=True)


if __name__ == "__main__":
    main()
