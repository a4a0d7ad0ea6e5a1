"""What one call of an embedded kernel costs the host, beside eager torch and beside an earlier checkout.

    python benchmarks/host.py                       # on a GPU: microseconds by op, forward and backward
    python benchmarks/host.py --before ../earlier   # and those of another checkout, in the same rounds
    python benchmarks/host.py --stubbed             # on any machine: launches that do nothing
    python benchmarks/host.py --stubbed --counts    # calls of functions, in Python and in C

The processes take turns, and a figure is the median of the rounds. The tensors have 1024 elements, so that
the device never is the wall.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[1]


def _steps(call: Any, function: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    """What is measured: a forward without gradients, one with them, and one with its backward."""
    import torch

    inputs, wanted = call.inputs, call.gradients()
    made = function(*inputs)
    made = made if isinstance(made, tuple) else (made,)
    cotangents = tuple(torch.ones_like(y) for y in made)

    def inference() -> Any:
        with torch.no_grad():
            return function(*inputs)

    def forward() -> Any:
        return function(*inputs)

    def both() -> Any:
        results = function(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        return torch.autograd.grad(results, wanted, cotangents)

    return {"inference": inference, "forward": forward, "both": both}


def _timed(step: Callable[[], Any], wait: Callable[[], Any] | None) -> float:
    """Microseconds of the host for a call: the least of several runs of some calls each.

    On a CPU those of the thread, which a busy machine does not lengthen; on a GPU backward has its own.
    """
    clock = time.thread_time if wait is None else time.perf_counter
    best = float("inf")
    for _ in range(12):
        if wait is not None:
            wait()
        start = clock()
        for _ in range(60):
            step()
        best = min(best, (clock() - start) / 60)
    if wait is not None:
        wait()
    return best * 1e6


def _counted(step: Callable[[], Any]) -> dict[str, int]:
    """How many functions a call calls: in Python and in C, without torch's own Python and this script."""
    import torch

    others = (os.path.dirname(torch.__file__), os.path.dirname(os.path.abspath(__file__)))
    found = {"python": 0, "c": 0}

    def note(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call") and not frame.f_code.co_filename.startswith(others):
            found["python" if event == "call" else "c"] += 1

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


def _work(stubbed: bool, counts: bool) -> None:
    """Measure all calls at each line that comes in."""
    import torch
    from host_calls import calls, stub_launches

    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = "cpu" if stubbed else "cuda"
    wait = None if stubbed else torch.cuda.synchronize
    if stubbed:
        context: Any = stub_launches()
    else:
        from twinkle.ops.plain import at_every_size

        context = at_every_size()
    with context:
        steps = {
            (name, way, what): step
            for name, call in calls(device).items()
            for way in ("eager", "kernel")
            for what, step in _steps(call, getattr(call, way)).items()
        }
        for step in steps.values():
            for _ in range(5):
                step()
        for _ in sys.stdin:
            found = {
                "/".join(names): _counted(step) if counts else _timed(step, wait)
                for names, step in steps.items()
            }
            print("@" + json.dumps(found), flush=True)


def _worker(root: Path, stubbed: bool, counts: bool) -> subprocess.Popen[str]:
    flags = [flag for flag, given in (("--stubbed", stubbed), ("--counts", counts)) if given]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_")}
    environ.pop("TRITON_INTERPRET", None)
    environ["PYTHONPATH"] = os.pathsep.join((str(root), str(Path(__file__).parent)))
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environ,
    )


def _ask(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("\n")
        process.stdin.flush()
    for line in process.stdout:
        if line.startswith("@"):
            answer: dict[str, Any] = json.loads(line[1:])
            return answer
    raise SystemExit("a worker has ended")


def _table(found: dict[str, dict[str, Any]], ways: list[str]) -> None:
    print(f"{'':24}{'inference':>30}{'forward':>30}{'forward + backward':>30}")
    print(f"{'':24}" + "".join(f"{way:>10}" for way in ways) * 3)
    for name, figures in found.items():
        cells = [figures[what][way] for what in ("inference", "forward", "both") for way in ways]
        print(f"{name:24}" + "".join(f"{cell:>10.1f}" for cell in cells))


def main() -> None:
    """Measure, print, and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, measured in the same rounds")
    parser.add_argument("--stubbed", action="store_true", help="CPU tensors, launches that do nothing")
    parser.add_argument("--counts", action="store_true", help="count calls of functions; print JSON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        _work(given.stubbed, given.counts)
        return
    workers = {"after": _worker(ROOT, given.stubbed, given.counts)}
    if given.before:
        workers["before"] = _worker(given.before.resolve(), given.stubbed, given.counts)
    try:
        if given.counts:
            print(json.dumps({way: _ask(worker) for way, worker in workers.items()}, indent=1))
            return
        rounds: list[dict[str, dict[str, float]]] = [
            {way: _ask(worker) for way, worker in workers.items()} for _ in range(given.rounds)
        ]
    finally:
        for worker in workers.values():
            worker.kill()
    found: dict[str, dict[str, Any]] = {}
    for key in rounds[0]["after"]:
        name, way, what = key.split("/")
        if way == "eager":
            figure = {"eager": statistics.median(r["after"][key] for r in rounds)}
        else:
            figure = {w: statistics.median(r[w][key] for r in rounds) for w in workers}
        found.setdefault(name, {}).setdefault(what, {}).update(figure)
    ways = ["eager", *(["before"] if given.before else []), "after"]
    _table(found, ways)
    if given.json:
        import torch

        device = "stubbed launches" if given.stubbed else torch.cuda.get_device_name()
        about = {"device": device, "torch": torch.__version__, "unit": "microseconds of the host for a call"}
        given.json.write_text(json.dumps({**about, "rounds": given.rounds, "ops": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
