"""What is recognised in every model family of the installed transformers, and whether it is right.

    python benchmarks/coverage.py --write docs/coverage.md      the table, from scratch (minutes)
    python benchmarks/coverage.py --json result.json            the same as data
    python benchmarks/coverage.py --no-build                    without building models
    python benchmarks/coverage.py --no-build --totals           this transformers, for the table of versions

For every class and function that is recognised, the code itself and the reference of its form run on the
same random inputs, in float32, in bfloat16 and in bfloat16 with float32 parameters or tables; they must be
equal bit for bit. Every model class is built from a small config on the meta device, and the modules in
it are checked against what their class promised.
"""

from __future__ import annotations

import argparse
import collections
import gc
import importlib
import json
import os
import signal
import sys
import time
import warnings
from multiprocessing import get_context
from pathlib import Path

OPS = (
    "rms_norm",
    "gated_mlp",
    "rotary",
    "causal_lm_loss",
    "experts",
    "residual_norm",
    "qk_norm_rotary",
    "layer_norm",
)
# Places inside a forward: recognised, and taken by a kernel where there is one for their form.
INSIDE = ("residual_norm", "qk_norm_rotary")
# Of the 53 model types in the table of liger-kernel 0.8.5, those that have the op on by default.
LIGER = {"rms_norm": 51, "gated_mlp": 45, "rotary": 36, "causal_lm_loss": 51, "layer_norm": 11}
BUILDS, SECONDS = 4, 30
RESULTS = Path(__file__).parent / "results"
VERSIONS = RESULTS / "coverage-versions.json"


def family(name: str) -> str:
    return name.split(".")[2]


# -- one module -----------------------------------------------------------------------------------


def measure(task: tuple[str, bool]) -> dict:
    import torch

    torch.set_num_threads(1)
    gc.disable()
    name, build = task
    out: dict = {
        "module": name,
        "rows": [],
        "wrong": [],
        "not_run": [],
        "built": [],
        "refused": [],
        "of_torch": [],
        "error": None,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _measure(name, build, out)
        except Exception as error:
            out["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if build:
        gc.collect()  # takes a third of a second among millions of objects
    return out


def _measure(name: str, build: bool, out: dict) -> None:
    from twinkle.fuse.survey import recognise_all
    from twinkle.match.survey import candidates

    module = importlib.import_module(name)
    unseen = {}
    for _, value in candidates(module):
        for found in filter(None, recognise_all(value)):
            wired = found.facts.get("wired", True)
            out["rows"].append((found.target, found.op, found.form.name, wired))
            if "wired" in found.facts:
                continue  # made of a sum, norms and a rotation that are tried where they are defined
            if isinstance(value, type):
                unseen[value] = found
            _try(value, found, out)
    if build:
        _build(module, unseen, out)


def _try(value: object, found: object, out: dict) -> None:
    import torch
    from trial import trial
    from trial_loss import trial_loss

    if found.op == "causal_lm_loss":
        outcomes = {str(dtype): trial_loss(value, found, dtype) for dtype in (torch.float32, torch.bfloat16)}
    else:
        cases = ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
        outcomes = {
            f"{dtype}{' mixed' * mixed}": trial(value, found, dtype, mixed=mixed) for dtype, mixed in cases
        }
    for case, outcome in outcomes.items():
        if not outcome.equal:
            ran = "differ" in outcome.found or "instead of" in outcome.found or "the loss is" in outcome.found
            out["wrong" if ran else "not_run"].append(
                (found.target, found.op, found.form.name, case, outcome.found)
            )


# -- models ---------------------------------------------------------------------------------------


def _build(module: object, unseen: dict, out: dict) -> None:
    import torch
    from transformers import PreTrainedModel

    from twinkle.match.structure import check_instance, recognise

    models = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and getattr(value, "config_class", None) is not None
        and not value.__name__.endswith("PreTrainedModel")
    ]
    models.sort(
        key=lambda cls: (not cls.__name__.endswith(("ForConditionalGeneration", "ForCausalLM")), cls.__name__)
    )
    tries = 0
    for cls in models:
        if (tries and not unseen) or tries >= BUILDS:
            break
        tries += 1
        try:
            with _limit(SECONDS), torch.device("meta"):
                model = cls(small(cls.config_class()))
        except Exception as error:
            out["built"].append((cls.__name__, f"{type(error).__name__}: {error}".splitlines()[0][:120]))
            continue
        out["built"].append((cls.__name__, None))
        for path, layer in model.named_modules():
            found = recognise(type(layer))
            unseen.pop(type(layer), None)
            if found:
                facts = check_instance(found, layer)
                if facts and type(layer).__module__.startswith("torch."):
                    out["of_torch"] = sorted({*out["of_torch"], found.op})
                if not facts:
                    out["refused"].append((cls.__name__, path, found.op, str(facts)))


class _limit:
    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def expire(*_: object) -> None:
            raise TimeoutError(f"more than {self.seconds} s")

        signal.signal(signal.SIGALRM, expire)
        signal.alarm(self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)


def small(config: object, depth: int = 0) -> object:
    """Two layers of everything that has layers, in a config and the configs inside it."""
    from transformers import PreTrainedConfig

    layers = [
        (key, value)
        for key, value in vars(config).items()
        if isinstance(value, int)
        and not isinstance(value, bool)
        and value > 2
        and (key.startswith(("num_", "n_")) or key == "depth")
        and ("layer" in key or key == "depth" or "blocks" in key)
    ]
    counts = {value for _, value in layers}
    for key, _ in layers:
        setattr(config, key, 2)
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) in counts and len(value) > 4:
            setattr(config, key, value[:2])
        elif isinstance(value, PreTrainedConfig) and depth < 4:
            small(value, depth + 1)
    return config


# -- all of them ----------------------------------------------------------------------------------


def run(jobs: int, build: bool) -> dict:
    from twinkle.match.survey import modeling_modules

    # Imported before the fork, once for all workers.
    importlib.import_module("transformers.modeling_utils")
    importlib.import_module("trial_loss")
    from transformers.utils import logging

    logging.set_verbosity_error()
    results = []
    started = time.time()
    names = modeling_modules()
    with get_context("fork").Pool(jobs) as pool:
        for done, result in enumerate(pool.imap_unordered(measure, [(name, build) for name in names]), 1):
            results.append(result)
            if done % 50 == 0:
                print(f"{done} of {len(names)}, {time.time() - started:.0f} s", file=sys.stderr, flush=True)
    results.sort(key=lambda result: result["module"])
    import transformers

    return {"transformers": transformers.__version__, "modules": results, "totals": totals(results)}


def totals(results: list) -> dict:
    families = {op: set() for op in OPS}
    wired = {op: set() for op in INSIDE}
    counts, wired_counts = collections.Counter(), collections.Counter()
    for result in results:
        for _, op, _, kernel in result["rows"]:
            families[op].add(family(result["module"]))
            counts[op] += 1
            if op in INSIDE and kernel:
                wired[op].add(family(result["module"]))
                wired_counts[op] += 1
    found = {op: {"families": len(families[op]), "definitions": counts[op]} for op in OPS}
    for op in INSIDE:
        found[op] |= {"wired": len(wired[op]), "wired_definitions": wired_counts[op]}
    return found


def text(data: dict) -> str:
    results = data["modules"]
    wrong = [row for result in results for row in result["wrong"]]
    not_run = [row for result in results for row in result["not_run"]]
    built = [(result["module"], *row) for result in results for row in result["built"]]
    refused = collections.Counter((row[2], _kind(row[3])) for result in results for row in result["refused"])
    tried = sum(op not in INSIDE for result in results for _, op, _, _ in result["rows"])
    lines = [
        "# Coverage",
        "",
        f"What `twinkle match --all` recognises in transformers {data['transformers']}, by structure.",
        "Written by `python benchmarks/coverage.py --write docs/coverage.md`.",
        "",
        "| op | families | classes and functions | model types in liger-kernel 0.8.5 |",
        "|---|---|---|---|",
    ]
    for op in OPS:
        total = data["totals"][op]
        lines.append(f"| `{op}` | {total['families']} | {total['definitions']} | {LIGER.get(op, '–')} |")
    wired = ", ".join(
        f"`{op}` in {total['wired']} families ({total['wired_definitions']} classes)"
        for op, total in data["totals"].items()
        if op in INSIDE
    )
    lines += [
        "",
        "`residual_norm` and `qk_norm_rotary` are places inside a forward, found in its statements. A kernel",
        f"takes the place of {wired};",
        "for the norms (mostly LayerNorm) and rotations of the others there is none.",
        "",
        "## Is it right?",
        "",
        f"Of {tried} recognitions, code and reference of the form ran on the same random inputs on the CPU:",
        "in float32, in bfloat16, and in bfloat16 with float32 weights or tables.",
        f"**{len(wrong)}** differ in a bit or in dtype.",
        "",
        "`residual_norm` and `qk_norm_rotary` are made of a sum, norms and a rotation, tried where they are",
        "defined. A `causal_lm_loss` runs the class's own forward over a stand-in for all below its head.",
        "",
    ]
    lines += [
        f"- wrong: `{target}` as {op} {form}, {case}: {found}" for target, op, form, case, found in wrong
    ]
    if not_run:
        lines += ["Not run, because the stand-in does not satisfy the rest of their forward:", ""]
        seen = dict.fromkeys((target, form) for target, _, form, _, _ in not_run)
        lines += [f"- `{target}` ({form})" for target, form in seen]
        lines.append("")
    if built:
        of_torch = {family(result["module"]) for result in results if "layer_norm" in result["of_torch"]}
        done = [row for row in built if row[2] is None]
        lines += [
            "## Instances",
            "",
            f"{len(done)} of {len(built)} model classes could be built from a small config on meta;",
            f"the rest need a config that its defaults do not give. Models of {len(of_torch)} families hold",
            "`torch.nn.LayerNorm`, which is recognised as well and gets the kernel of `layer_norm` on a GPU;",
            "the tables count only classes that families define. Modules whose class is recognised and that",
            "are left alone:",
            "",
            "| op | reason | modules |",
            "|---|---|---|",
        ]
        lines += [f"| `{op}` | {reason} | {count} |" for (op, reason), count in refused.most_common(20)]
        lines.append("")
    errors = [(result["module"], result["error"]) for result in results if result["error"]]
    if errors:
        lines += ["Modules that could not be imported here:", ""]
        lines += [f"- `{module}`: {error}" for module, error in errors]
        lines.append("")
    lines += versions(data)
    if (RESULTS / "families-cpu.json").is_file():
        import families

        lines += families.section(json.loads((RESULTS / "families-cpu.json").read_text())).splitlines()
        lines.append("")
    lines += [
        "## By family",
        "",
        "Forms in parentheses are recognised inside a forward, and no kernel takes their place.",
        "",
        "| family | " + " | ".join(f"`{op}`" for op in OPS) + " |",
        "|---" * (len(OPS) + 1) + "|",
    ]
    table: dict = {}
    for result in results:
        for _, op, form, kernel in result["rows"]:
            shown = form if kernel else f"({form})"
            table.setdefault(family(result["module"]), {}).setdefault(op, {})[shown] = None
    for name in sorted(table):
        cells = ["<br>".join(table[name].get(op, ())) for op in OPS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def versions(data: dict) -> list:
    """The totals of the versions of transformers that were looked at, as Markdown."""
    others = json.loads(VERSIONS.read_text()) if VERSIONS.is_file() else {}
    others[data["transformers"]] = {"modules": len(data["modules"]), "totals": data["totals"]}
    lines = [
        "## Other versions of transformers",
        "",
        "Families by op. Before 5.0 experts are lists of layers, which is no op; before 5.18 their one-hot",
        "has no room for a slot without expert (`unpadded` forms).",
        "",
        "| transformers | modules | " + " | ".join(f"`{op}`" for op in OPS) + " |",
        "|---|---" + "|---" * len(OPS) + "|",
    ]
    for version in sorted(others, key=lambda text: [int(part) for part in text.split(".")]):
        one = others[version]
        counts = (str(one["totals"].get(op, {}).get("families", 0)) for op in OPS)
        lines.append(f"| {version} | {one['modules']} | " + " | ".join(counts) + " |")
    return [*lines, ""]


def _kind(reason: str) -> str:
    import re

    return re.sub(r"^[\w.]+ (is a|cannot)", r"… \1", reason)[:100]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", metavar="FILE", help="the table as Markdown")
    parser.add_argument("--json", metavar="FILE", help="everything as JSON")
    parser.add_argument("--totals", action="store_true", help=f"put the totals into {VERSIONS.name}")
    parser.add_argument("--from", dest="given", metavar="FILE", help="what --json wrote, and look at nothing")
    parser.add_argument("--no-build", action="store_true", help="build no models")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4))
    options = parser.parse_args()
    if options.given:
        data = json.loads(Path(options.given).read_text())
    else:
        data = run(options.jobs, not options.no_build)
    if options.totals:
        known = json.loads(VERSIONS.read_text()) if VERSIONS.is_file() else {}
        known[data["transformers"]] = {"modules": len(data["modules"]), "totals": data["totals"]}
        VERSIONS.write_text(json.dumps(known, indent=1) + "\n")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(data, file, indent=1)
    if options.write:
        with open(options.write, "w") as file:
            file.write(text(data))
    wrong = sum(len(result["wrong"]) for result in data["modules"])
    print(json.dumps({**data["totals"], "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
