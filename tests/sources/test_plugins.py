"""Entry points of the group twinkle.kernels."""

from __future__ import annotations

import subprocess
import sys

import pytest

from twinkle.errors import ConfigError, SourceError
from twinkle.sources import plugins


@pytest.fixture
def install(site_dir):
    """``install("dist", {"name": "value"}, {"pkg/file": "text"})`` as pip would have left it."""

    def do(dist: str, entries: dict[str, str], files: dict[str, str]) -> None:
        info = site_dir / f"{dist.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2\n")
        lines = [f"{name} = {value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("[twinkle.kernels]\n" + "\n".join(lines) + "\n")
        for name, text in files.items():
            path = site_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return do


TOML = '[functions.silu]\ntarget_module = "m"\nfunc_impl = "a:b"\n'


def test_plugins_are_listed_without_importing_them(install):
    install("fast-norms", {"norms": "plug_listed:twinkle.toml"}, {"plug_listed/__init__.py": "1 / 0"})
    listed = [info for info in plugins.available() if info.dist == "fast-norms"]
    assert listed == [("norms", "fast-norms", "1.2", "plug_listed:twinkle.toml")]


def test_a_toml_resource_is_read_without_running_its_package(install, site_dir):
    install(
        "fast-norms",
        {"norms": "plug_toml:twinkle.toml"},
        {"plug_toml/__init__.py": "1 / 0", "plug_toml/twinkle.toml": TOML},
    )
    plugin = plugins.load("norms")
    assert plugin.document == {"functions": {"silu": {"target_module": "m", "func_impl": "a:b"}}}
    assert plugin.base_dir == str(site_dir / "plug_toml")
    assert plugin.where == str(site_dir / "plug_toml" / "twinkle.toml")
    assert "plug_toml" not in sys.modules


def test_a_resource_may_lie_in_a_subpackage(install):
    install(
        "fast-norms",
        {"norms": "plug_sub.data:gpu.toml"},
        {"plug_sub/__init__.py": "", "plug_sub/data/gpu.toml": TOML},
    )
    assert "functions" in plugins.load("norms").document


@pytest.mark.parametrize("text", ["document = {'layers': {}}", "def document(): return {'layers': {}}"])
def test_python_may_give_the_document(install, site_dir, text):
    install("fast-norms", {"norms": "plug_code:document"}, {"plug_code.py": text})
    plugin = plugins.load("norms")
    assert plugin.document == {"layers": {}}
    assert plugin.base_dir == str(site_dir)


def test_an_unknown_plugin_comes_with_those_there_are(install):
    install("fast-norms", {"fast-norms": "p:t.toml"}, {})
    with pytest.raises(ConfigError) as caught:
        plugins.load("fast-norm")
    assert "fast-norms" in caught.value.found
    assert caught.value.fix == "did you mean 'fast-norms'?"


def test_one_name_in_two_packages_needs_the_package(install):
    for dist, package in (("one-dist", "plug_one"), ("two-dist", "plug_two")):
        install(dist, {"norms": f"{package}:t.toml"}, {f"{package}/t.toml": f"[layers.{package}]\n"})
    with pytest.raises(ConfigError, match="several packages"):
        plugins.load("norms")
    assert list(plugins.load("two-dist:norms").document["layers"]) == ["plug_two"]


@pytest.mark.parametrize(
    ("value", "files"),
    [
        ("plug_gone:twinkle.toml", {}),
        ("plug_bad1:twinkle.toml", {"plug_bad1/__init__.py": ""}),
        ("plug_bad2:twinkle.toml", {"plug_bad2/twinkle.toml": "= ="}),
        ("plug_gone:document", {}),
        ("plug_bad3:document", {"plug_bad3.py": ""}),
        ("plug_bad4:document", {"plug_bad4.py": "raise ValueError('boom')"}),
        ("plug_bad5:document", {"plug_bad5.py": "def document(): raise SystemExit(3)"}),
        ("plug_bad6:document", {"plug_bad6.py": "document = 3"}),
        ("plug_bad7", {"plug_bad7.py": ""}),
    ],
)
def test_a_broken_plugin_is_a_reason(install, value, files):
    install("fast-norms", {"norms": value}, files)
    with pytest.raises(SourceError) as caught:
        plugins.load("norms")
    assert "fast-norms 1.2" in caught.value.what
    assert caught.value.found


def test_a_damaged_distribution_does_not_hide_the_others(install, site_dir):
    install("fast-norms", {"norms": "p:t.toml"}, {})
    damaged = site_dir / "damaged-1.0.dist-info"
    damaged.mkdir()
    (damaged / "METADATA").write_bytes(b"\xff\xfe")
    (damaged / "entry_points.txt").write_text("[twinkle.kernels\n==")
    assert "norms" in [info.name for info in plugins.available()]


def test_nothing_is_scanned_before_somebody_asks():
    program = "import sys, twinkle.sources; print('importlib.metadata' in sys.modules)"
    run = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
