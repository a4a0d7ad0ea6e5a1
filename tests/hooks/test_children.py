"""Children of a watching process: what they inherit, and what the variable of a door gives them."""

from __future__ import annotations

import sys

import pytest

SITE = """
    from twinkle.hooks.imports import watch_module
    watch_module("tw_target", lambda module, name: setattr(module, "value", "patched"))
"""
TARGET = {"tw_target.py": "value = 'original'", "sitecustomize.py": SITE}


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_child_keeps_its_watches(python, write):
    folder = write({"tw_target.py": "value = 'original'"})
    out = python(
        """
        import os
        from twinkle.hooks.imports import watch_module
        watch_module("tw_target", lambda module, name: setattr(module, "value", "patched"))
        child = os.fork()
        if child == 0:
            import tw_target
            os.write(1, tw_target.value.encode())
            os._exit(0)
        os.waitpid(child, 0)
        """,
        path=str(folder),
    )
    assert out == "patched"


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_child_forked_while_another_thread_registers_is_not_locked(python, write):
    folder = write({"tw_target.py": "value = 'original'"})
    out = python(
        """
        import os, threading, warnings
        warnings.simplefilter("ignore")
        from twinkle.hooks import imports
        from twinkle.runtime import runtime
        held, go = threading.Event(), threading.Event()
        def hold():
            with runtime.of(imports.Watches).lock:
                held.set()
                go.wait(10)
        threading.Thread(target=hold, daemon=True).start()
        assert held.wait(10)
        child = os.fork()
        if child == 0:
            imports.watch_module("tw_target", lambda module, name: os.write(1, b"patched"))
            import tw_target
            os._exit(0)
        go.set()
        os.waitpid(child, 0)
        """,
        path=str(folder),
        timeout=240,
    )
    assert out == "patched"


def test_a_subprocess_is_watched_through_the_environment(python, write):
    folder = write(TARGET)
    out = python(
        """
        import subprocess, sys
        print(subprocess.run([sys.executable, "-c", "import tw_target; print(tw_target.value)"],
                             capture_output=True, text=True, timeout=240).stdout.strip())
        """,
        path=str(folder),
    )
    assert out == "patched\n"


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_multiprocessing_child_is_watched(python, write, method):
    folder = write(TARGET | {"tw_work.py": "def work(_):\n    import tw_target\n    return tw_target.value"})
    out = python(
        f"""
        import multiprocessing, tw_work
        if __name__ == "__main__":
            with multiprocessing.get_context("{method}").Pool(2) as pool:
                print(pool.map(tw_work.work, range(2)))
        """,
        path=str(folder),
    )
    assert out == "['patched', 'patched']\n"
