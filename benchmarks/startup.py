"""What Twinkle costs an interpreter: idle, active before the first target, and for each import.

    python benchmarks/startup.py [--runs 60] [--json FILE]

Every figure is a median over fresh interpreters, the compared ones started in turn, so that a machine
that gets slower meanwhile slows all of them. The environments hold Python and Twinkle and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CONFIG = """\
[twinkle]
mode = "auto"

[layers.MLP]
target = "transformers.models.*.modeling_*:*MLP"
repo_path = "kernels"
package_name = "my_kernels"

[layers.RMSNorm]
target = ["transformers.models.qwen3.modeling_qwen3:Qwen3RMSNorm"]
repo_path = "kernels"
package_name = "my_kernels"

[functions.apply_rotary_pos_emb]
target_module = "transformers.models.qwen3.modeling_qwen3"
func_impl = "my_kernels.rope:apply_rotary_pos_emb"
"""

# Names that are no targets, as a program imports them; some share their first part with a target.
PER_IMPORT = """
import sys, time
from twinkle.hooks import imports

before = set(map(id, sys.meta_path))
imports.install()
targets = [f"transformers.models.family{number}.modeling_family{number}" for number in range(100)]
targets += [f"package{number}.models.*.modeling_*" for number in range(20)]
for target in targets:
    imports.watch_module(target, print, owner="benchmark")
finder = next(finder for finder in sys.meta_path if id(finder) not in before)
heads = ("numpy", "torch._dynamo", "a", "json")
names = [f"{head}.part{number}.inner" for number in range(500) for head in heads]
names += [f"transformers.models.other{number}.configuration_other" for number in range(200)]

def nothing(name, path, target=None):
    return None

def measure(function):
    best = []
    for _ in range(15):
        start = time.perf_counter()
        for name in names:
            function(name, None, None)
        best.append((time.perf_counter() - start) / len(names))
    return sorted(best)[len(best) // 2] * 1e6

measure(finder.find_spec)
print(measure(finder.find_spec) - measure(nothing))
"""


def environment(folder: Path, *, door: bool) -> str:
    """A virtual environment like a wheel's installation, or bare; returns its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    site_packages = folder / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    if door:
        (site_packages / "twinkle").symlink_to(ROOT / "twinkle")
        for name in ("twinkle.pth", "twinkle.start"):
            (site_packages / name).write_text((ROOT / name).read_text())
    return str(folder / "bin/python")


def run(command: list[str], environ: dict[str, str]) -> tuple[float, float]:
    """Milliseconds that a command takes from start to exit, and milliseconds of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(command, env=environ, check=True, capture_output=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall * 1e3, (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e3


def modules(python: str, environ: dict[str, str]) -> set[str]:
    """The modules that an interpreter has imported when the program begins."""
    command = [python, "-c", "import sys; print(*sys.modules)"]
    done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
    if done.stderr:  # Twinkle is not active: the figures would be those of something else
        sys.exit(done.stderr)
    return set(done.stdout.split())


def measure(runs: int) -> dict[str, object]:
    """All figures, in the units of their names."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bare = environment(folder / "bare", door=False)
        ours = environment(folder / "ours", door=True)
        (folder / "twinkle.toml").write_text(CONFIG)
        (folder / "program.py").write_text("")
        plain = {key: value for key, value in os.environ.items() if not key.startswith(("TWINKLE", "PYTHON"))}
        auto = plain | {"TWINKLE_CONFIG": "auto"}
        file = plain | {"TWINKLE_CONFIG": str(folder / "twinkle.toml")}
        program = str(folder / "program.py")
        cases = {
            "bare": ([bare, program], plain),
            "idle": ([ours, program], plain),
            "active, no file": ([ours, program], auto),
            "active, a file": ([ours, program], file),
            "twinkle run": ([ours, "-m", "twinkle", "run", program], plain),
        }
        base = modules(bare, plain)
        counted = {
            "idle": sorted(modules(ours, plain) - base),
            "active, no file": sorted(modules(ours, auto) - base),
            "active, a file": sorted(modules(ours, file) - base),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for command, environ in cases.values():  # compiles what will be imported
            run(command, environ)
        for _ in range(runs):
            for name, (command, environ) in cases.items():
                times[name].append(run(command, environ))
        output = subprocess.run(
            [ours, "-c", PER_IMPORT], env=plain, check=True, capture_output=True, text=True
        )
    extra = {name: differences(times["bare"], times[name]) for name in cases if name != "bare"}
    return {
        "python": platform.python_version(),
        "runs": runs,
        "bare_ms": statistics.median(wall for wall, _ in times["bare"]),
        "extra_ms": {name: wall for name, (wall, _) in extra.items()},
        "extra_processor_ms": {name: processor for name, (_, processor) in extra.items()},
        "extra_modules": counted,
        "per_import_us": float(output.stdout),
    }


def differences(bare: list[tuple[float, float]], ours: list[tuple[float, float]]) -> tuple[float, float]:
    """Medians over pairs of neighbouring runs: what slows the machine for a while falls out."""
    pairs = list(zip(bare, ours, strict=True))
    wall, processor = (statistics.median(b[part] - a[part] for a, b in pairs) for part in (0, 1))
    return wall, processor


def table(figures: dict[str, object]) -> str:
    """The figures beside their limits; processor time is the one to trust on a machine at work."""
    wall, processor, counted = (figures[key] for key in ("extra_ms", "extra_processor_ms", "extra_modules"))
    labels = {
        "idle": ("idle", "0.5 ms"),
        "active, no file": ("active, no file", "20 ms"),
        "active, a file": ("active, a file of three bindings", "20 ms"),
        "twinkle run": ("twinkle run", ""),
    }
    rows = [
        (label, f"{wall[name]:+.2f} ms", f"{processor[name]:+.2f} ms", limit)
        for name, (label, limit) in labels.items()
    ]
    rows.append(("modules imported, idle", f"{len(counted['idle'])}", "", "0"))
    rows.append(("modules imported, active", f"{len(counted['active, a file'])}", "", ""))
    rows.append(("an import, 100 targets, 20 patterns", f"{figures['per_import_us']:.2f} us", "", "2 us"))
    head = f"over python {figures['python']}, {figures['bare_ms']:.1f} ms; medians of {figures['runs']} runs"
    lines = [head, f"  {'':<38}{'wall':>10}{'processor':>13}  limit"]
    lines += [f"  {name:<38}{first:>10}{second:>13}  {limit}".rstrip() for name, first, second, limit in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what Twinkle costs an interpreter.")
    parser.add_argument("--runs", type=int, default=60, help="interpreters started for each figure")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    figures = measure(options.runs)
    print(table(figures))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
