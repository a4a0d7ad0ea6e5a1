"""The records of the ops: light, complete, and the same as what is written beside them."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import twinkle.ops
from twinkle.ops import launch
from twinkle.ops.backends import KINDS, backend_for
from twinkle.ops.catalog import Op, all_ops, exported, find_op

FOLDER = Path(twinkle.ops.__file__).parent
NAMES = """\
import sys
from twinkle.op_names import OPS, hint
assert OPS and hint("rope") == "did you mean 'rotary'?"
print(*sorted({"torch", "dataclasses", "enum", "inspect", "typing"} & set(sys.modules)))
"""

each_op = pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)


def test_every_folder_is_an_op_and_every_op_has_its_place() -> None:
    folders = {path.parent.name for path in FOLDER.glob("*/__init__.py")}
    assert {op.name for op in all_ops()} == folders
    assert len({op.rank for op in all_ops()}) == len(folders)


def test_names_of_ops_are_asked_for_without_torch() -> None:
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        f"import sys; sys.path.insert(0, {str(FOLDER.parents[1])!r})",
    ]
    command[-1] += "\n" + NAMES
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "\n"


@each_op
def test_every_backend_is_there_and_says_what_it_supports(op: Op) -> None:
    assert op.backends
    for backend in op.backends:
        module = backend.load()
        assert hasattr(module, "supports") or module.__name__.endswith("linear_cross_entropy")
        assert backend.label == KINDS[backend.name]


@each_op
def test_what_is_exported_is_there(op: Op) -> None:
    for section in ("layers", "functions"):
        for name in getattr(op, section):
            assert hasattr(import_module(exported(section)[name]), name)  # type: ignore[arg-type]


@each_op
def test_the_readme_has_its_formula_its_summary_and_its_backends(op: Op) -> None:
    text = (FOLDER / "README.md").read_text()
    backends = ", ".join(backend.name for backend in op.backends)
    assert f"| `{op.name}` | {op.summary} | {backends} |" in text.splitlines()
    formula = str(sys.modules[f"twinkle.ops.{op.name}"].__doc__).split("``")[1]
    assert f"`{formula}`" in " ".join(text.split())


def test_a_backend_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "DEVICE_TYPES", frozenset({"cuda"}))
    norm = find_op("layer_norm")
    fused = norm.variants[0]
    assert norm.backend("triton_backend").supports(fused, "cuda") is None
    assert norm.backend("triton_backend").supports(fused, "rocm") is None
    assert "is not for cpu" in str(norm.backend("triton_backend").supports(fused, "cpu"))
    shapes = {"normalized_shape": (2, 3)}
    assert "2 dimensions" in str(norm.backend("triton_backend").supports(fused, "cuda", shapes))
    assert "torch's own kernel" in str(norm.backend("torch_backend").supports(fused, "cpu"))
    assert backend_for("layer_norm", fused, "cpu") is None
    chosen = backend_for("rms_norm", find_op("rms_norm").variants[0], "cpu")
    assert chosen is not None
    assert chosen.name == "cpu_backend"


def test_the_cpu_of_triton_s_interpreter_has_triton_s_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "DEVICE_TYPES", frozenset({"cpu"}))
    chosen = backend_for("rms_norm", find_op("rms_norm").variants[0], "cpu")
    assert chosen is not None
    assert chosen.name == "triton_backend"


def test_an_unknown_op_is_no_op() -> None:
    with pytest.raises(LookupError, match="there is no op 'flash'"):
        find_op("flash")
