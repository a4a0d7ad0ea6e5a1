"""A program ends under every door as it ends under plain Python: exit code, output and traceback."""

from __future__ import annotations

import re
import signal
import textwrap

import pytest

ENDS = {
    "falls off the end": "print('done')",
    "exit 0": "import sys; sys.exit(0)",
    "exit 3": "import sys; sys.exit(3)",
    "exit 300": "import sys; sys.exit(300)",
    "exit None": "raise SystemExit",
    "exit True": "raise SystemExit(True)",
    "exit text": "import sys; sys.exit('no data')",
    "exit object": "import sys; sys.exit([1, 2])",
    "os._exit": "import os; os._exit(7)",
    "exit in a thread": """
        import sys, threading
        t = threading.Thread(target=sys.exit, args=(4,)); t.start(); t.join()
    """,
    "exit in atexit": "import atexit, sys; atexit.register(sys.exit, 5)",
    "order of atexit": """
        import atexit, threading
        atexit.register(print, 'first registered')
        atexit.register(print, 'last registered')
        threading.Thread(target=print, args=('thread',)).start()
        print('end of main')
    """,
    "exception": "def f():\n    raise ValueError('bad')\nf()",
    "chained exceptions": """
        def inner():
            raise KeyError('inner')
        try:
            inner()
        except KeyError as error:
            try:
                raise TypeError('second')
            except TypeError:
                raise RuntimeError('outer') from error
    """,
    "exception group or notes": """
        error = ValueError('noted')
        getattr(error, 'add_note', print)('a note')
        raise error
    """,
    "exception in a library": "import json; json.loads('{')",
    "exception in a thread": """
        import threading
        t = threading.Thread(target=lambda: 1 / 0, name='worker'); t.start(); t.join()
    """,
    "exception in __del__": """
        class Loud:
            def __del__(self):
                raise ValueError('in __del__')
        loud = Loud()
        del loud
    """,
    "exception in atexit": "import atexit; atexit.register(lambda: 1 / 0)",
    "own excepthook": """
        import sys
        sys.excepthook = lambda kind, error, trace: print('hook', kind.__name__, trace.tb_lineno)
        raise ValueError('bad')
    """,
    "syntax error": "def f(:\n    pass",
    "indentation error": "if True:\npass",
    "null bytes": "print(1)\0",
    "keyboard interrupt": "raise KeyboardInterrupt",
    "recursion": "import sys; sys.setrecursionlimit(60)\ndef f(): f()\nf()",
    "warning": "import warnings; warnings.warn('careful', FutureWarning)",
    "system exit in a traceback": "try:\n    1 / 0\nfinally:\n    raise SystemExit(9)",
    "stdout closed": "import sys; print('x'); sys.stdout.close()",
    "pickle in atexit": """
        import atexit, pickle
        class Point:
            pass
        @atexit.register
        def save():
            point = pickle.loads(pickle.dumps(Point()))
            print(type(point).__module__, type(point) is Point)
    """,
    "main imported again": """
        import __main__, sys
        x = 1
        print(__main__.x, sys.modules['__main__'] is __main__)
    """,
}


def end(done):
    """What is left of a program; objects lie at other addresses in every process."""
    return done.returncode, done.stdout, re.sub(r" at 0x[0-9a-f]+", "", done.stderr)


@pytest.mark.parametrize("source", ENDS.values(), ids=ENDS.keys())
def test_program_ends_the_same(main_door, source, tmp_path):
    (tmp_path / "program.py").write_text(textwrap.dedent(source))
    plain = main_door.run("program.py", plain=True, cwd=tmp_path)
    ours = main_door.run("program.py", cwd=tmp_path)
    assert end(ours) == end(plain)


MISSING = {
    "script": ("nothing.py",),
    "module": ("-m", "nothing"),
    "package without __main__": ("-m", "json"),
    "directory without __main__": (".",),
    "code that fails": ("-c", "1 / 0"),
}


@pytest.mark.parametrize("program", MISSING.values(), ids=MISSING.keys())
def test_program_that_cannot_start_says_what_python_says(main_door, program, tmp_path):
    plain = main_door.run(*program, plain=True, cwd=tmp_path)
    ours = main_door.run(*program, cwd=tmp_path)
    assert plain.returncode != 0
    assert end(ours) == end(plain)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL", "SIGHUP", "SIGPIPE", "SIGUSR1"])
def test_signal_ends_the_program_the_same(main_door, name, tmp_path):
    (tmp_path / "program.py").write_text(
        f"import os, signal\nprint(1, flush=True)\nos.kill(os.getpid(), signal.{name})\nprint(2)\n"
    )
    plain = main_door.run("program.py", plain=True, cwd=tmp_path)
    ours = main_door.run("program.py", cwd=tmp_path)
    assert end(ours) == end(plain)


def test_signal_sent_to_twinkle_run_reaches_the_program(doors, tmp_path):
    import subprocess

    door = doors["run"]
    (tmp_path / "program.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(21))\n"
        "print('ready', flush=True)\n"
        "time.sleep(30)\n"
    )
    command = [door.python, *door.prefix, "program.py"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 21
