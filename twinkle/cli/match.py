"""``twinkle match``: what is recognised in a module, as which variant, and why not more."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from twinkle.errors import ConfigError, say

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from twinkle.match.recognition import Recognition

__all__ = ["main"]

_EPILOG = """\
examples:
  twinkle match transformers.models.qwen3                   the modeling modules of a package
  twinkle match my_package.model:MyModel                    a class, and the layers it builds
  twinkle match path/to/model.py                            a file of your own
  twinkle match --all --json > coverage.json                every modeling module of transformers
"""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help="a package, a module, module:Class or a .py file"
    )
    parser.add_argument(
        "--all", action="store_true", help="every modeling module of the installed transformers"
    )
    parser.add_argument("--json", action="store_true", help="a list of target, op, variant and facts")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes for --all (the number of CPUs, 4 at most)"
    )


def main(words: Sequence[str]) -> int:
    """Print what is recognised.

    Args:
        words: The words behind ``twinkle match``.

    Returns:
        The exit code: 0, or 1 when nothing was recognised.

    Raises:
        ConfigError: A target that is none, or cannot be imported.
    """
    parser = argparse.ArgumentParser(
        prog="twinkle match",
        description="Print what is recognised in a module, as which variant, and near misses.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _arguments(parser)
    options = parser.parse_args(list(words))
    if bool(options.targets) == options.all:
        parser.error("name a target, or --all")
    with contextlib.redirect_stdout(sys.stderr):  # transformers 4.57 prints where it is imported
        if options.all:
            rows = _all(options.jobs or min(os.cpu_count() or 1, 4), near=not options.json)
        else:
            rows = [_row(found, near=True) for text in options.targets for found in _recognitions(text)]
    recognised = [row for row in rows if row["op"] is not None]
    if options.json:
        keys = ("target", "op", "variant", "facts")
        json.dump([{key: row[key] for key in keys} for row in recognised], sys.stdout, indent=1)
        print()
    else:
        print(_text(rows))
    return 0 if recognised else 1


# -- targets --------------------------------------------------------------------------------------


def _recognitions(text: str) -> Iterator[Recognition]:
    from twinkle.fuse.survey import recognise_all, survey_module
    from twinkle.match.survey import reachable

    sys.path.insert(0, os.getcwd())
    try:
        module, _, name = text.partition(":")
        if name:
            for found in reachable(_named(module, name, text)):
                yield from recognise_all(found)
            return
        for found_module in _modules(text):
            _import(found_module, text)
            yield from survey_module(found_module)
    finally:
        sys.path.remove(os.getcwd())


def _named(module: str, name: str, text: str) -> Any:
    # A package need not export the layers of its modeling modules.
    for place in dict.fromkeys((module, *_modules(module))):
        value = _import(place, text)
        for part in name.split("."):
            value = getattr(value, part, None)
        if value is not None:
            return value
    raise ConfigError("no such class", where="twinkle match", found=text, expected=f"{name} in {module}")


def _modules(text: str) -> list[str]:
    from twinkle.match.survey import is_modeling

    if text.endswith(".py"):
        return [_load_file(text)]
    module = _import(text, text)
    paths = getattr(module, "__path__", None)
    if paths is None:
        return [text]
    files = sorted({name for path in paths if os.path.isdir(path) for name in os.listdir(path)})
    modeling = [f"{text}.{name[:-3]}" for name in files if is_modeling(name)]
    return modeling or [text]


def _load_file(path: str) -> str:
    name = os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise ConfigError("no such file", where="twinkle match", found=path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return name


def _import(name: str, text: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name} cannot be imported",
            where="twinkle match",
            found=f"{text}: {error}",
            expected="a package, a module, module:Class or a .py file",
        ) from error


# -- every modeling module ------------------------------------------------------------------------


def _all(jobs: int, *, near: bool) -> list[dict[str, Any]]:
    from multiprocessing import get_context

    from twinkle.match.survey import modeling_modules

    names = modeling_modules()
    if not names:
        raise ConfigError("transformers is not installed", fix="pip install transformers")
    # Forked after these imports, the workers need not repeat them.
    importlib.import_module("torch")
    importlib.import_module("transformers.modeling_utils")
    # One module a task, and the large ones spread: the shares are even without planning.
    tasks = [(name, near) for name in names]
    rows: list[dict[str, Any]] = []
    with get_context("fork" if sys.platform == "linux" else "spawn").Pool(jobs) as pool:
        for done, (name, found, error) in enumerate(pool.imap(_survey, tasks, chunksize=4), 1):
            rows += found
            if error:
                say(f"twinkle match: {name} cannot be imported: {error}")
            if done % 50 == 0 or done == len(tasks):
                say(f"twinkle match: {done} of {len(tasks)} modules")
    return rows


def _survey(task: tuple[str, bool]) -> tuple[str, list[dict[str, Any]], str | None]:
    import gc
    import warnings

    import torch

    from twinkle.fuse.survey import survey_module

    torch.set_num_threads(1)
    # Millions of live objects of transformers: a full collection every few modules doubles the time.
    gc.disable()
    name, near = task
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return name, [_row(found, near=near) for found in survey_module(name)], None
        except Exception as error:  # a module may raise anything while it is imported
            return name, [], f"{type(error).__name__}: {error}"


# -- output ---------------------------------------------------------------------------------------


def _row(found: Recognition, *, near: bool) -> dict[str, Any]:
    return {
        "target": found.target,
        "op": found.op,
        "variant": found.variant.name if found.op is not None else None,
        "facts": _plain(found.facts),
        "instance": list(found.instance_facts),
        "reason": found.reason,
        "near": [(miss.op, miss.variant.name, miss.difference) for miss in found.near]
        if near and not found
        else [],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _text(rows: list[dict[str, Any]]) -> str:
    lines: list[str] = []
    module = None
    for row in rows:
        where, _, name = row["target"].partition(":")
        if row["op"] is None and not row["near"] and not (row["reason"] or "").startswith("no source"):
            continue
        if where != module:
            lines += ["", where] if lines else [where]
            module = where
        if row["op"] is not None:
            for place in row["facts"].get("sites") or [row["facts"]]:
                variant = place.get("variant", row["variant"])
                lines.append(f"  {name:<34} {row['op']:<16} {variant:<28} {_shown(row, place)}")
                if place.get("wired") is False:
                    lines.append(f"  {'':<34} left as it is: {place['reason']}")
            if row["facts"].get("requires"):
                lines.append(f"  {'':<34} only with {', '.join(row['facts']['requires'])}")
        elif not row["near"]:
            lines.append(f"  {name:<34} -                {row['reason']}")
        for op, variant, difference in row["near"]:
            lines.append(f"  {name:<34} not {op:<12} nearest {variant}: {difference}")
            if row["reason"]:
                lines.append(f"  {'':<34} and it {row['reason']}")
    recognised = sum(row["op"] is not None for row in rows)
    lines += ["", f"{recognised} of {len(rows)} layers and functions recognised"]
    inside = [row["facts"]["wired"] for row in rows if "wired" in row["facts"]]
    if inside:
        lines.append(f"{len(inside)} of these are places inside a forward, {sum(inside)} with a kernel")
    return "\n".join(lines)


def _shown(row: dict[str, Any], facts: dict[str, Any]) -> str:
    return ", ".join(
        f"{role}={'self.' if role in row['instance'] else ''}{fact}"
        for role, fact in facts.items()
        if role not in ("variant", "wired", "reason") and isinstance(fact, str | int | float)
    )
