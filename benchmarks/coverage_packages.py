"""What is recognised in packages of models that are not transformers, and in the corpus of spellings.

    python benchmarks/coverage_packages.py [--json benchmarks/results/coverage-packages.json]

It imports every module of diffusers' and timm's models and layers, x-transformers and torchtune's modules, as
far as they are installed, and surveys them. What is one op as a whole is tried as coverage.py tries it: code
and reference on the same random inputs in float32 and bfloat16, equal bit for bit. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import pkgutil
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    str(ROOT),
    str(TESTS / "corpus"),
    str(TESTS / "support"),
]

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = {
    "diffusers": ("diffusers.models",),
    "timm": ("timm.layers", "timm.models"),
    "x-transformers": ("x_transformers",),
    "torchtune": ("torchtune.modules", "torchtune.models"),
}
CORPORA = (
    "norms",
    "euclidean_norms",
    "layer_norms",
    "functions",
    "rotations",
    "rotations_by_pairs",
    "rotations_by_products",
    "rotations_by_einops",
    "gated_mlps",
    "adaptive_norms",
)
INSIDE = ("residual_norm", "qk_norm_rotary", "modulated_norm", "causal_lm_loss")


def modules(roots: tuple[str, ...]) -> Iterator[str]:
    """The names of a package's modules; those that cannot be imported are among them."""
    for root in roots:
        yield root
        try:
            found = importlib.util.find_spec(root)
        except Exception:  # the survey says of the root why
            continue
        places = found.submodule_search_locations if found else None
        for one in pkgutil.walk_packages(places or [], f"{root}.", onerror=lambda name: None):
            yield one.name


def survey(roots: tuple[str, ...]) -> dict[str, Any]:
    """The recognitions in the modules of a package, by op, and the trials of them."""
    import torch
    from trial import trial

    from twinkle.fuse.survey import survey_module

    ops: dict[str, list[str]] = collections.defaultdict(list)
    wrong: list[str] = []
    not_run: list[str] = []
    tried = looked_at = 0
    refused: dict[str, str] = {}
    for name in dict.fromkeys(modules(roots)):
        try:
            found = survey_module(name)
        except BaseException as error:  # what a module does when it is imported is its own
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            continue
        looked_at += len(found)
        for one in filter(None, found):
            ops[str(one.op)].append(one.target)
            if one.op in INSIDE or "wired" in one.facts:
                continue
            module, _, path = one.target.partition(":")
            thing: Any = sys.modules[module]
            try:
                for part in path.split("."):
                    thing = getattr(thing, part)
            except AttributeError:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                outcome = trial(thing, one, dtype)
                line = f"{one.target} ({one.variant.name}, {dtype}): {outcome.found}"
                if not outcome.equal and re.match(r"\w+(Error|Exception)\b|nobody|no shapes", outcome.found):
                    not_run.append(line)  # the stand-in inputs are not what the code takes
                    continue
                tried += 1
                if not outcome.equal:
                    wrong.append(line)
    return {
        "classes_and_functions": looked_at,
        "recognised": {op: sorted(set(ops[op])) for op in sorted(ops)},
        "tried": tried,
        "not_equal": wrong,
        "not_run": not_run,
        "not_imported": refused,
    }


def corpus() -> dict[str, int]:
    """How many spellings of each op the corpus has (``tests/corpus``)."""
    found: dict[str, int] = collections.Counter()
    for name in CORPORA:
        for one in importlib.import_module(name).CORPORA:
            found.update(spelling.op for spelling in one.spellings.values())
    return dict(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--packages", nargs="*", default=list(PACKAGES))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"date": str(datetime.date.today()), "corpus": corpus(), "packages": {}}
    print("corpus:", ", ".join(f"{op} {count}" for op, count in results["corpus"].items()), flush=True)
    for name in options.packages:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name}: not installed", flush=True)
            continue
        found = survey(PACKAGES[name])
        results["packages"][name] = {"version": version, **found}
        counts = ", ".join(f"{op} {len(targets)}" for op, targets in found["recognised"].items())
        print(
            f"{name} {version}: {counts or 'nothing'}; {found['tried']} trials, "
            f"{len(found['not_equal'])} not equal, "
            f"{len(found['not_run'])} not run; {len(found['not_imported'])} modules cannot be imported here",
            flush=True,
        )
        for line in (*found["not_equal"], *found["not_run"]):
            print("   ", line, flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
