"""Which tests of another package's suite pass plainly and fail with Twinkle's kernels forced at small sizes.

    python benchmarks/suites.py peft-0.21.2/tests/test_mixed.py -k lora --json peft.json

The paths are run twice by pytest, plainly and with ``TWINKLE_CONFIG=auto TWINKLE_SIZES=all``, offline, in a
process of its own, every test from the same seeds. A test that fails only with Twinkle is run alone both ways
once more: only one that differs again is a new failure, the others are unsteady. The kernels that ran are
counted from the report. ``TRITON_INTERPRET=1`` runs triton's kernels on a CPU, in both runs. ``--json`` keeps
the suites that the file has already. Ends with status 1 where a test differs, and 2 where a run told nothing:
no outcome, or no kernel that ran.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

_LOG = "SUITES_OUTCOMES"
_FORCED = {"TWINKLE_CONFIG": "auto", "TWINKLE_SIZES": "all", "TWINKLE_CACHE": "off"}
_PACKAGES = ("twinkle-kernel", "torch", "transformers", "peft", "accelerate", "trl", "liger-kernel", "pytest")
_LOST = ("failed", "quarantined", "displaced")
_SLOWER = 5.0  # A test that takes so many seconds and so many times more is named.


def pytest_runtest_setup(item: Any) -> None:
    """As the plugin: a test begins with the same random state in both runs, whatever ran before it."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def pytest_runtest_logreport(report: Any) -> None:
    """As pytest's plugin in the runs: a line for each outcome, kept though a later test ends the process."""
    if os.environ.get(_LOG) and (report.when == "call" or report.outcome != "passed"):
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        line["why"] = str(report.longrepr).strip().splitlines()[-1:] if report.failed else []
        with open(os.environ[_LOG], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def run(root: Path, paths: list[str], options: list[str], limit: float, twinkle: bool) -> dict[str, Any]:
    """Run pytest once.

    Args:
        root: The suite's folder, where pytest runs: a test's name leads on from here.
        paths: Files, folders and single tests.
        options: More of pytest's own.
        limit: Seconds after which the run is ended; the outcomes so far count.
        twinkle: Whether the run has Twinkle, with its kernels forced.

    Returns:
        The ``outcomes`` by test, pytest's exit status (None after the limit), the seconds and the
        ``bindings`` of Twinkle's report.
    """
    here = str(Path(__file__).resolve().parent)
    with tempfile.TemporaryDirectory() as folder:
        log, report = Path(folder, "outcomes.jsonl"), Path(folder, "report.json")
        log.touch()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_")}
        search = os.pathsep.join(filter(None, (here, kept.get("PYTHONPATH"))))
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        env = {**kept, **offline, "PYTHONPATH": search, _LOG: str(log)}
        env |= {**_FORCED, "TWINKLE_REPORT": str(report)} if twinkle else {}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "suites",
            "-p",
            "no:cacheprovider",
            "-q",
            "--tb=line",
        ]
        command += ["-o", "addopts=", *options, *paths]
        start = time.monotonic()
        with Path(folder, "output").open("wb+") as output:
            process = subprocess.Popen(command, cwd=root, env=env, stdout=output, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None and time.monotonic() - start < limit:
                    time.sleep(0.5)
                    if sys.stderr.isatty():
                        count = log.read_bytes().count(b"\n")
                        print(
                            f"\r{'Twinkle' if twinkle else 'plain'}: {count} tests", end="", file=sys.stderr
                        )
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                    ended = None
                else:
                    ended = process.returncode
            seconds = time.monotonic() - start
            output.seek(0)
            told = output.read().decode(errors="replace").splitlines()[-15:]
        bindings = json.loads(report.read_text(encoding="utf-8"))["bindings"] if report.is_file() else []
        outcomes: dict[str, dict[str, Any]] = {}
        for line in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
            if outcomes.get(line["test"], {}).get("outcome") != "failed":
                outcomes[line["test"]] = line
    if not outcomes:
        print(*told, sep="\n", file=sys.stderr)
    return {"outcomes": outcomes, "status": ended, "seconds": round(seconds, 1), "bindings": bindings}


def kernels(bindings: list[dict[str, Any]]) -> dict[str, Any]:
    """What came of the kernels: bindings in place and those that ran, by op, and why others were given up."""

    def count(some: Iterable[dict[str, Any]]) -> dict[str, int]:
        ops = Counter(one["source"].removeprefix("embedded ").split(" ")[0].rstrip(",") for one in some)
        return dict(sorted(ops.items()))

    lost = {
        f"{one['target']} ({one['kernel']}): {one['reason']}" for one in bindings if one["state"] in _LOST
    }
    return {
        "in place": count(one for one in bindings if one["most_instances"]),
        "active": count(one for one in bindings if one["state"] == "active"),
        "given up": sorted(lost),
    }


def root_of(path: Path) -> Path:
    """The folder that pytest takes for the root of a suite."""
    for folder in path.resolve().parents:
        if any((folder / name).is_file() for name in ("pytest.ini", "pyproject.toml", "setup.cfg")):
            return folder
    return path.resolve().parent


def compare(plain: dict[str, Any], forced: dict[str, Any]) -> dict[str, Any]:
    """The difference of two runs: failures only with Twinkle, only without, and slow tests."""
    before, after = plain["outcomes"], forced["outcomes"]
    both = [test for test in before if test in after]

    def only(first: dict[str, Any], second: dict[str, Any]) -> dict[str, str]:
        return {
            test: "".join(second[test]["why"])
            for test in both
            if first[test]["outcome"] == "passed" and second[test]["outcome"] == "failed"
        }

    def count(run: dict[str, Any]) -> dict[str, Any]:
        kinds = [line["outcome"] for line in run["outcomes"].values()]
        totals = {kind: kinds.count(kind) for kind in ("passed", "failed", "skipped")}
        return {**totals, "status": run["status"], "seconds": run["seconds"]}

    slower = {
        test: [before[test]["seconds"], after[test]["seconds"]]
        for test in both
        if after[test]["seconds"] > _SLOWER + _SLOWER * before[test]["seconds"]
    }
    return {
        "plain": count(plain),
        "twinkle": count(forced),
        "new failures": only(before, after),
        "failures gone": only(after, before),
        "slower": slower,
        "kernels": kernels(forced["bindings"]),
        "not run by both": len({*before} ^ {*after}),
    }


def main() -> int:
    """Read the command line, run every path both ways and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="files or folders with tests")
    parser.add_argument("--deselect", action="append", default=[], help="a test to leave out")
    parser.add_argument("-k", dest="only", help="pytest's -k")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one run (default 3600)")
    parser.add_argument("--json", type=Path, help="write the result to this file; its other suites stay")
    asked = parser.parse_args()
    options = [part for test in asked.deselect for part in ("--deselect", test)]
    options += ["-k", asked.only] if asked.only else []
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "suites": {},
    }
    if asked.json and asked.json.is_file():
        result["suites"] = json.loads(asked.json.read_text(encoding="utf-8"))["suites"]
    good, told = True, True
    try:
        for root in dict.fromkeys(map(root_of, asked.paths)):
            paths = [str(path.resolve()) for path in asked.paths if root_of(path) == root]
            runs = [run(root, paths, options, asked.limit, twinkle) for twinkle in (False, True)]
            difference = compare(*runs)
            if found := [*difference["new failures"]]:
                again = [run(root, found, [], asked.limit, twinkle) for twinkle in (False, True)]
                sure = compare(*again)["new failures"]
                difference["unsteady"] = [test for test in found if test not in sure]
                difference["new failures"] = sure
            name = f"{root.name} -k '{asked.only}'" if asked.only else root.name
            name += ", triton interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else ""
            result["suites"][name] = {"paths": [os.path.relpath(path, root) for path in paths], **difference}
            good &= not difference["new failures"] and not difference["slower"]
            told &= all(one["outcomes"] and one["status"] in (0, 1) for one in runs)
            told &= bool(difference["kernels"]["active"])
            print(f"{name}: plain {difference['plain']}, Twinkle {difference['twinkle']}")
            for test, why in difference["new failures"].items():
                print(f"  only fails with Twinkle: {test}: {why}")
            print(f"  kernels that ran: {difference['kernels']['active'] or 'none'}")
            for reason in difference["kernels"]["given up"]:
                print(f"  given up: {reason}")
            for test, (before, after) in difference["slower"].items():
                print(f"  slower: {test}: {before} s, {after} s")
            if asked.json:
                asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0 if good and told else 1 if not good else 2


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
