"""Which tests of another package's suite pass plainly and fail with Twinkle's kernels forced at small sizes.

    python benchmarks/suites.py peft-0.21.2/tests/test_mixed.py -k lora --json peft.json

Each path is run twice by pytest, plainly and with ``TWINKLE_CONFIG=auto TWINKLE_SIZES=all``, offline, in a
process of its own. Ends with status 1 where a test differs, and 2 where a run told nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_LOG = "SUITES_OUTCOMES"
_FORCED = {"TWINKLE_CONFIG": "auto", "TWINKLE_SIZES": "all"}
_PACKAGES = ("twinkle", "torch", "transformers", "peft", "accelerate", "trl", "liger-kernel", "pytest")
_SLOWER = 5.0  # A test that takes so many seconds and so many times more is named.


def pytest_runtest_logreport(report: Any) -> None:
    """As pytest's plugin in the runs: a line for each outcome, kept though a later test ends the process."""
    if os.environ.get(_LOG) and (report.when == "call" or report.outcome != "passed"):
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        line["why"] = str(report.longrepr).strip().splitlines()[-1:] if report.failed else []
        with open(os.environ[_LOG], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def run(paths: list[Path], options: list[str], limit: float, twinkle: dict[str, str]) -> dict[str, Any]:
    """Run pytest once.

    Args:
        paths: Files and folders with tests.
        options: More of pytest's own.
        limit: Seconds after which the run is ended; the outcomes so far count.
        twinkle: Twinkle's variables; none for a plain run.

    Returns:
        The ``outcomes`` by test, pytest's exit status (None after the limit) and the seconds.
    """
    here = str(Path(__file__).resolve().parent)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "outcomes.jsonl")
        log.touch()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_")}
        search = os.pathsep.join(filter(None, (here, kept.get("PYTHONPATH"))))
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        env = {**kept, **offline, **twinkle, "PYTHONPATH": search, _LOG: str(log)}
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
        command += ["-o", "addopts=", *options, *map(str, paths)]
        start = time.monotonic()
        with Path(folder, "output").open("wb+") as output:
            process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None and time.monotonic() - start < limit:
                    time.sleep(0.5)
                    count = log.read_bytes().count(b"\n")
                    print(f"\r{'Twinkle' if twinkle else 'plain'}: {count} tests", end="", file=sys.stderr)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                    ended = None
                else:
                    ended = process.returncode
            print(file=sys.stderr)
            seconds = time.monotonic() - start
            output.seek(0)
            told = output.read().decode(errors="replace").splitlines()[-15:]
        outcomes: dict[str, dict[str, Any]] = {}
        for line in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
            if outcomes.get(line["test"], {}).get("outcome") != "failed":
                outcomes[line["test"]] = line
    if not outcomes:
        print(*told, sep="\n", file=sys.stderr)
    return {"outcomes": outcomes, "status": ended, "seconds": round(seconds, 1)}


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
        "not run by both": len({*before} ^ {*after}),
    }


def main() -> int:
    """Read the command line, run every path both ways and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="files or folders with tests")
    parser.add_argument("--deselect", action="append", default=[], help="a test to leave out")
    parser.add_argument("-k", dest="only", help="pytest's -k")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one run (default 3600)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    asked = parser.parse_args()
    options = [part for test in asked.deselect for part in ("--deselect", test)]
    options += ["-k", asked.only] if asked.only else []
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "suites": {},
    }
    good, told = True, True
    try:
        for path in asked.paths:
            print(path, file=sys.stderr)
            runs = [run([path], options, asked.limit, variables) for variables in ({}, _FORCED)]
            difference = compare(*runs)
            name = "/".join(path.resolve().parts[-3:])
            result["suites"][name] = {**difference, "only": asked.only}
            good &= not difference["new failures"] and not difference["slower"]
            told &= all(one["outcomes"] for one in runs)
            told &= all(one["status"] in (0, 1) for one in runs)
            print(f"{name}: plain {difference['plain']}, Twinkle {difference['twinkle']}")
            for test, why in difference["new failures"].items():
                print(f"  only fails with Twinkle: {test}: {why}")
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
