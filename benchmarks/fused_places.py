"""Sums before a LayerNorm, adaptive norms, activations, GroupNorm with SiLU, functions: on a GPU, in one run.

    python benchmarks/fused_places.py [--json FILE] [--rounds 15] [--places NAME,...]

The names are those of `PLACES`. `group_norm` calls the kernel; `group_norm_silu` runs a forward with two
layers as a program writes them, with `kernels = "auto"` and without. `bias_gelu` is a candidate that is not
in the package (`bias_gelu.py`): the first linear layer of an MLP with its GELU, and the whole MLP.
`functions` are norms and gates that are functions.

Every case is checked first: results and gradients on fresh inputs, against the eager steps in float32; the
kernel's error may be no more than twice that of the eager steps, and a little more than float32's own.

Device times are of one call, with the cache flushed and the device kept busy while the host prepares it. In
every round all ways to compute a case take turns, in another order each; a ratio is the median of the rounds'
ratios of eager to that way (above 1: faster than eager), with the tenth and the ninetieth percentile. A share
is the fewest bytes that the case has to move, over that time, over the bandwidth of a large copy in the same
run. Wall times of small inputs, forward and backward without a pause, show where a launch costs more than a
kernel saves. Liger's kernels are used where liger-kernel is installed and has one.
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
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fused_places_cases import PLACES, Case, cases, random, small_cases

from twinkle.ops.activation import reference as activation_reference
from twinkle.ops.activation.triton_backend import activation
from twinkle.ops.plain import at_every_size

if TYPE_CHECKING:
    from collections.abc import Callable

COMPILE_UNTIL_S = 150
"""Seconds after the start from which torch.compile is left out: the whole run has four minutes."""
_started = time.perf_counter()


def _tuple(made: Any) -> tuple[torch.Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def _leaves(inputs: tuple[torch.Tensor, ...], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]


def errors(case: Case) -> dict[str, list[float]]:
    """Relative errors of results and gradients to the eager steps in float32 (float64 for float32)."""
    inputs = case.inputs()
    low = inputs[0].dtype
    high = torch.float64 if low == torch.float32 else torch.float32
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = [y.shape for y in _tuple(case.ways["eager"](*inputs))]
    cotangents = [torch.randn(s, generator=generator, device="cuda").to(low) for s in shapes]

    def run(way: Callable[..., Any], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = _leaves(inputs, dtype)
        results = _tuple(way(*leaves))
        return [*results, *torch.autograd.grad(results, leaves, [g.to(dtype) for g in cotangents])]

    exact = run(case.ways["eager"], high)
    found = {}
    for name in ("eager", case.ours):
        found[name] = [
            float((a.to(high) - b).norm() / b.norm())
            for a, b in zip(run(case.ways[name], low), exact, strict=True)
        ]
    room = 1e-6 if low == torch.float32 else 1e-5
    for ours, theirs in zip(found[case.ours], found["eager"], strict=True):
        if not ours <= 2 * theirs + room:
            raise AssertionError(f"less exact than the eager steps: {found}")
    return found


def differing(case: Case) -> float:
    """The share of the last result's elements that are not the eager ones, bit for bit."""
    inputs = case.inputs()
    with torch.no_grad():
        a, b = (_tuple(case.ways[name](*inputs))[-1] for name in ("eager", case.ours))
    return float((a != b).float().mean())


_flush: list[torch.Tensor] = []


def _event_pair(call: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Events around a call, the cache cold and the device busy until the host has issued it."""
    if not _flush:
        _flush.append(torch.empty(256 << 20, dtype=torch.uint8, device="cuda"))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flush[0].zero_()
    torch.cuda._sleep(2_000_000)
    start.record()
    call()
    end.record()
    return start, end


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Device milliseconds of each call in every round; in each round another one is first."""
    for call in calls.values():
        for _ in range(2):
            call()
    names, pairs = list(calls), {name: [] for name in calls}
    for at in range(rounds):
        for name in names[at % len(names) :] + names[: at % len(names)]:
            pairs[name].append(_event_pair(calls[name]))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) for a, b in found] for name, found in pairs.items()}


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second, read plus written, of a copy of 1 GiB."""
    source = random(1 << 29, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times = in_turns({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    return 2 * source.numel() * 2 / statistics.median(times) * 1e3


def _ratios(times: dict[str, list[float]], name: str) -> tuple[float, float, float]:
    found = sorted(a / b for a, b in zip(times["eager"], times[name], strict=True))
    return statistics.median(found), found[len(found) // 10], found[-1 - len(found) // 10]


def measure(case: Case, bandwidth: float, rounds: int) -> dict[str, Any]:
    inputs = case.inputs()
    ways = dict(case.ways)
    if case.compiled and time.perf_counter() - _started < COMPILE_UNTIL_S:
        torch._dynamo.reset()  # it gives up on a function after eight shapes
        ways["torch.compile"] = torch.compile(case.ways["eager"], fullgraph=True, dynamic=False)

    def forward(way: Callable[..., Any]) -> None:
        with torch.no_grad():
            way(*inputs)

    leaves = _leaves(inputs)
    cotangents = [torch.randn_like(y) for y in _tuple(case.ways["eager"](*inputs))]

    def both(way: Callable[..., Any]) -> None:
        torch.autograd.grad(_tuple(way(*leaves)), leaves, cotangents)

    for name in [name for name in ways if name not in ("eager", case.ours)]:
        try:
            forward(ways[name])
            both(ways[name])
        except Exception as error:
            print(f"   {name} cannot: {type(error).__name__} {str(error)[:200]}")
            del ways[name]
    row: dict[str, Any] = {"op": case.op, "case": case.name}
    for mode, call, moved in (("forward", forward, case.bytes_forward), ("both", both, case.bytes_both)):
        here = {**ways, **(case.forward_only if mode == "forward" else {})}
        times = in_turns({name: lambda w=way, c=call: c(w) for name, way in here.items()}, rounds)
        row[mode] = {}
        for name in here:
            ms = statistics.median(times[name])
            ratio, low, high = _ratios(times, name)
            row[mode][name] = {
                "ms": ms,
                "share": moved / ms * 1e3 / bandwidth,
                "ratio": ratio,
                "p10": low,
                "p90": high,
            }
    return row


def wall_us(case: Case, repeats: int = 60, rounds: int = 7) -> dict[str, Any]:
    """Wall microseconds of forward and backward one after the other; the ratio is paired."""
    inputs = case.inputs()
    leaves = _leaves(inputs)
    cotangents = [torch.randn_like(y) for y in _tuple(case.ways["eager"](*inputs))]
    row: dict[str, Any] = {"op": case.op, "case": case.name}

    def forward(way: Callable[..., Any]) -> None:
        with torch.no_grad():
            way(*inputs)

    def both(way: Callable[..., Any]) -> None:
        torch.autograd.grad(_tuple(way(*leaves)), leaves, cotangents)

    ways = {name: case.ways[name] for name in ("eager", "twinkle")}
    if case.op == "activation":  # the op has a dispatcher in front that layers do not pay for
        variant = next(v for v in activation_reference.VARIANTS if v.name in case.name)
        ways["twinkle"] = lambda x: activation(x, variant=variant)
    for mode, call in (("forward", forward), ("both", both)):
        times: dict[str, list[float]] = {name: [] for name in ways}
        for at in range(rounds + 1):
            for name in list(ways)[:: 1 if at % 2 else -1]:
                torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(repeats):
                    call(ways[name])
                torch.cuda.synchronize()
                times[name].append((time.perf_counter() - began) / repeats * 1e6)
        times = {name: found[1:] for name, found in times.items()}
        ratio, low, high = _ratios(times, "twinkle")
        row[mode] = {name: statistics.median(found) for name, found in times.items()}
        row[mode] |= {"ratio": ratio, "p10": low, "p90": high}
    return row


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "liger-kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _line(row: dict[str, Any], mode: str) -> str:
    return "  ".join(
        f"{name} {m['ms']:.3f} ms {m['share']:4.0%}"
        + ("" if name == "eager" else f" x{m['ratio']:.2f} ({m['p10']:.2f}-{m['p90']:.2f})")
        for name, m in row[mode].items()
    )


def check_and_measure(document: dict[str, Any], case: Case, rounds: int) -> None:
    """Add a case to the document, or the reason why it has no figures."""
    torch.manual_seed(0)
    try:
        off = errors(case)
        if case.check is not None:
            case.check()
        row = measure(case, document["copy_bytes_per_s"], rounds)
    except Exception as error:
        document["failed"][f"{case.op} {case.name}"] = f"{type(error).__name__}: {error}"
        print(f"{case.op} {case.name}: {type(error).__name__}: {error}", flush=True)
        return
    row |= {"relative_errors": off, "differing": differing(case)}
    document["results"].append(row)
    shown = "; ".join(f"{name} {' '.join(f'{e:.1e}' for e in v)}" for name, v in off.items())
    print(f"{case.op} {case.name}: differing {row['differing']:.2%}, errors {shown}")
    print("   forward ", _line(row, "forward"))
    print("   both    ", _line(row, "both"), flush=True)
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--places", default=",".join(PLACES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/fused_places.py needs a GPU")
    only = options.places.split(",")
    if unknown := set(only) - {*PLACES}:
        raise SystemExit(f"no such places: {', '.join(sorted(unknown))}; there are {', '.join(PLACES)}")
    document: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "copy_bytes_per_s": copy_bandwidth(options.rounds),
        "results": [],
        "small": [],
        "failed": {},
    }
    print(
        f"{document['device']}: copy {document['copy_bytes_per_s'] / 1e12:.2f} TB/s, {document['versions']}"
    )

    def save() -> None:
        if options.json:
            document["seconds"] = time.perf_counter() - _started
            options.json.write_text(json.dumps(document, indent=1) + "\n")

    with at_every_size():
        for case in cases():
            if case.op in only:
                check_and_measure(document, case, options.rounds)
                save()
        for case in small_cases():
            if case.op not in only:
                continue
            row = wall_us(case)
            document["small"].append(row)
            shown = "; ".join(
                f"{mode} eager {row[mode]['eager']:.0f} us twinkle {row[mode]['twinkle']:.0f} us "
                f"x{row[mode]['ratio']:.2f} ({row[mode]['p10']:.2f}-{row[mode]['p90']:.2f})"
                for mode in ("forward", "both")
            )
            print(f"wall {case.op} {case.name}: {shown}", flush=True)
    save()
    print(f"{time.perf_counter() - _started:.0f} s")
    if document["failed"]:
        raise SystemExit(f"failed: {', '.join(document['failed'])}")


if __name__ == "__main__":
    main()
