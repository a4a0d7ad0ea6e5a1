"""What the hooks cost before the first target: a handful of modules and no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIGHT = {
    "__future__",
    "twinkle",
    "twinkle.errors",
    "twinkle.forks",
    "twinkle.hooks",
    "twinkle.hooks.finder",
    "twinkle.hooks.guard",
    "twinkle.hooks.imports",
    "twinkle.hooks.patterns",
    "twinkle.options",
    "twinkle.records",
    "twinkle.registry",
    "twinkle.runtime",
    "twinkle.session",
    "twinkle.targets",
}


@pytest.fixture
def brings_in(python):
    """The modules that code brings into an interpreter that has read no ``.pth`` file."""

    def brings_in(code: str) -> set[str]:
        out = python(
            f"""
            import os, sys  # site, which -S leaves out, imports os in every program
            sys.path.insert(0, {str(ROOT)!r})
            before = set(sys.modules)
            {code}
            after = set(sys.modules)
            import json
            print(json.dumps(sorted(after - before)))
            """,
            "-S",
        )
        return set(json.loads(out))

    return brings_in


def test_importing_the_hooks_brings_in_these_modules_and_no_other(brings_in):
    assert brings_in("import twinkle.hooks.imports") == LIGHT


@pytest.mark.parametrize("name", ["some.name", "some.*.name_*"])
def test_watching_brings_in_nothing_else(brings_in, name):
    code = f"from twinkle.hooks.imports import watch_module; watch_module({name!r}, print)"
    assert brings_in(code) == LIGHT


def test_watching_models_brings_in_the_construction_and_nothing_else(brings_in):
    code = "from twinkle.hooks.construction import watch_pretrained; watch_pretrained(print)"
    assert brings_in(code) - LIGHT == {"twinkle.hooks.construction", "types", "operator", "_operator"}


def test_a_miss_does_not_import_wrapt(brings_in):
    code = "from twinkle.hooks.imports import watch_module; watch_module('a.*', print); import json.tool"
    assert not {name for name in brings_in(code) if name.partition(".")[0] in ("wrapt", "inspect", "asyncio")}


def test_a_match_imports_wrapt(python):
    out = python("""
        import sys
        from twinkle.hooks.imports import watch_module
        watch_module("wave", lambda module, name: None)
        before = "wrapt" in sys.modules
        import wave
        print(before, "wrapt" in sys.modules)
    """)
    assert out == "False True\n"
