"""Ways to run a program that take turns: a process each, asked line by line, so that noise meets them all.

Two runs of one program differ by half on a shared host. Only ratios of the same round are worth quoting: a
ratio is the median of the rounds' ratios of the first way to another (above 1: faster than the first), with
the smallest and the largest of them.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

ROOT = Path(__file__).resolve().parents[1]

__all__ = [
    "Worker",
    "ask_all",
    "bindings",
    "captures",
    "in_turns",
    "left_alone",
    "prepare",
    "profiled",
    "ratios",
    "serve",
    "versions",
]


class Worker:
    """A process that runs a script in one way.

    Args:
        script: Answers the lines it is sent with :func:`serve`.
        way: What it is called; ``twinkle`` is run under Twinkle.
        arguments: Of the script.
        environ: Variables besides those there are; ``TWINKLE_`` variables are not handed on.
    """

    def __init__(
        self, script: str, way: str, arguments: Iterable[str], environ: Mapping[str, str] | None = None
    ) -> None:
        start = [sys.executable, *(["-m", "twinkle", "run"] if way == "twinkle" else [])]
        own = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_")}
        own["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        self.way = way
        self.process = subprocess.Popen(
            [*start, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**own, **(environ or {})},
        )

    def ask(self, *words: str) -> dict[str, Any]:
        """The answer to a line.

        Raises:
            RuntimeError: The process has ended.
        """
        self.send(*words)
        return self.answer()

    def send(self, *words: str) -> None:
        """Send a line, and do not wait for its answer.

        Raises:
            RuntimeError: The process has ended.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(" ".join(words) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"the process for {self.way} has ended") from None

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the line that was sent.

        Raises:
            RuntimeError: The process has ended.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                answer: dict[str, Any] = json.loads(line[1:])
                return answer
        raise RuntimeError(f"the process for {self.way} has ended")

    def end(self) -> None:
        """Let it go."""
        self.process.kill()
        self.process.wait()


def serve(answer: Callable[..., dict[str, Any]]) -> None:
    """Answer the lines of the parent, until there are no more; an error is an answer, and the next one comes.

    Args:
        answer: Called with the words of a line.
    """
    for line in sys.stdin:
        try:
            given = answer(*line.split())
        except Exception as error:
            traceback.print_exc()
            given = {"error": f"{type(error).__name__}: {error}"[:400]}
        print("@" + json.dumps(given), flush=True)


def ask_all(workers: Iterable[Worker], *words: str) -> dict[str, dict[str, Any]]:
    """Each worker's answer to a line that all of them are at at once."""
    workers = list(workers)
    for worker in workers:
        worker.send(*words)
    return {worker.way: worker.answer() for worker in workers}


def prepare(start: Callable[[], Worker], names: Iterable[str], jobs: int) -> None:
    """Have ``build NAME`` answered for each name, in some processes at once.

    What a compiler makes is then on the disk, and the processes that are measured do not wait for it.
    """
    left = list(names)

    def some() -> None:
        worker = start()
        try:
            while left:
                worker.ask("build", left.pop(0))
        finally:
            worker.end()

    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(some) for _ in range(jobs)]:
            done.result()


def in_turns(workers: list[Worker], rounds: int, *words: str) -> list[dict[str, dict[str, Any]]]:
    """Each worker's answer to a line, round by round; in each round another one is first.

    Raises:
        RuntimeError: A worker answers with an error, or has ended.
    """
    found = []
    for at in range(rounds):
        order = workers[at % len(workers) :] + workers[: at % len(workers)]
        answers = {worker.way: worker.ask(*words) for worker in order}
        for way, answer in answers.items():
            if "error" in answer:
                raise RuntimeError(f"{way}: {answer['error']}")
        found.append(answers)
    return found


def ratios(first: Iterable[float], other: Iterable[float]) -> dict[str, float]:
    """Median, smallest and largest of what the first took over what the other took, in the same round.

    Beside them the ratio of their fastest turns: what other work on the machine takes only ever adds.
    """
    pairs = [*zip(first, other, strict=True)]
    found = [a / b for a, b in pairs]
    return {
        "of_fastest": round(min(a for a, _ in pairs) / min(b for _, b in pairs), 3),
        "ratio": round(statistics.median(found), 3),
        "smallest": round(min(found), 3),
        "largest": round(max(found), 3),
    }


def bindings() -> list[str]:
    """What Twinkle's report says in this process: target, kernel and state of each binding."""
    report: Any = sys.modules.get("twinkle.report")
    if report is None:
        return []
    found = report.snapshot()["bindings"]
    return [f"{b['target'].rpartition(':')[2]} {b['kernel']} {b['state']}" for b in found]


def captures() -> dict[str, int]:
    """What Twinkle's report says of captured layers in this process: how many calls of each were replayed."""
    report: Any = sys.modules.get("twinkle.report")
    found = [] if report is None else report.snapshot().get("captures", [])
    return {f"{c['model']} {c['container']}: {c['blocks']} x {c['block']}": c["replays"] for c in found}


def profiled(call: Callable[[], Any], costliest: int = 0) -> dict[str, Any]:
    """Milliseconds the device is busy with a call, the launches it is made of, and so many of its kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    busy, launches = 0.0, 0
    kernels: dict[str, list[float]] = {}
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if event.is_user_annotation:
                continue  # a range that the program named is no work of its own
            busy += event.self_device_time_total
            kernels.setdefault(event.name[:160], []).append(event.self_device_time_total)
        elif event.name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")):
            launches += 1
    found: dict[str, Any] = {"device_ms": round(busy / 1e3, 3), "launches": launches}
    if costliest:
        costly = sorted(kernels.items(), key=lambda kernel: -sum(kernel[1]))[:costliest]
        found["costliest"] = [[name, len(times), round(sum(times) / 1e3, 3)] for name, times in costly]
    return found


def left_alone() -> dict[str, int]:
    """How many calls of captured layers ran as they are in this process, by reason."""
    report: Any = sys.modules.get("twinkle.report")
    found: dict[str, int] = {}
    for one in [] if report is None else report.snapshot().get("captures", []):
        for reason, calls in one["eager"].items():
            found[reason] = found.get(reason, 0) + calls
    return found


def versions(device: str) -> dict[str, Any]:
    """Of what a result depends on, and the date."""
    import torch

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": str(datetime.date.today()),
    }
    for name in ("transformers", "triton", "liger_kernel"):
        try:
            found[name] = getattr(__import__(name), "__version__", "installed")
        except ImportError:
            found[name] = "not installed"
    found["device"] = torch.cuda.get_device_name() if device != "cpu" else platform.processor() or "cpu"
    return found
