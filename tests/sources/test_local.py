"""Plain packages in a directory."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import pickle
import subprocess
import sys
import threading
import traceback

import pytest
import torch

from twinkle.errors import SourceError
from twinkle.sources import packages
from twinkle.sources.local import LocalSource

CLASS = """
import torch
class f(torch.nn.Module):
    def forward(self, x):
        return x.sin() + 1
"""


def layer(repo, name="Doubled", package="my_kernels", **more):
    return LocalSource(str(repo), package, name, kind="layer", **more)


def function(repo, name, package="my_kernels"):
    return LocalSource(str(repo), package, name, kind="function")


def loaded_from(repo) -> list[str]:
    marker = packages.name_of(str(repo), "x").rpartition(".")[0]
    return [name for name in sys.modules if name.startswith(marker + ".")]


def test_the_seed_package_loads(seed_repo):
    assert layer(seed_repo).load()().forward(torch.ones(1)).item() == 2


def test_the_same_class_every_time_and_for_every_source(seed_repo):
    source = layer(seed_repo)
    assert source.load() is source.load() is layer(seed_repo).load()


def test_nothing_is_read_before_the_first_load(tmp_path):
    source = layer(tmp_path / "nowhere")
    assert "my_kernels:Doubled" in source.describe()


def test_sys_path_is_as_it_was(seed_repo):
    before = list(sys.path)
    layer(seed_repo).load()
    assert sys.path == before


def test_the_path_of_the_package_itself_is_as_good(seed_repo):
    assert layer(seed_repo / "my_kernels").load() is layer(seed_repo).load()


def test_a_linked_repository_is_the_same_repository(seed_repo, tmp_path):
    (tmp_path / "link").symlink_to(seed_repo)
    assert layer(tmp_path / "link").load() is layer(seed_repo).load()


def test_a_layers_file_is_enough(write_repo):
    repo = write_repo({"my_kernels/layers.py": "import torch\nclass A(torch.nn.Module): pass\n"})
    assert layer(repo, "A").load().__name__ == "A"


def test_a_single_file_is_a_package_too(write_repo):
    repo = write_repo({"my_kernels.py": "import torch\nclass A(torch.nn.Module): pass\n"})
    assert layer(repo, "A").load().__name__ == "A"


def test_the_layers_module_goes_before_the_package(write_repo):
    text = "import torch\nclass A(torch.nn.Module):\n    home = {!r}\n"
    repo = write_repo(
        {
            "my_kernels/__init__.py": text.format("package") + "class B(A): pass\n",
            "my_kernels/layers.py": text.format("layers"),
        }
    )
    assert layer(repo, "A").load().home == "layers"
    assert layer(repo, "B").load().home == "package"


def test_a_dotted_name_goes_through_submodules(write_repo):
    repo = write_repo(
        {
            "my_kernels/__init__.py": "",
            "my_kernels/norms/__init__.py": "",
            "my_kernels/norms/rms.py": "import torch\nclass RMS(torch.nn.Module): pass\n",
        }
    )
    assert layer(repo, "norms.rms.RMS").load().__name__ == "RMS"


def test_functions_are_found_in_the_package_and_in_its_functions_and_layers(write_repo):
    repo = write_repo(
        {
            "my_kernels/__init__.py": "def a(): return 'package'\n",
            "my_kernels/functions.py": "def a(): return 'functions'\ndef b(): return 'functions'\n",
            "my_kernels/layers.py": "def c(): return 'layers'\n",
        }
    )
    found = [function(repo, name).load()() for name in "abc"]
    assert found == ["package", "functions", "layers"]


def test_a_function_in_a_file_of_its_name_is_the_function_and_not_the_file(write_repo):
    repo = write_repo(
        {
            "my_kernels/__init__.py": "",
            "my_kernels/silu.py": "def silu(x): return x\n",
        }
    )
    assert inspect.isfunction(function(repo, "silu").load())


def test_two_repositories_with_one_package_name_live_side_by_side(write_repo):
    for number in (1, 2):
        write_repo(
            {
                "my_kernels/__init__.py": "from .inner import value",
                "my_kernels/inner.py": f"def value(): return {number}",
            },
            name=f"repo{number}",
        )
    root = write_repo({}, name="repo1").parent
    assert function(root / "repo1", "value").load()() == 1
    assert function(root / "repo2", "value").load()() == 2


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
def test_a_package_imports_its_own_modules_in_every_way(write_repo, text):
    repo = write_repo(
        {
            "my_kernels/__init__.py": "",
            "my_kernels/functions.py": text + "\n",
            "my_kernels/helper.py": "def value(): return 42\n",
        }
    )
    assert function(repo, "f").load()() == 42
    assert "my_kernels" not in sys.modules


def test_an_own_import_never_reaches_an_installed_package_of_that_name(write_repo, site_dir):
    (site_dir / "my_kernels").mkdir()
    (site_dir / "my_kernels" / "__init__.py").write_text("value = 'installed'\n")
    repo = write_repo(
        {"my_kernels/__init__.py": "value = 'own'\nimport my_kernels\ndef f(): return my_kernels.value\n"}
    )
    assert function(repo, "f").load()() == "own"
    assert importlib.import_module("my_kernels").value == "installed"


def test_data_files_are_found(write_repo):
    repo = write_repo(
        {
            "my_kernels/__init__.py": """
                import importlib.resources
                import pathlib
                def f():
                    near = pathlib.Path(__file__).with_name("table.txt").read_text()
                    return near, importlib.resources.files(__package__).joinpath("table.txt").read_text()
            """,
            "my_kernels/table.txt": "7",
        }
    )
    assert function(repo, "f").load()() == ("7", "7")


def test_tracebacks_show_the_real_file_and_its_line(write_repo):
    repo = write_repo({"my_kernels/__init__.py": "import my_kernels\ndef f():\n    return 1 / 0  # here\n"})
    with pytest.raises(ZeroDivisionError) as caught:
        function(repo, "f").load()()
    frame = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (frame.filename, frame.lineno) == (str(repo / "my_kernels" / "__init__.py"), 3)
    assert frame.line == "return 1 / 0  # here"


def test_inspect_finds_the_source(seed_repo):
    assert inspect.getsource(layer(seed_repo).load()).startswith("class Doubled")


def test_nothing_is_written_into_the_repository(seed_repo):
    layer(seed_repo).load()
    assert not list(seed_repo.rglob("__pycache__"))


def test_planted_bytecode_does_not_run(seed_repo, tmp_path):
    import py_compile

    source = seed_repo / "my_kernels" / "layers.py"
    text = source.read_text()
    status = source.stat()
    source.write_text(text.replace("x * 2", "x * 3"))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    py_compile.compile(str(source))
    source.write_text(text)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert layer(seed_repo).load()().forward(torch.ones(1)).item() == 2


def test_pickles_of_a_kernel_load_again(write_repo):
    repo = write_repo({"my_kernels/__init__.py": "class A:\n    pass\ndef f(): return 5\n"})
    f = function(repo, "f").load()
    assert pickle.loads(pickle.dumps(f)) is f


def test_a_process_that_registered_nothing_loads_the_pickle_of_a_kernel(write_repo):
    repo = write_repo({"my_ker-nels é/my_kernels/__init__.py": "def f(): return 5\n"}) / "my_ker-nels é"
    data = pickle.dumps(function(repo, "f").load())
    program = f"import pickle; print(pickle.loads({data!r})())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "5\n"


def test_a_pickle_of_a_kernel_that_others_can_write_is_refused_too(write_repo):
    repo = write_repo({"my_kernels/__init__.py": "def f(): return 5\n"})
    data = pickle.dumps(function(repo, "f").load())
    (repo / "my_kernels").chmod(0o777)
    program = f"import pickle; pickle.loads({data!r})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "chmod" in run.stderr


@pytest.mark.parametrize("path", ["/a", "/a_b/c.d-e", "/a__b", "/é ü", "/a_s_d_x5f_", "/" + "x" * 200])
def test_a_name_holds_its_path(path):
    name = packages.name_of(path, "p")
    assert packages.directory_of(name) == os.path.realpath(path)
    assert all(part.isidentifier() for part in name.split("."))


def test_reload_runs_what_the_file_says_now(write_repo):
    repo = write_repo({"my_kernels/__init__.py": "def f(): return 1\n"})
    source, other = function(repo, "f"), function(repo, "f")
    assert source.load()() == other.load()() == 1
    (repo / "my_kernels" / "__init__.py").write_text("def f(): return 2\n")
    assert source.load()() == 1
    assert source.reload()() == 2
    assert source.load()() == other.load()() == 2


def test_a_reload_that_raises_keeps_the_old_code(write_repo):
    repo = write_repo({"my_kernels/__init__.py": "def f(): return 1\n"})
    source = function(repo, "f")
    old = source.load()
    (repo / "my_kernels" / "__init__.py").write_text("raise ValueError\n")
    with pytest.raises(SourceError):
        source.reload()
    assert source.load() is old
    assert pickle.loads(pickle.dumps(old)) is old


def test_a_package_that_raised_can_be_corrected(write_repo):
    repo = write_repo(
        {"my_kernels/__init__.py": "from . import b\ndef f(): return b.value\n", "my_kernels/b.py": "1 / 0\n"}
    )
    source = function(repo, "f")
    with pytest.raises(SourceError, match="raised on import"):
        source.load()
    (repo / "my_kernels" / "b.py").write_text("value = 3\n")
    assert source.load()() == 3


@pytest.mark.parametrize("broken", ["__init__.py", "layers.py"])
def test_a_package_that_raises_leaves_nothing_in_sys_modules(write_repo, broken):
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


def test_a_broken_submodule_does_not_take_away_what_others_use(write_repo):
    repo = write_repo({"my_kernels/__init__.py": "def f(): pass\n", "my_kernels/layers.py": "1 / 0\n"})
    f = function(repo, "f").load()
    with pytest.raises(SourceError):
        layer(repo).load()
    assert pickle.loads(pickle.dumps(f)) is f


def test_threads_import_once(write_repo):
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


def test_a_kernel_that_needs_itself_while_it_is_imported_is_told_so(write_repo):
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


def test_an_import_hook_sees_the_modules_of_a_kernel(seed_repo):
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


def test_threads_that_need_each_other_s_imports_do_not_wait_for_ever(write_repo, site_dir):
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
def test_a_child_forked_in_the_middle_of_an_import_can_import(write_repo):
    repo = write_repo({"my_kernels/__init__.py": "def f(): return 5\n"})
    with packages._lock:
        child = os.fork()
        if child == 0:
            try:
                os._exit(function(repo, "f").load()())
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5


@pytest.mark.parametrize("text", ["def f(x): return x.sin() + 1", CLASS])
def test_a_function_kernel_compiles_without_a_graph_break(write_repo, text):
    f = function(write_repo({"my_kernels/__init__.py": text}), "f").load()
    compiled = torch.compile(lambda x: f(x) * 2, backend="eager", fullgraph=True)
    x = torch.ones(3)
    assert torch.equal(compiled(x), f(x) * 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_worker_processes_run_a_kernel_of_their_parent(write_repo, tmp_path, method):
    repo = write_repo({"my_kernels/__init__.py": "def square(x): return x * x\n"})
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import multiprocessing
from twinkle.sources.local import LocalSource

if __name__ == "__main__":
    square = LocalSource({str(repo)!r}, "my_kernels", "square", kind="function").load()
    with multiprocessing.get_context({method!r}).Pool(1) as pool:
        print(pool.map(square, range(4)))
"""
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, check=True, env=environ, timeout=100
    )
    assert run.stdout == "[0, 1, 4, 9]\n"
