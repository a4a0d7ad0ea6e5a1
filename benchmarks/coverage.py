"""What is recognised in every model family of the installed transformers, and whether it is right.

    python benchmarks/coverage.py --write docs/coverage.md      the page and the data beside it (minutes)
    python benchmarks/coverage.py --from benchmarks/results/coverage.json --write docs/coverage.md
                                                                the page alone, from the data
    python benchmarks/coverage.py --json result.json            every single recognition
    python benchmarks/coverage.py --no-build                    without building models
    python benchmarks/coverage.py --no-build --totals           this transformers, for the table of versions

For every class and function that is recognised, the code itself and the reference of its variant run on the
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
import textwrap
import time
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

OPS = (
    "rms_norm",
    "gated_mlp",
    "rotary",
    "causal_lm_loss",
    "experts",
    "residual_norm",
    "qk_norm_rotary",
    "layer_norm",
    "activation",
    "group_norm",
    "modulated_norm",
)
# Places inside a forward: recognised, and taken by a kernel where there is one for their variant.
INSIDE = ("residual_norm", "qk_norm_rotary", "modulated_norm")
# Of the 53 model types in the table of liger-kernel 0.8.5, those that have the op on by default.
LIGER = {"rms_norm": 51, "gated_mlp": 45, "rotary": 36, "causal_lm_loss": 51, "layer_norm": 11}
BUILDS, SECONDS = 4, 30
RESULTS = Path(__file__).parent / "results"
VERSIONS = RESULTS / "coverage-versions.json"
DATA = RESULTS / "coverage.json"
PACKAGES = RESULTS / "coverage-packages.json"


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
            wired = found.facts.get("wired")  # None: the whole class or function is the op
            out["rows"].append((found.target, found.op, found.variant.name, wired))
            if wired is not None:
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
                (found.target, found.op, found.variant.name, case, outcome.found)
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


def summary(data: dict) -> dict:
    """What the page and the data beside it hold: totals, and the variants of each family by op."""
    results = data["modules"]
    built = [row for result in results for row in result["built"]]
    refused = collections.Counter((row[2], _kind(row[3])) for result in results for row in result["refused"])
    not_run = dict.fromkeys((row[0], row[2]) for result in results for row in result["not_run"])
    found: dict = {True: {}, False: {}}
    for result in results:
        for _, op, variant, kernel in result["rows"]:
            variants = found[kernel is not False].setdefault(family(result["module"]), {}).setdefault(op, [])
            if variant not in variants:
                variants.append(variant)
    return {
        "transformers": data["transformers"],
        "modules": len(results),
        "totals": data["totals"],
        "tried": sum(wired is None for result in results for *_, wired in result["rows"]),
        "wrong": [
            dict(zip(("target", "op", "variant", "case", "found"), row, strict=True))
            for result in results
            for row in result["wrong"]
        ],
        "not_run": [{"target": target, "variant": variant} for target, variant in not_run],
        "instances": {
            "built": sum(row[1] is None for row in built),
            "of": len(built),
            "families_with_torch_layer_norm": len(
                {family(result["module"]) for result in results if "layer_norm" in result["of_torch"]}
            ),
            "left_alone": [
                {"op": op, "reason": reason, "modules": count}
                for (op, reason), count in refused.most_common(20)
            ],
        },
        "errors": [
            {"module": result["module"], "error": result["error"]} for result in results if result["error"]
        ],
        "families": _by_family(found[True]),
        "families_without_kernel": _by_family(found[False]),
    }


def _by_family(found: dict) -> dict:
    return {name: {op: found[name][op] for op in OPS if op in found[name]} for name in sorted(found)}


def dump(found: dict) -> str:
    """A summary as JSON, one line a family."""
    lines = []
    for key, value in found.items():
        text = json.dumps(value)
        if key.startswith("families"):
            rows = (f"  {json.dumps(name)}: {json.dumps(ops)}" for name, ops in value.items())
            text = "{\n" + ",\n".join(rows) + "\n }"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def page(found: dict) -> str:
    """A summary as the page ``docs/coverage.md``."""
    totals = found["totals"]
    rows = (
        f"| `{op}` | {totals[op]['families']} | {totals[op]['definitions']} | {LIGER.get(op, '–')} |"
        for op in OPS
    )
    taken = (
        f"A kernel takes the place of `{op}` in {totals[op]['wired']} families"
        f" ({totals[op]['wired_definitions']} classes)."
        for op in INSIDE
    )
    blocks = [
        "<!-- Generated by: python benchmarks/coverage.py --write docs/coverage.md -->",
        "# Coverage",
        _prose(f"""
            Twinkle recognises the code of transformers {found["transformers"]} by its structure, in
            {found["modules"]} modeling modules. This page has the totals.
        """),
        f"""\
- `twinkle match --all` prints every class and function of the transformers that is installed.
- `twinkle match transformers.models.qwen3` prints those of one family.
- [{DATA.name}](../benchmarks/results/{DATA.name}) lists the variants of every family by op. The command
  that generates this page writes it as well.""",
        _table("| op | families | classes and functions | model types in liger-kernel 0.8.5 |", rows),
        """\
- **families** counts the folders of `transformers.models` in which at least one class or function is
  recognised as the op.
- **classes and functions** counts the definitions that are recognised.
- **model types in liger-kernel** counts those for which liger-kernel has the op on by default.""",
        _prose(f"""
            `residual_norm`, `qk_norm_rotary` and `modulated_norm` are places inside a forward, found in its
            statements; so are those of `group_norm` that are a norm and the SiLU behind it.
            {" ".join(taken)} The others hold a norm or a rotation for which there is no kernel;
            the data has them under `families_without_kernel`. A sum before a norm that is modulated counts
            as both; its norm is computed by `modulated_norm`. Many of the classes with a `causal_lm_loss` are
            classifiers, which write their loss alike: their instances are left alone.
        """),
        *_right(found),
        *_packages(),
        *_instances(found["instances"]),
    ]
    if found["errors"]:
        blocks += [
            "These modules could not be imported on the machine of this run:",
            "\n".join(f"- `{row['module']}`: {row['error']}" for row in found["errors"]),
        ]
    blocks += _versions(found)
    if (RESULTS / "families-cpu.json").is_file():
        import families

        blocks.append(families.section(json.loads((RESULTS / "families-cpu.json").read_text())).rstrip())
    return "\n\n".join(blocks) + "\n"


def _right(found: dict) -> list:
    """How often code and reference differ, as blocks of Markdown."""
    blocks = [
        "## Is it right?",
        _prose(f"""
            {found["tried"]} recognitions were tried: the code and the reference of its variant ran on the
            same random inputs, on the CPU, in float32, in bfloat16, and in bfloat16 with float32 weights or
            tables. **{len(found["wrong"])}** differ in a bit or in dtype.
        """),
        _prose("""
            The sum, the norms and the rotation of a place inside a forward are tried where they are
            defined. A `causal_lm_loss` runs the forward of its class over a stand-in for all layers below
            the head.
        """),
    ]
    wrong = [
        f"- wrong: `{row['target']}` as {row['op']} {row['variant']}, {row['case']}: {row['found']}"
        for row in found["wrong"]
    ]
    if wrong:
        blocks.append("\n".join(wrong))
    if found["not_run"]:
        blocks.append(
            _prose(f"""
                {len(found["not_run"])} did not run, because the stand-in does not satisfy the rest of their
                forward, most of them classifiers; the data lists them under `not_run`.
            """)
        )
    return blocks


def _packages() -> list:
    """What coverage_packages.py has found in other packages and in the corpus, as blocks of Markdown."""
    if not PACKAGES.is_file():
        return []
    data = json.loads(PACKAGES.read_text())
    names = list(data["packages"])
    rows = []
    for op in OPS:
        counts = [len(one["recognised"].get(op, ())) for one in data["packages"].values()]
        if any(counts) or op in data["corpus"]:
            rows.append(f"| `{op}` | {data['corpus'].get(op, 0)} | " + " | ".join(map(str, counts)) + " |")
    shown = [f"{name} {one['version']}" for name, one in data["packages"].items()]
    tried = sum(one["tried"] for one in data["packages"].values())
    wrong = sum(len(one["not_equal"]) for one in data["packages"].values())
    return [
        "## Other packages, and the ways people write",
        _prose(f"""
            Spellings in `tests/corpus`, each with look-alikes that must not match, and classes and functions
            of other packages (`python benchmarks/coverage_packages.py`). {tried} trials of these packages'
            code in float32 and bfloat16 ran; **{wrong}** differ. torchtune cannot be imported beside torch
            2.13 (it wants an older torchao); its forms are in the corpus.
        """),
        _table(f"| op | corpus | {' | '.join(shown)} |", rows) if names else "",
    ]


def _instances(found: dict) -> list:
    """What the modules of whole models are, as blocks of Markdown."""
    if not found["of"]:
        return []
    rows = (f"| `{row['op']}` | {row['reason']} | {row['modules']} |" for row in found["left_alone"])
    return [
        "## Instances",
        _prose(f"""
            {found["built"]} of {found["of"]} model classes could be built from a small config on the meta
            device. The others need a config that its defaults do not give. Models of
            {found["families_with_torch_layer_norm"]} families hold `torch.nn.LayerNorm`, which is recognised
            as well and gets the kernel of `layer_norm` on a GPU. The totals above count only classes that
            families define.
        """),
        "These modules are left alone although their class is recognised:",
        _table("| op | reason | modules |", rows),
    ]


def _prose(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 110, break_long_words=False, break_on_hyphens=False)


def _table(head: str, rows: Iterable[str]) -> str:
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *rows])


def _versions(found: dict) -> list:
    """The totals of the versions of transformers that were looked at, as blocks of Markdown."""
    others = json.loads(VERSIONS.read_text()) if VERSIONS.is_file() else {}
    others[found["transformers"]] = {"modules": found["modules"], "totals": found["totals"]}
    rows = []
    for version in sorted(others, key=lambda text: [int(part) for part in text.split(".")]):
        one = others[version]
        counts = (str(one["totals"].get(op, {}).get("families", "–")) for op in OPS)
        rows.append(f"| {version} | {one['modules']} | " + " | ".join(counts) + " |")
    return [
        "## Other versions of transformers",
        _prose("""
            The table counts families by op. Before 5.0 experts are lists of layers, which is no op.
            Before 5.18 their one-hot has no room for a slot without expert (variants `unpadded`). A version
            that was looked at before there was an op has – for it.
        """),
        _table("| transformers | modules | " + " | ".join(f"`{op}`" for op in OPS) + " |", rows),
    ]


def _kind(reason: str) -> str:
    import re

    return re.sub(r"^[\w.]+ (is a|cannot)", r"… \1", reason)[:100]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", metavar="FILE", help=f"the page as Markdown, and its data as {DATA.name}")
    parser.add_argument("--json", metavar="FILE", help="every single recognition as JSON")
    parser.add_argument("--totals", action="store_true", help=f"put the totals into {VERSIONS.name}")
    parser.add_argument(
        "--from", dest="given", metavar="FILE", help=f"look at nothing: {DATA.name}, or --json's"
    )
    parser.add_argument("--no-build", action="store_true", help="build no models")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4))
    options = parser.parse_args()
    data = (
        json.loads(Path(options.given).read_text())
        if options.given
        else run(options.jobs, not options.no_build)
    )
    found = data if "families" in data else summary(data)
    if options.totals:
        known = json.loads(VERSIONS.read_text()) if VERSIONS.is_file() else {}
        known[found["transformers"]] = {"modules": found["modules"], "totals": found["totals"]}
        VERSIONS.write_text(json.dumps(known, indent=1) + "\n")
    if options.json:
        Path(options.json).write_text(json.dumps(data, indent=1) + "\n")
    if options.write:
        Path(options.write).write_text(page(found))
        if data is not found:
            DATA.write_text(dump(found))
    print(json.dumps({**found["totals"], "wrong": len(found["wrong"])}))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
