"""How a plain package is imported: its own modules, again, broken, from several threads."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import sys
import threading

import pytest

from twinkle.errors import SourceError
from twinkle.runtime import runtime
from twinkle.sources import packages


def loaded_from(repo) -> list[str]:
    marker = packages.name_of(str(repo), "x").rpartition(".")[0]
    return [name for name in sys.modules if name.startswith(marker + ".")]


@pytest.mark.parametrize(
    "text",
    [
        "from . import helper\ndef f(): return helper.value()",
        "from .helper import value\ndef f(): return value()",
        "from my_kernels.helper import value\ndef f(): return value()",
        "from my_kernels import helper\ndef f(): return helper.value()",
        "import my_kernels.helper\ndef f(): return my_kernels.helper.value()",
        "import os, my_kernels.helper as h, sys\ndef f(): return h.value()",
        "def f():\n    import my_kernels.helper\n    return my_kernels.helper.value()",
        "from __future__ import annotations\nimport my_kernels.helper as h\ndef f(): return h.value()",
    ],
)
def test_a_package_imports_its_own_modules_in_every_way(write_repo, text, function):
    repo = write_repo(
        {
            "my_kernels/__init__.py": "",
            "my_kernels/functions.py": text + "\n",
            "my_kernels/helper.py": "def value(): return 42\n",
        }
    )
    assert function(repo, "f").load()() == 42
    assert "my_kernels" not in sys.modules


def test_an_own_import_never_reaches_an_installed_package_of_that_name(write_repo, site_dir, function):
    (site_dir / "my_kernels").mkdir()
    (site_dir / "my_kernels" / "__init__.py").write_text("value = 'installed'\n")
    repo = write_repo(
        {"my_kernels/__init__.py": "value = 'own'\nimport my_kernels\ndef f(): return my_kernels.value\n"}
    )
    assert function(repo, "f").load()() == "own"
    assert importlib.import_module("my_kernels").value == "installed"


def test_reload_runs_what_the_file_says_now(write_repo, function):
    repo = write_repo({"my_kernels/__init__.py": "def f(): return 1\n"})
    source, other = function(repo, "f"), function(repo, "f")
    assert source.load()() == other.load()() == 1
    (repo / "my_kernels" / "__init__.py").write_text("def f(): return 2\n")
    assert source.load()() == 1
    assert source.reload()() == 2
    assert source.load()() == other.load()() == 2


def test_a_reload_that_raises_keeps_the_old_code(write_repo, function):
    repo = write_repo({"my_kernels/__init__.py": "def f(): return 1\n"})
    source = function(repo, "f")
    old = source.load()
    (repo / "my_kernels" / "__init__.py").write_text("raise ValueError\n")
    with pytest.raises(SourceError):
        source.reload()
    assert source.load() is old
    assert pickle.loads(pickle.dumps(old)) is old


def test_a_package_that_raised_can_be_corrected(write_repo, function):
    repo = write_repo(
        {"my_kernels/__init__.py": "from . import b\ndef f(): return b.value\n", "my_kernels/b.py": "1 / 0\n"}
    )
    source = function(repo, "f")
    with pytest.raises(SourceError, match="raised on import"):
        source.load()
    (repo / "my_kernels" / "b.py").write_text("value = 3\n")
    assert source.load()() == 3


@pytest.mark.parametrize("broken", ["__init__.py", "layers.py"])
def test_a_package_that_raises_leaves_nothing_in_sys_modules(write_repo, broken, layer):
    repo = write_repo(
        {
            "my_kernels/__init__.py": "from . import helper\n",
            "my_kernels/helper.py": "",
            "my_kernels/layers.py": "",
        }
    )
    with (repo / "my_kernels" / broken).open("a") as file:
        file.write("raise ValueError('boom')\n")
    with pytest.raises(SourceError, match="boom"):
        layer(repo).load()
    assert loaded_from(repo) == []


def test_a_broken_submodule_does_not_take_away_what_others_use(write_repo, layer, function):
    repo = write_repo({"my_kernels/__init__.py": "def f(): pass\n", "my_kernels/layers.py": "1 / 0\n"})
    f = function(repo, "f").load()
    with pytest.raises(SourceError):
        layer(repo).load()
    assert pickle.loads(pickle.dumps(f)) is f


def test_threads_import_once(write_repo, function):
    repo = write_repo(
        {
            "my_kernels/__init__.py": """
                import sys, time
                sys.twinkle_test_imports = getattr(sys, "twinkle_test_imports", 0) + 1
                time.sleep(0.1)
                def f(): pass
            """
        }
    )
    results = []
    threads = [threading.Thread(target=lambda: results.append(function(repo, "f").load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    imports = sys.__dict__.pop("twinkle_test_imports")
    assert imports == 1
    assert len(set(results)) == 1


def test_a_kernel_that_needs_itself_while_it_is_imported_is_told_so(write_repo, function):
    repo = write_repo(
        {
            "my_kernels/__init__.py": """
                import sys
                sys.twinkle_test_hook()
                def f(): pass
            """
        }
    )
    source = function(repo, "f")
    reasons = []

    def hook():
        with pytest.raises(SourceError) as caught:
            source.load()
        reasons.append(caught.value.what)

    sys.twinkle_test_hook = hook
    try:
        source.load()
    finally:
        del sys.twinkle_test_hook
    assert "needed while it is being imported itself" in reasons[0]


def test_an_import_hook_sees_the_modules_of_a_kernel(seed_repo, layer):
    seen = []

    class Watcher:
        @staticmethod
        def find_spec(name, path=None, target=None):
            seen.append(name)

    sys.meta_path.insert(0, Watcher)
    try:
        layer(seed_repo).load()
    finally:
        sys.meta_path.remove(Watcher)
    assert packages.name_of(str(seed_repo), "my_kernels.layers") in seen
    assert packages.__name__ not in getattr(sys.meta_path[0], "__module__", "")


def test_threads_that_need_each_other_s_imports_do_not_wait_for_ever(write_repo, site_dir, function):
    (site_dir / "hooked_target.py").write_text(
        "import sys\nsys.twinkle_test_started.wait(5)\nsys.twinkle_test_load()\n"
    )
    repo = write_repo(
        {
            "my_kernels/__init__.py": """
                import sys
                sys.twinkle_test_started.set()
                import hooked_target
                def f(): pass
            """
        }
    )
    source = function(repo, "f")

    def load():
        with contextlib.suppress(SourceError):
            source.load()

    sys.twinkle_test_started = threading.Event()
    sys.twinkle_test_load = load
    threads = [
        threading.Thread(target=importlib.import_module, args=("hooked_target",), daemon=True),
        threading.Thread(target=load, daemon=True),
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        del sys.twinkle_test_started, sys.twinkle_test_load


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_forked_in_the_middle_of_an_import_can_import(write_repo, function):
    repo = write_repo({"my_kernels/__init__.py": "def f(): return 5\n"})
    with runtime.of(packages.Imports).lock:
        child = os.fork()
        if child == 0:
            try:
                os._exit(function(repo, "f").load()())
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
