"""``twinkle verify``: prove the embedded kernels on this machine, all of them, now."""

from __future__ import annotations

import argparse
import math
import sys
import time

from twinkle.errors import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    import torch

    from twinkle.proof.verify import Part, Row

__all__ = ["main"]

_EPILOG = """\
Each kernel is compared with its definition in plain torch on fresh random inputs of several shapes: whole
blocks, one row, ragged and wide rows, rows with gaps between them. Both are measured against the definition
in the next finer dtype. A kernel passes when it is off by no more than twice what the definition itself is
off in that dtype, and a little; errors are norms relative to that of the result.

  variant         the rounding or layout, as `twinkle match` names it
  error        of the kernel, and in parentheses of the definition: forward, then gradients
  shape        the worst of them; every rejected one has a line of its own

examples:
  twinkle verify                                  everything, on every device of this machine
  twinkle verify --op rms_norm --dtype bfloat16   one op in one dtype
  twinkle verify --device cuda:0 --json > proofs.json
  TRITON_INTERPRET=1 twinkle verify --device cpu  triton's kernels without a GPU (slow)
  twinkle verify --clear                          forget what was proven at first calls

The verdicts are kept in the file that first calls look in (TWINKLE_CACHE names its directory, `off` does
without; default ~/.cache/twinkle). A first call that finds its kernel, shape and dtype there is not
compared again, and the report says `proven (cached, date)`. They are kept variant by variant, so that Ctrl-C
loses none; the table then has what was compared so far. Where triton compiles, all of it takes minutes:
how far it is goes to standard error.

The exit code is 0 when all kernels are right, 1 when one was rejected, 2 when the command line is wrong,
130 after Ctrl-C.
"""


def main(words: Sequence[str]) -> int:
    """Prove the kernels and print a table."""
    parser = _parser()
    options = parser.parse_args(words)
    if options.clear:
        return _clear()

    # Torch is imported only now: `--help` should not wait for it.
    from twinkle.ops.cases import sampled_ops
    from twinkle.proof import verify

    ops, here = sampled_ops(), verify.devices()
    unknown = [op for op in options.op or () if op not in ops]
    if unknown:
        parser.error(f"--op {unknown[0]}: there are {', '.join(ops)}")
    absent = [w for w in options.device or () if all(w not in (str(d), d.type) for d in here)]
    if absent:
        parser.error(f"--device {absent[0]}: this machine has {', '.join(map(str, here))}")
    chosen = [d for d in here if not options.device or {str(d), d.type} & set(options.device)]
    seed = options.seed if options.seed is not None else time.time_ns() % 2**31
    dtypes = options.dtype or list(verify.DTYPES)
    started = time.perf_counter()
    rows, interrupted = _compare(chosen, options.op or ops, dtypes, seed)
    left_out = {
        f"{dtype} on {device}: {why}"
        for device in chosen
        for dtype in dtypes
        if (why := verify.skipped(device, dtype))
    }
    rejected = [row for row in rows if not row.verdict.ok]
    if options.json:
        _print_json(rows, seed, sorted(left_out), interrupted)
    else:
        _print_table(rows if options.all else _worst(rows))
        for text in sorted(left_out):
            print(f"left out: {text}")
        took = f"{time.perf_counter() - started:.0f} s" + (", interrupted" if interrupted else "")
        print(f"{len(rows) - len(rejected)} of {len(rows)} comparisons proven, seed {seed}, {took}")
        if not rows and not interrupted:
            print("there is no kernel for the devices asked for: what is there stays the original")
    sys.stdout.flush()  # what is printed is to be there also if the end of the interpreter is interrupted
    if interrupted:
        return 130
    return 1 if rejected else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="twinkle verify",
        description="Prove the embedded kernels right on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", action="append", metavar="OP", help="only this op (may be repeated)")
    parser.add_argument("--device", action="append", metavar="DEVICE", help="only cpu, cuda, or cuda:1, say")
    parser.add_argument(
        "--dtype", action="append", choices=("float32", "bfloat16", "float16"), help="only this dtype"
    )
    parser.add_argument("--seed", type=int, help="of the random inputs; by default another one each time")
    parser.add_argument("--all", action="store_true", help="a line for every shape")
    parser.add_argument("--json", action="store_true", help="every comparison as JSON")
    parser.add_argument("--clear", action="store_true", help="forget the verdicts that were kept, and stop")
    return parser


def _compare(
    devices: Sequence[torch.device], ops: Sequence[str], dtypes: Sequence[str], seed: int
) -> tuple[list[Row], bool]:
    """The comparisons of all parts, or of those before Ctrl-C, and whether that came."""
    from twinkle.proof import verify

    rows: list[Row] = []
    progress = _Progress()
    try:
        parts = verify.parts(devices, ops=ops, dtypes=dtypes)
        for number, part in enumerate(parts):
            progress.show(part, number, len(parts))
            rows.extend(verify.rerun(part, seed=seed))
    except KeyboardInterrupt:
        return rows, True
    finally:
        progress.clear()
    return rows, False


def _clear() -> int:
    from twinkle.proof.cache import proofs

    kept = proofs()
    if kept.path is None:
        print("no verdicts are kept: TWINKLE_CACHE is off")
        return 0
    print(f"{kept.clear()} verdicts forgotten: {kept.path}")
    return 0


class _Progress:
    """On standard error: one line that changes, or where that is no terminal a line an op."""

    def __init__(self) -> None:
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._started = time.perf_counter()
        self._said: tuple[str, ...] = ()

    def show(self, part: Part, number: int, total: int) -> None:
        """Say what is compared next, ``number`` of ``total`` parts being done."""
        about = (str(part.device), part.op)
        text = f"{number}/{total}  {time.perf_counter() - self._started:.0f} s  {'  '.join(about)}"
        if self._terminal:
            text += f"  {part.variant.name}  {part.dtype}"
            say("", end=f"\r{text[:78]:<78}")
        elif about != self._said:
            say(text)
        self._said = about

    def clear(self) -> None:
        if self._terminal:
            say("", end=f"\r{'':<78}\r")


def _worst(rows: list[Row]) -> list[Row]:
    """Of all shapes of a variant in a dtype the worst, and every rejected one."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.device, row.op, row.variant, row.dtype), []).append(row)
    found = []
    for group in groups.values():
        rejected = [row for row in group if not row.verdict.ok]
        found += rejected or [max(group, key=_badness)]
    return found


def _badness(row: Row) -> float:
    """By how much the kernel is further off than the definition."""
    error, own, gradient, own_gradient = row.verdict.errors
    return max(x for x in (error - own, gradient - own_gradient, -math.inf) if not math.isnan(x))


def _print_table(rows: list[Row]) -> None:
    headers = ("device", "op", "variant", "by", "dtype", "shape", "error", "gradients", "")
    cells = [
        (
            row.device,
            row.op,
            row.variant,
            row.how,
            row.dtype,
            row.shape,
            _pair(*row.verdict.errors[:2]),
            _pair(*row.verdict.errors[2:]),
            "proven" if row.verdict.ok else f"REJECTED: {row.verdict.text}",
        )
        for row in rows
    ]
    if not cells:
        return
    widths = [max(len(line[i]) for line in (headers, *cells)) for i in range(len(headers) - 1)]
    for line in (headers, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, (*widths, 0), strict=True)).rstrip())


def _pair(error: float, own: float) -> str:
    return "-" if math.isnan(error) else f"{error:.1e} ({own:.1e})"


def _print_json(rows: list[Row], seed: int, left_out: list[str], interrupted: bool) -> None:
    import json

    import torch

    from twinkle._version import __version__
    from twinkle.proof.cache_key import device_name

    document: dict[str, Any] = {
        "twinkle": __version__,
        "torch": str(torch.__version__),
        "devices": {name: device_name(torch.device(name)) for name in {row.device for row in rows}},
        "seed": seed,
        "left_out": left_out,
        "interrupted": interrupted,
        "comparisons": [
            {
                "device": row.device,
                "op": row.op,
                "variant": row.variant,
                "by": row.how,
                "dtype": row.dtype,
                "shape": row.shape,
                "ok": row.verdict.ok,
                "text": row.verdict.text,
                **{
                    name: None if math.isnan(number) else number
                    for name, number in zip(
                        ("error", "own_error", "gradient_error", "own_gradient_error"),
                        row.verdict.errors,
                        strict=True,
                    )
                },
            }
            for row in rows
        ],
    }
    print(json.dumps(document, indent=1))
