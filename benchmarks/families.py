"""Tiny models of every causal language family, with the embedded kernels and without: loss and gradients.

    python benchmarks/families.py                                    on this machine's device
    TRITON_INTERPRET=1 python benchmarks/families.py --device cpu --length 4 --distinct
                                                                     triton's kernels, in its interpreter
    python benchmarks/families.py --json results.json --write docs/coverage.md
    python benchmarks/families.py --classes LlamaForCausalLM Gemma3ForCausalLM

Each class is built from a small configuration (`tiny_models.py`); the same weights and tokens run once
plainly and once with ``kernels = "auto"``, for which these small inputs are large ones on a CPU. In float32
loss and every gradient must agree within `TOLERANCE`; where they do not, and in half precision always, both
are compared with the plain model in the next finer dtype, and the kernels may be off by twice what the
original itself is.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import tiny_models

TOLERANCE = 1e-5
SECONDS = 60
HEADING = "## Whole models"
_FINER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}

Gradients = dict[str, torch.Tensor]


class NotRun(Exception):
    """A model that this comparison cannot be made with, and why."""


class TooLong(BaseException):
    """The time of one class is up; no ``except Exception`` on the way, such as a proof's, may keep it."""


def run(model: Any, given: dict[str, Any]) -> tuple[float, Gradients]:
    """The loss, and the gradient of every parameter that has one."""
    torch.manual_seed(0)
    floating = next(p.dtype for p in model.parameters() if p.is_floating_point())
    given = {
        name: value.to(floating) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in given.items()
    }
    outputs = model(**given)
    if outputs.loss is None:
        raise NotRun("its forward takes labels and gives no loss")
    outputs.loss.backward()
    return outputs.loss.item(), {
        name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None
    }


def distances(ours: Gradients, theirs: Gradients) -> dict[str, float]:
    """By parameter: the norm of the difference over the norm of the gradient.

    A gradient below a thousandth of that of the whole model (the bias of a key, whose exact gradient is
    zero) is measured against that thousandth.
    """
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        return dict.fromkeys(odd, float("inf"))
    floor = 1e-3 * sum(g.square().sum().item() for g in theirs.values()) ** 0.5 or 1.0
    return {name: (ours[name] - g).norm().item() / max(g.norm().item(), floor) for name, g in theirs.items()}


def worst(found: dict[str, float]) -> tuple[str, float]:
    """The parameter whose gradient is off most; NaN is further off than anything."""
    return max(found.items(), key=lambda item: (item[1] != item[1], item[1]))


def compare(
    name: str,
    family: str,
    dtype: torch.dtype,
    device: str,
    length: int,
    seen: dict[frozenset[str], str] | None,
) -> dict[str, Any]:
    """One class with kernels and without.

    Raises:
        NotRun: It gives no finite loss, or a class in ``seen`` has the same kernels.
    """
    from twinkle import report
    from twinkle.apply.layers import kernelize_layers
    from twinkle.ops.plain import at_every_size
    from twinkle.runtime import runtime

    runtime.reset()
    plain = tiny_models.tiny_model(name, family)
    given = {key: value.to(device) for key, value in tiny_models.inputs(plain, length=length).items()}
    plain.to(device, dtype)
    ours = copy.deepcopy(plain)
    exact = copy.deepcopy(plain)
    runtime.options.kernels = "auto"
    try:
        kernelize_layers(ours)
        if seen is not None:
            kernels = frozenset(b["source"] for b in report.snapshot()["bindings"])  # type: ignore[attr-defined]
            if seen.setdefault(kernels, name) != name:
                raise NotRun(f"the same kernels as {seen[kernels]}")
        with at_every_size():
            our_loss, our_gradients = run(ours, given)
        told: Any = report.snapshot()
    finally:
        runtime.reset()
    loss, gradients = run(plain, given)
    if loss != loss or not all(g.isfinite().all() for g in gradients.values()):
        raise NotRun("loss or gradients are not finite without any kernel")
    records = told["bindings"]
    loss_off = abs(our_loss - loss) / max(abs(loss), 1e-30)
    parameter, off = worst(distances(our_gradients, gradients))
    result = {
        "class": name,
        "family": family,
        "ok": loss_off <= TOLERANCE and off <= TOLERANCE,
        "loss_off": loss_off,
        "gradient_off": off,
        "parameter": parameter,
        "gradients": len(gradients),
        "active": sorted({_op(b) for b in records if b["state"] == "active"}),
        "proven": sum(b["proof"].startswith("proven") for b in records),
        "not_active": sorted(
            {f"{_op(b)} {b['state']}: {b['reason']}" for b in records if b["state"] != "active"}
        ),
        "remarks": told["remarks"],
    }
    if not result["ok"]:
        finer_loss, finer = run(exact.to(_FINER[dtype]), given)
        scale = max(abs(finer_loss), 1e-30)
        own_loss, our_error = abs(loss - finer_loss) / scale, abs(our_loss - finer_loss) / scale
        own = worst(distances(gradients, finer))[1]
        _, our_worst = worst(distances(our_gradients, finer))
        result["own_off"], result["our_off"] = own, our_worst
        result["ok"] = our_error <= 2 * own_loss + TOLERANCE and our_worst <= 2 * own + TOLERANCE
    return result


def _op(binding: dict[str, Any]) -> str:
    # A function's kernel is called as the function is.
    return str(binding["source"].split()[1] if binding["kind"] == "function" else binding["kernel"])


def all_of_them(
    names: dict[str, str], dtype: torch.dtype, device: str, length: int, *, distinct: bool, limit: float
) -> dict[str, Any]:
    """Every class, with what was left out and why."""
    from transformers.utils import logging

    logging.set_verbosity(60)
    results, left_out = [], {}
    seen: dict[frozenset[str], str] | None = {} if distinct else None

    def expire(*_: object) -> None:
        raise TooLong(f"more than {SECONDS} s")

    # Time of this process, not of the clock: an import that is cut off on a busy machine cannot be repeated.
    signal.signal(signal.SIGPROF, expire)
    begun = time.monotonic()
    for name, family in names.items():
        started = time.monotonic()
        if started - begun > limit:
            left_out[name] = f"not run within {limit:.0f} s"
            continue
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = compare(name, family, dtype, device, length, seen)
        except (Exception, TooLong) as error:
            left_out[name] = _reason(error)
            continue
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        result["seconds"] = round(time.monotonic() - started, 2)
        results.append(result)
        if not result["ok"]:
            print("DIFFERS", json.dumps(result), flush=True)
    return {"results": results, "left_out": left_out}


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)[:160]
    return text if isinstance(error, NotRun | TooLong) else f"{type(error).__name__}: {text}"


# -- writing --------------------------------------------------------------------------------------


def section(data: dict[str, Any]) -> str:
    """The runs of a results file as Markdown."""
    lines = [
        HEADING,
        "",
        _prose("""
            Tiny models run with `kernels = "auto"` and without, on the same weights and tokens. Compared are
            the loss and the gradient of every parameter.
            `python benchmarks/families.py --write docs/coverage.md` writes this section;
            [families-cpu.json](../benchmarks/results/families-cpu.json) has every class
            with its ops and differences, and why a class is left out.
        """),
        "",
        _prose(f"""
            A difference is the norm of the difference over the norm of the gradient. Where the gradient of a
            parameter is below a thousandth of the whole model's, it is over that thousandth instead. A
            difference may be at most {TOLERANCE:g}, or at most twice the original's own error against the
            next finer dtype.
        """),
        "",
        "| run | classes | with kernels | differ | left out | largest difference: loss, gradient |",
        "|---|---|---|---|---|---|",
    ]
    for label, one in data["runs"].items():
        results = one["results"]
        wrong = [r for r in results if not r["ok"]]
        lines.append(
            f"| {label} | {len(results)} | {sum(bool(r['active']) for r in results)} | {len(wrong)} | "
            f"{len(one['left_out'])} | {max(r['loss_off'] for r in results):.1e}, "
            f"{max(r['gradient_off'] for r in results):.1e} |"
        )
    lines.append("")
    for label, one in data["runs"].items():
        for r in one["results"]:
            if not r["ok"]:
                lines.append(f"- differs, {label}: `{r['class']}`, {r['parameter']}: {r['gradient_off']:.1e}")
            elif "own_off" in r:
                errors = f"the original is off by {r['own_off']:.1e}, with kernels {r['our_off']:.1e}"
                lines.append(
                    f"- {label}, `{r['class']}`, `{r['parameter']}`: {r['gradient_off']:.1e}; against a finer"
                    f" dtype {errors}"
                )
            # Pending is what the model has and this forward does not call: a vision tower, say.
            odd = [line for line in r["not_active"] if " pending: " not in line]
            if odd:
                lines.append(f"- {label}, `{r['class']}`: {'; '.join(odd)}")
    lines += [
        "",
        _prose("""
            A class is left out where the model cannot be built from a small configuration or fed with tokens.
            With `--distinct` it is also left out where another class has the same kernels, and with
            `--seconds` where the time is up.
        """),
    ]
    return "\n".join(lines) + "\n"


def _prose(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 110, break_long_words=False, break_on_hyphens=False)


def put_section(path: Path, text: str, heading: str = HEADING) -> None:
    """Replace the section of that heading in a Markdown file, or add it at the end."""
    old = path.read_text() if path.is_file() else ""
    before, found, after = old.partition(heading + "\n")
    _, more, rest = after.partition("\n## ")
    tail = f"\n## {rest}" if found and more else ""
    path.write_text(f"{before.rstrip()}\n\n{text}{tail}" if old else text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="bfloat16 on a GPU, else float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int, default=32, help="tokens a row; two rows")
    parser.add_argument("--classes", nargs="+", metavar="CLASS")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="leave out what comes later")
    parser.add_argument("--distinct", action="store_true", help="one class for each set of kernels")
    parser.add_argument("--json", metavar="FILE", type=Path, help="put this run into a results file")
    parser.add_argument(
        "--write", metavar="FILE", type=Path, help="the results file as a section of Markdown"
    )
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    names = tiny_models.classes()
    if args.classes:
        names = {name: names[name] for name in args.classes}
    started = time.monotonic()
    one = all_of_them(names, dtype, args.device, args.length, distinct=args.distinct, limit=args.seconds)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    label = f"{args.device} {str(dtype).removeprefix('torch.')}{', triton interpreted' * interpreted}"
    data: dict[str, Any] = {"runs": {}}
    if args.json and args.json.is_file():
        data = json.loads(args.json.read_text())
    import transformers

    data["transformers"], data["torch"] = transformers.__version__, torch.__version__
    earlier = data["runs"].get(label)
    if args.classes and earlier:  # what was asked for takes the place of what was there
        one["results"] += [r for r in earlier["results"] if r["class"] not in names]
        one["left_out"].update({n: why for n, why in earlier["left_out"].items() if n not in names})
    data["runs"][label] = one
    if args.json:
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    if args.write:
        put_section(args.write, section(data))
    results = one["results"]
    wrong = [r["class"] for r in results if not r["ok"]]
    covered = sum(bool(r["active"]) for r in results)
    seconds = time.monotonic() - started
    print(f"{label}: {len(results)} classes ran in {seconds:.0f} s, {covered} with kernels")
    print(f"{len(one['left_out'])} left out; {len(wrong)} differ: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
