"""What the hooks cost: an import that is no target, a construction, and finding aliases.

    python benchmarks/hooks.py [--rounds 15] [--json FILE]

Processor time, in rounds that alternate what is compared: the median for each, or of the ratios of the
rounds. Needs transformers.
"""

from __future__ import annotations

import argparse
import json
import operator
import platform
import statistics
import sys
import time
from importlib import _bootstrap  # what the import statement calls; the only way to time a miss alone
from pathlib import Path

from twinkle.hooks import imports
from twinkle.hooks.construction import watch_class, watch_pretrained
from twinkle.swap import aliases, holders

TARGETS = [f"transformers.models.family{number}.modeling_family{number}" for number in range(100)]
PATTERNS = [f"package{number}.models.*.modeling_*" for number in range(19)]
PATTERNS.append("transformers.models.*.modeling_*")


def per_import(rounds: int) -> dict[str, float]:
    """Microseconds that a name which is no target costs more, with our finder and with wrapt's behind it."""
    import wrapt

    class Empty:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            return None

    for target in (*TARGETS, *PATTERNS):
        imports.watch_module(target, lambda module, name: None, owner="benchmark")
    ours = next(finder for finder in sys.meta_path if type(finder).__module__ == "twinkle.hooks.finder")
    finders = {
        "nobody": [],
        "an empty finder": [Empty()],
        "ours": [ours],
        "wrapt's, idle": [wrapt.importer.ImportHookFinder()],
    }
    heads = ("numpy", "torch._dynamo", "a", "json")
    counter = iter(range(10**9))
    times: dict[str, list[float]] = {name: [] for name in finders}
    original = list(sys.meta_path)
    try:
        for _ in range(rounds):
            for what, chosen in finders.items():
                # New names each time: a program asks for a name once.
                names = [f"{head}.part{next(counter)}.inner" for _ in range(500) for head in heads]
                names += [f"transformers.models.m{next(counter)}.configuration_m" for _ in range(200)]
                sys.meta_path[:] = [*chosen, Empty()]
                start = time.process_time()
                for name in names:
                    _bootstrap._find_spec(name, None)
                times[what].append((time.process_time() - start) / len(names) * 1e6)
    finally:
        sys.meta_path[:] = original
        imports.uninstall()
    medians = {what: statistics.median(values) for what, values in times.items()}
    return {what: value - medians["nobody"] for what, value in medians.items() if what != "nobody"}


def construction(rounds: int) -> dict[str, float]:
    """The time to build with a watch over the time without, and the time without in seconds."""
    import torch
    from torch import nn
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(num_hidden_layers=28)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

    def model() -> None:
        with torch.device("meta"):
            Qwen3ForCausalLM(config)

    def layers() -> None:
        for _ in range(2000):
            Layer()

    figures = {}
    for what, build, watch in (
        ("Qwen3, 28 layers, meta", model, lambda: watch_pretrained(lambda model: None)),
        ("2000 small layers", layers, lambda: watch_class(Layer, lambda layer: None)),
    ):
        build()
        plain, watched = [], []
        for _ in range(rounds):
            plain.append(_seconds(build))
            handle = watch()
            watched.append(_seconds(build))
            handle.cancel()
        figures[f"{what}: ratio"] = statistics.median(map(operator.truediv, watched, plain))
        figures[f"{what}: seconds"] = statistics.median(plain)
    return figures


def finding(rounds: int) -> dict[str, float]:
    """Milliseconds to find the names and the other keepers of a function among all of transformers."""
    import transformers.trainer  # noqa: F401
    from transformers.models.qwen3 import modeling_qwen3

    function = modeling_qwen3.apply_rotary_pos_emb
    return {
        "modules": len(sys.modules),
        "find": statistics.median(_seconds(lambda: aliases.find(function)) for _ in range(rounds)) * 1e3,
        "holders": statistics.median(
            _seconds(lambda: holders.rebind(function, function)) for _ in range(rounds)
        )
        * 1e3,
    }


def _seconds(call: object) -> float:
    start = time.process_time()
    call()  # type: ignore[operator]
    return time.process_time() - start


def main() -> None:
    """Measure, print and maybe write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = {
        "an import that is no target, us": per_import(arguments.rounds),
        "construction": construction(arguments.rounds),
        "aliases, ms": finding(min(arguments.rounds, 5)),
    }
    for title, rows in figures.items():
        print(title)
        for what, value in rows.items():
            print(f"  {what:<32}{value:10.3f}")
    if arguments.json:
        machine = {"python": platform.python_version(), "machine": platform.machine()}
        arguments.json.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
