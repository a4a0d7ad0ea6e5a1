"""One target that cannot be replaced never keeps the others of its module out."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .conftest import Program

MODULE = """
    import array
    Immutable = array.array
    class Meta(type):
        def __setattr__(cls, name, value): raise AttributeError("a frozen class")
    class Frozen(metaclass=Meta):
        def m(self, x): return x
    def before(x): return "original"
    def after(x): return "original"
"""
KERNELS = """
    def before(x): return "kernel"
    def after(x): return "kernel"
    def m(self, x): return "kernel"
    def append(self, v, /): return "kernel"
"""
CONFIG = """
    [functions.before]
    target_module = "some"
    func_impl = "fast:before"
    [functions."Frozen.m"]
    target_module = "some"
    func_impl = "fast:m"
    [functions."Immutable.append"]
    target_module = "some"
    func_impl = "fast:append"
    [functions.nowhere]
    target_module = "some"
    func_impl = "fast:before"
    [functions.after]
    target_module = "some"
    func_impl = "fast:after"
"""


def test_the_others_are_replaced_and_each_bad_one_has_its_reason(program: Program) -> None:
    (program.root / "site" / "some.py").write_text(textwrap.dedent(MODULE))
    (program.root / "site" / "fast.py").write_text(textwrap.dedent(KERNELS))
    done = program.run(
        "import torch, some\nprint(some.before(1), some.after(1), flush=True)\nreport()", CONFIG
    )
    said, _, rest = done.stdout.partition("\n")
    assert said == "kernel kernel"
    states = {one["target"]: (one["state"], one["reason"]) for one in json.loads(rest)["bindings"]}
    assert states["some:before"][0] == states["some:after"][0] == "active"
    assert states["some:Frozen.m"][0] == "failed"
    assert "a frozen class" in states["some:Frozen.m"][1]
    assert states["some:Immutable.append"][0] == "failed"
    assert "immutable type" in states["some:Immutable.append"][1]
    assert states["some:nowhere"][0] == "failed"
    # The warning is of the program's line, and names that of the configuration.
    assert "<string>:" in done.stderr
    assert "twinkle.toml:5 (functions.'Frozen.m')" in done.stderr
    assert "twinkle/hooks" not in done.stderr


def test_with_strict_the_bad_one_is_an_error(program: Program) -> None:
    (program.root / "site" / "some.py").write_text(textwrap.dedent(MODULE))
    (program.root / "site" / "fast.py").write_text(textwrap.dedent(KERNELS))
    done = program.run("import torch, some", CONFIG, check=False, TWINKLE_STRICT="1")
    assert done.returncode == 1
    assert "some:Frozen.m" in done.stderr
    assert "a frozen class" in done.stderr
