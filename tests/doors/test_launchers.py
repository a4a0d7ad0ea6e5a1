"""The workers of PyTorch's and accelerate's launchers are patched like the program that was typed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WORKER = """\
import os, sys
patched = "twinkle._bootstrap" in sys.modules
# In one write: the other worker has the same stdout.
sys.stdout.write(f"worker {os.environ.get('RANK', '0')} {patched} {__name__} {sys.argv[1:]}" + chr(10))
"""

LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"),
    "accelerate": ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS.keys())
def test_workers_are_patched(launcher, tmp_path):
    if "accelerate.commands.launch" in launcher:
        pytest.importorskip("accelerate")
    (tmp_path / "worker.py").write_text(WORKER)
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TWINKLE")}
    command = [
        sys.executable,
        "-m",
        "twinkle",
        "run",
        "--kernels",
        "off",
        *launcher,
        "worker.py",
        "--lr",
        "1",
    ]
    done = subprocess.run(
        command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    ranks = range(2 if "--nproc-per-node" in launcher else 1)
    lines = [line for line in done.stdout.splitlines() if line.startswith("worker")]
    assert sorted(lines) == [f"worker {rank} True __main__ ['--lr', '1']" for rank in ranks]


@pytest.mark.slow
def test_workers_of_a_data_loader_are_patched(tmp_path):
    (tmp_path / "program.py").write_text(
        "import sys\n"
        "from torch.utils.data import DataLoader, Dataset\n"
        "class Rows(Dataset):\n"
        "    def __len__(self):\n"
        "        return 2\n"
        "    def __getitem__(self, index):\n"
        "        return 'twinkle._bootstrap' in sys.modules\n"
        "if __name__ == '__main__':\n"
        "    for method in ('fork', 'spawn'):\n"
        "        loader = DataLoader(Rows(), num_workers=1, multiprocessing_context=method)\n"
        "        print(method, [bool(row) for row in loader])\n"
    )
    command = [sys.executable, "-m", "twinkle", "run", "--kernels", "off", "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == "fork [True, True]\nspawn [True, True]\n", done.stderr
