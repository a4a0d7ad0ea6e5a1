"""What reading a configuration brings into an interpreter that starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2]

TEXT = """\
[twinkle]
mode = "auto"
[layers.MyMLP]
target = ["my_pkg.models:MLP", "my_pkg.*.models:*MLP"]
layer_impl = "my_kernels:MLP"
attributes = { eps = 1e-6 }
[functions.silu]
target_module = "my_pkg.act"
func_impl = "my_kernels:silu"
"""

LOADED = """\
import sys
sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
from twinkle import config
environ = {"TWINKLE_LAYERS": 'A = { layer_impl = "k:A" }', "TWINKLE_MODE": "train"}
settings = config.load([sys.argv[2]], environ)
assert len(settings.layers) == 2 and len(settings.functions) == 1
print(*sorted(set(sys.modules) - before))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    path = tmp_path / "twinkle.toml"
    path.write_text(TEXT, encoding="utf-8")
    path.chmod(0o644)
    return path


def loaded(path: Path) -> set[str]:
    command = [sys.executable, "-I", "-c", LOADED, str(PACKAGE), str(path)]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_a_usual_file_is_read_with_modules_of_ours_alone(path: Path) -> None:
    assert {name for name in loaded(path) if name.partition(".")[0] != "twinkle"} == {"__future__"}


def test_of_ours_only_the_rooms_that_checking_needs_are_imported(path: Path) -> None:
    rooms = {name.split(".")[1] for name in loaded(path) if name.startswith("twinkle.")}
    assert rooms == {
        "_environment",
        "config",
        "devices",
        "errors",
        "modes",
        "op_names",
        "sources",
        "targets",
        "where",
    }
    assert {name for name in loaded(path) if name.startswith("twinkle.sources.")} == {
        "twinkle.sources.code",
        "twinkle.sources.spec",
    }


def test_a_document_without_kernels_imports_no_source(path: Path) -> None:
    code = "\n".join(
        [
            f"import sys; sys.path.insert(0, {str(PACKAGE)!r})",
            "from twinkle import config; config.load([sys.argv[1]], {})",
            "print([name for name in sys.modules if name.startswith('twinkle.sources')])",
        ]
    )
    path.write_text("[twinkle]\nkernels = 'auto'\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_file_beyond_plain_toml_is_read_by_tomllib(path: Path) -> None:
    path.write_text(TEXT + "version = 0x1\n", encoding="utf-8")
    code = "\n".join(
        [
            f"import sys; sys.path.insert(0, {str(PACKAGE)!r})",
            "from twinkle.config.files import read",
            f"read({str(path)!r}); print('tomllib' in sys.modules or 'tomli' in sys.modules)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
