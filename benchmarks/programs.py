"""Training steps of whole programs with no configuration: plain and under Twinkle in turns, in one run.

    python benchmarks/programs.py [--programs nanogpt,bert,…] [--rounds 9] [--json FILE]
    python benchmarks/programs.py --programs gemma3-1b --ways compile,twinkle,liger
    python benchmarks/programs.py --device cpu --rounds 3          small models, to see what is replaced

Each way to run a program is a process of its own that keeps its model; round by round they take a few steps
in turn, so that the noise of the host meets all of them. A ratio is the median of the rounds' ratios of the
first way to that way (above 1: faster), with the smallest and the largest. Beside it stand the most memory
that a step took, the milliseconds of the host and of the device, the losses of the first and the last warm-up
step, which kernels ran and what was replayed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from turns import Worker, ask_all, bindings, captures, in_turns, left_alone, profiled, ratios, serve, versions

WAYS = ("plain", "compile", "twinkle", "liger")


def work(way: str, device: str) -> None:
    """Answer the lines of the parent."""
    import torch
    from programs_models import PROGRAMS, parameters

    gpu = device != "cpu"
    state: dict[str, Any] = {}

    def wait() -> None:
        if gpu:
            torch.cuda.synchronize()

    def step() -> Any:
        number = state["steps"] = state.get("steps", 0) + 1
        loss = state["loss"](number)
        loss.backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad(set_to_none=True)
        return loss.detach()

    def answer(what: str, *rest: str) -> dict[str, Any]:
        if what == "build":
            torch.manual_seed(0)
            model, loss = PROGRAMS[rest[0]](device, not gpu)
            change(model, way)
            began = time.perf_counter()
            state["loss"] = loss
            state["optimizer"] = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=gpu)
            losses = [step() for _ in range(5)]
            wait()
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            return {
                "parameters": parameters(model),
                "first_steps_s": round(time.perf_counter() - began, 2),
                "losses": [float(losses[0]), float(losses[-1])],
            }
        if what == "report":
            done = profiled(step, costliest=40) if gpu else {}
            found = {"captures": captures(), "left_alone": left_alone()}
            return {"bindings": bindings(), **found, **done}
        wait()
        began = time.perf_counter()
        for _ in range(int(rest[0])):
            step()
        wait()
        found = {"ms": (time.perf_counter() - began) / int(rest[0]) * 1e3}
        began = time.perf_counter()
        step()  # to an idle device
        found["host_ms"] = (time.perf_counter() - began) * 1e3
        wait()  # the next way's turn is to find the device idle
        if gpu:
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
        return found

    serve(answer)


def change(model: Any, way: str) -> None:
    """Make a model what a way of running it is about."""
    if way == "compile":
        model.compile()
    elif way == "liger":
        from liger_kernel.transformers import monkey_patch

        monkey_patch._apply_liger_kernel_to_instance(model=model)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every way of one program."""
    ways = options.ways.split(",")
    environ = {"TWINKLE_SIZES": "all"} if options.device == "cpu" else {}
    workers = [Worker(__file__, way, ("--worker", way, "--device", options.device), environ) for way in ways]
    try:
        built = ask_all(workers, "build", name)
        failed = {way: answer["error"] for way, answer in built.items() if "error" in answer}
        if failed:
            return {"program": name, "failed": failed}
        rounds = in_turns(workers, options.rounds, "run", str(options.steps))
        said = {worker.way: worker.ask("report") for worker in workers}
    finally:
        for worker in workers:
            worker.end()
    result: dict[str, Any] = {"program": name, "parameters": built[ways[0]]["parameters"]}
    for way in ways:
        times = [one[way]["ms"] for one in rounds]
        result[way] = {
            "ms": round(statistics.median(times), 2),
            **ratios((one[ways[0]]["ms"] for one in rounds), times),
            "over": {
                other: ratios((one[other]["ms"] for one in rounds), times) for other in ways if other != way
            },
            "peak_gb": round(max(one[way].get("peak_gb", 0.0) for one in rounds), 2),
            "host_ms": round(statistics.median(one[way]["host_ms"] for one in rounds), 2),
            "first_steps_s": built[way]["first_steps_s"],
            "losses": built[way]["losses"],
            **said[way],
        }
    return result


def show(result: dict[str, Any]) -> None:
    """A result as lines."""
    if "failed" in result:
        print(f"{result['program']}: failed: {result['failed']}", flush=True)
        return
    print(f"{result['program']}: {result['parameters'] / 1e6:.0f} M parameters", flush=True)
    for way in filter(result.__contains__, WAYS):
        one = result[way]
        print(
            f"   {way:8} {one['ms']:8.1f} ms  x{one['ratio']:.3f} ({one['smallest']:.3f} to "
            f"{one['largest']:.3f})  {one['peak_gb']:6.2f} GB  host {one['host_ms']:.1f}  device "
            f"{one.get('device_ms', 0.0):.1f}  first {one['first_steps_s']} s  losses {one['losses']}",
            flush=True,
        )
    one = result.get("twinkle", {})
    print("   kernels:", ", ".join(one.get("bindings", ())) or "none", flush=True)
    print("   captures:", one.get("captures") or "none", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", default="nanogpt,nanogpt-bf16,bert,t5,whisper,dit,vit")
    parser.add_argument("--ways", default="plain,twinkle", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="steps of each way in a round")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.device)
        return 0
    results = []
    for name in options.programs.split(","):
        results.append(measure(name, options))
        show(results[-1])
        if options.json is not None:
            text = json.dumps({"versions": versions(options.device), "results": results}, indent=1)
            options.json.write_text(text + "\n")
    return 1 if any("failed" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
