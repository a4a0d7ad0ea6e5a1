"""Watches and imports in several threads: nothing deadlocks, nothing is seen half done."""

from __future__ import annotations

PACKAGE = {
    # pkg/__init__ waits for a thread that imports pkg.sub: the thread must never want pkg's import lock.
    "tw_waits/__init__.py": """
        import importlib, threading
        done = []
        def work():
            from tw_waits.sub import value
            done.append(value)
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(3)
    """,
    "tw_waits/sub.py": "value = 1",
}


def test_a_thread_imports_a_target_while_its_package_waits_for_the_thread(python, write):
    folder = write(PACKAGE)
    out = python(
        """
        from twinkle.hooks.imports import watch_module
        seen = []
        for name in ("tw_waits", "tw_waits.sub", "tw_waits.*"):
            watch_module(name, lambda module, name: seen.append(name))
        import tw_waits
        print(tw_waits.done, seen)
        """,
        path=str(folder),
    )
    assert out == "[1] ['tw_waits.sub', 'tw_waits.sub', 'tw_waits']\n"


def test_the_deadlock_case_is_one(python, write):
    """The same program with wrapt's own finder hangs until the package stops waiting."""
    folder = write(PACKAGE)
    out = python(
        """
        import wrapt
        wrapt.register_post_import_hook(lambda module: None, "tw_waits.sub")
        import tw_waits
        print(tw_waits.done)
        """,
        path=str(folder),
    )
    assert out == "[]\n"


def test_hooks_of_others_on_a_target_do_not_bring_the_deadlock_back(python, write):
    folder = write(PACKAGE)
    out = python(
        """
        import sys, wrapt
        seen = []
        wrapt.register_post_import_hook(lambda module: seen.append("theirs"), "tw_waits.sub")
        from twinkle.hooks.imports import watch_module
        watch_module("tw_waits.sub", lambda module, name: seen.append("ours"))
        import tw_waits
        print(tw_waits.done, seen)
        """,
        path=str(folder),
    )
    assert out == "[1] ['ours', 'theirs']\n"


def test_a_watch_made_while_another_thread_imports_runs_when_that_import_ends(python, write):
    folder = write(
        {
            "tw_slow.py": """
            import tw_events
            tw_events.began.set()
            assert tw_events.go.wait(10)
            last = 1
        """,
            "tw_events.py": "import threading\nbegan, go = threading.Event(), threading.Event()",
        }
    )
    out = python(
        """
        import sys, threading, tw_events
        thread = threading.Thread(target=lambda: __import__("tw_slow"))
        thread.start()
        assert tw_events.began.wait(10)
        from twinkle.hooks import imports
        seen = []
        imports.watch_module("tw_slow", lambda module, name: seen.append((name, module.last)))
        imports.watch_module("tw_s*", lambda module, name: seen.append((name, module.last)))
        early = list(seen), imports.missed()
        tw_events.go.set()
        thread.join(10)
        print(early, seen, imports.missed(), type(sys.modules["tw_slow"].__spec__).__name__)
        """,
        path=str(folder),
    )
    assert out == "([], []) [('tw_slow', 1), ('tw_slow', 1)] [] ModuleSpec\n"


def test_a_thread_that_waits_for_a_target_sees_it_patched(python, write):
    folder = write(
        {
            "tw_shared.py": "import time\ntime.sleep(0.2)\ndef f(): return 1",
        }
    )
    out = python(
        """
        import threading, time
        from twinkle.hooks.imports import watch_module
        def patch(module, name):
            time.sleep(0.2)
            module.f = lambda: 2
        watch_module("tw_shared", patch)
        results = []
        def use():
            from tw_shared import f
            results.append(f())
        threads = [threading.Thread(target=use) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(10)
        print(results)
        """,
        path=str(folder),
    )
    assert out == f"{[2] * 8}\n"


def test_many_threads_and_targets_each_run_once(python, write):
    folder = write({f"tw_many/m{i}.py": "" for i in range(60)} | {"tw_many/__init__.py": ""})
    out = python(
        """
        import collections, importlib, threading
        from twinkle.hooks.imports import missed, watch_module
        seen = []
        for i in range(0, 60, 2):
            watch_module(f"tw_many.m{i}", lambda module, name: seen.append(name))
        watch_module("tw_many.m?", lambda module, name: seen.append(name))
        barrier = threading.Barrier(6)
        def work(start):
            barrier.wait()
            for i in range(60):
                importlib.import_module(f"tw_many.m{(i * 7 + start) % 60}")
        threads = [threading.Thread(target=work, args=(i * 11,)) for i in range(6)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(30)
        counts = collections.Counter(seen)
        twice = {f"tw_many.m{i}" for i in range(0, 10, 2)}  # watched by name and by the pattern
        print(len(seen), {name for name in counts if counts[name] != 1 + (name in twice)})
        print(missed())
        """,
        path=str(folder),
    )
    assert out == "40 set()\n[]\n"
