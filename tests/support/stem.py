"""A process that has torch, and nothing of Twinkle, of which programs are forked.

For tests that run many small programs in processes of their own and are not about the start of one: two
seconds of each would go into the import of torch.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Stem"]

# A program goes on at the end, outside of every loop: it ends as any other, with what it registered for then.
_SOURCE = """
import json, os, sys, types
import torch
assert not [name for name in sys.modules if name.partition(".")[0] == "twinkle"]
while True:
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
given = json.loads(line)
os.chdir(given["folder"])
os.environ.clear()
os.environ.update(given["environ"])
for number, file in enumerate((os.devnull, given["out"], given["err"])):
    opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(opened, number)
    os.close(opened)
sys.path[1:1] = filter(None, given["environ"].get("PYTHONPATH", "").split(os.pathsep))
sys.modules["__main__"] = types.ModuleType("__main__")
exec(compile(given["code"], "<string>", "exec"), vars(sys.modules["__main__"]))
"""
# Read at the start of an interpreter or by torch's import, which a program of the stem comes too late for.
_TOO_LATE = ("PYTHON", "OMP_", "MKL_", "TORCH", "ATEN_", "LD_")


class Stem:
    """Runs programs in processes of their own, from the second on without an import of torch."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(
        self, code: str, *, cwd: Path, env: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run`` of ``python -c``, with what it prints in text."""
        late = [name for name, value in env.items() if name.startswith(_TOO_LATE)]
        changed = [name for name in late if name != "PYTHONPATH" and env[name] != os.environ.get(name)]
        assert not changed, f"a program of the stem cannot set {changed}"
        out, err = cwd / ".stdout", cwd / ".stderr"
        given = {"code": code, "environ": env, "folder": str(cwd), "out": str(out), "err": str(err)}
        process = self._started()
        assert process.stdin is not None
        print(json.dumps(given), file=process.stdin, flush=True)
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], timeout)[0]:
            self.close()
            raise subprocess.TimeoutExpired(code, timeout, out.read_bytes(), err.read_bytes())
        status = int(process.stdout.readline())
        return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            names = [name for name in os.environ if not name.startswith(("TWINKLE_", "PYTHONPATH"))]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SOURCE],
                env={name: os.environ[name] for name in names},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        return self._process

    def close(self) -> None:
        """End the process that programs are forked of, and a program that still runs."""
        if self._process is not None:
            process, self._process = self._process, None
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
