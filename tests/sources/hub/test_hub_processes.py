"""Several processes, killed processes and full disks: with processes, as they happen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loopback_hub import Repo, kernel_files

ROOT = Path(__file__).parents[3]
LOAD = """
from twinkle.sources.hub.source import HubSource
layer = HubSource("acme/my-kernel", "RMSNorm", kind="layer", version=1, where="here").load()
print(layer.label, flush=True)
"""

# Forked when the slow imports are done, and let go together: they meet at the lock.
EIGHT = """
import os, sys, torch
from twinkle.sources.hub.source import HubSource
from twinkle.sources.hub.kernels_package import kernels_package
kernels_package()
gate, go = os.pipe()
children = []
for _ in range(8):
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(gate, 1)
        try:
            layer = HubSource("acme/my-kernel", "RMSNorm", kind="layer", version=1, where="here").load()
            os.write(1, f"{layer.label}\\n".encode())
        except BaseException as error:
            os.write(2, f"{error}\\n".encode())
        os._exit(0)
    children.append(child)
os.close(go)
for child in children:
    os.waitpid(child, 0)
"""


@pytest.fixture
def program(hub, cache):
    """``program(code, *args)`` starts a process whose cache and Hub are those of the test."""
    started = []

    def start(code=LOAD):
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def files_in(repo, variant="torch-cpu"):
    return sum(path.startswith(f"build/{variant}/") for path in repo.commits[repo.branches["v1"]])


@pytest.mark.slow
def test_eight_processes_at_once_make_one_download(hub, cache, program):
    files = {f"data{number}.txt": f"{number}" * 200_000 for number in range(6)}
    repo = Repo({"v1": kernel_files(files=files)})
    hub.repos["acme/my-kernel"] = repo
    out, err = program(EIGHT).communicate(timeout=240)
    assert out == "v1\n" * 8, err
    assert hub.count("GET .*/resolve/") == files_in(repo)
    assert hub.count("HEAD .*/resolve/") == files_in(repo)


@pytest.mark.slow
def test_process_killed_in_mid_download_leaves_nothing_torn(hub, cache, program, source, go_offline):
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files={"data.txt": "x" * 100_000})})
    hub.fault(r"GET .*/resolve/.*data\.txt", "stall", 60, times=1)
    process = program()
    deadline = time.monotonic() + 60
    while not hub.count(r"GET .*/resolve/.*data\.txt") and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    with pytest.MonkeyPatch.context() as patch:
        from huggingface_hub import constants

        from twinkle.errors import SourceError

        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(SourceError, match=r"damaged in the cache|not in the cache"):
            source(version=1, trust_remote_code=True).load()
    assert source(version=1).load().label == "v1"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_in_a_download_is_answered_at_once(hub, cache, program):
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files={"data.txt": "x" * 100_000})})
    hub.fault(r"GET .*/resolve/.*data\.txt", "stall", 60, times=1)
    body = LOAD.replace("\n", "\n    ")
    # A shell starts what goes on behind it (`&`) with the signal ignored.
    heeded = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = program(f"{heeded}try:{body}\nexcept KeyboardInterrupt:\n    print('caught', flush=True)")
    deadline = time.monotonic() + 60
    while not hub.count(r"GET .*/resolve/.*data\.txt") and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    interrupted = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "caught\n"
    assert time.monotonic() - interrupted < 1.0
    # Taking torch apart is what is left: the download is not waited for at the end either.
    assert process.wait(30) == 0
    assert time.monotonic() - interrupted < 10.0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are of POSIX")
def test_disk_that_takes_no_more(hub, cache, program, source):
    """A file-size limit stands for the full disk: the write itself fails, as the system makes it fail."""
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files={"data.txt": "x" * 300_000})})
    code = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n" + LOAD
    out, err = program(code).communicate(timeout=240)
    assert "the disk is full" in err, out + err
    assert source(version=1).load().label == "v1"


@pytest.mark.slow
def test_process_that_forked_after_loading_has_the_kernel(hub, cache, program):
    code = LOAD + (
        "import os\n"
        "if os.fork() == 0:\n"
        "    again = HubSource('acme/my-kernel', 'RMSNorm', kind='layer', version=1).load()\n"
        "    print(again is layer, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    out, err = program(code).communicate(timeout=240)
    assert out == "v1\nTrue\n", err


@pytest.mark.slow
def test_process_that_forked_while_another_thread_was_loading_is_not_stuck(hub, cache, program):
    code = (
        "import os, threading, time\n"
        "from twinkle.sources.hub.load import repository_lock\n"
        "def hold():\n"
        "    with repository_lock('acme/my-kernel'):\n"
        "        time.sleep(60)\n"
        "threading.Thread(target=hold, daemon=True).start()\n"
        "time.sleep(0.2)\n"
        "if os.fork():\n"
        "    os.wait()\n"
        "    os._exit(0)\n"
    ) + LOAD
    out, err = program(code).communicate(timeout=240)
    assert out == "v1\n", err
