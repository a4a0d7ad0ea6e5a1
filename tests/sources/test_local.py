"""Plain packages in a directory."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
import traceback

import pytest
import torch

from twinkle.sources import packages

CLASS = """
import torch
class f(torch.nn.Module):
    def forward(self, x):
        return x.sin() + 1
"""


def test_the_seed_package_loads(seed_repo, layer):
    assert layer(seed_repo).load()().forward(torch.ones(1)).item() == 2


def test_the_same_class_every_time_and_for_every_source(seed_repo, layer):
    source = layer(seed_repo)
    assert source.load() is source.load() is layer(seed_repo).load()


def test_nothing_is_read_before_the_first_load(tmp_path, layer):
    source = layer(tmp_path / "nowhere")
    assert "my_kernels:Doubled" in source.describe()


def test_sys_path_is_as_it_was(seed_repo, layer):
    before = list(sys.path)
    layer(seed_repo).load()
    assert sys.path == before


def test_the_path_of_the_package_itself_is_as_good(seed_repo, layer):
    assert layer(seed_repo / "my_kernels").load() is layer(seed_repo).load()


def test_a_linked_repository_is_the_same_repository(seed_repo, tmp_path, layer):
    (tmp_path / "link").symlink_to(seed_repo)
    assert layer(tmp_path / "link").load() is layer(seed_repo).load()


def test_a_layers_file_is_enough(write_repo, layer):
    repo = write_repo({"my_kernels/layers.py": "import torch\nclass A(torch.nn.Module): pass\n"})
    assert layer(repo, "A").load().__name__ == "A"


def test_a_single_file_is_a_package_too(write_repo, layer):
    repo = write_repo({"my_kernels.py": "import torch\nclass A(torch.nn.Module): pass\n"})
    assert layer(repo, "A").load().__name__ == "A"


def test_the_layers_module_goes_before_the_package(write_repo, layer):
    text = "import torch\nclass A(torch.nn.Module):\n    home = {!r}\n"
    repo = write_repo(
        {
            "my_kernels/__init__.py": text.format("package") + "class B(A): pass\n",
            "my_kernels/layers.py": text.format("layers"),
        }
    )
    assert layer(repo, "A").load().home == "layers"
    assert layer(repo, "B").load().home == "package"


def test_a_dotted_name_goes_through_submodules(write_repo, layer):
    repo = write_repo(
        {
            "my_kernels/__init__.py": "",
            "my_kernels/norms/__init__.py": "",
            "my_kernels/norms/rms.py": "import torch\nclass RMS(torch.nn.Module): pass\n",
        }
    )
    assert layer(repo, "norms.rms.RMS").load().__name__ == "RMS"


def test_functions_are_found_in_the_package_and_in_its_functions_and_layers(write_repo, function):
    repo = write_repo(
        {
            "my_kernels/__init__.py": "def a(): return 'package'\n",
            "my_kernels/functions.py": "def a(): return 'functions'\ndef b(): return 'functions'\n",
            "my_kernels/layers.py": "def c(): return 'layers'\n",
        }
    )
    found = [function(repo, name).load()() for name in "abc"]
    assert found == ["package", "functions", "layers"]


def test_a_function_in_a_file_of_its_name_is_the_function_and_not_the_file(write_repo, function):
    repo = write_repo(
        {
            "my_kernels/__init__.py": "",
            "my_kernels/silu.py": "def silu(x): return x\n",
        }
    )
    assert inspect.isfunction(function(repo, "silu").load())


def test_two_repositories_with_one_package_name_live_side_by_side(write_repo, function):
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


def test_data_files_are_found(write_repo, function):
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


def test_tracebacks_show_the_real_file_and_its_line(write_repo, function):
    repo = write_repo({"my_kernels/__init__.py": "import my_kernels\ndef f():\n    return 1 / 0  # here\n"})
    with pytest.raises(ZeroDivisionError) as caught:
        function(repo, "f").load()()
    frame = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (frame.filename, frame.lineno) == (str(repo / "my_kernels" / "__init__.py"), 3)
    assert frame.line == "return 1 / 0  # here"


def test_inspect_finds_the_source(seed_repo, layer):
    assert inspect.getsource(layer(seed_repo).load()).startswith("class Doubled")


def test_nothing_is_written_into_the_repository(seed_repo, layer):
    layer(seed_repo).load()
    assert not list(seed_repo.rglob("__pycache__"))


def test_planted_bytecode_does_not_run(seed_repo, tmp_path, layer):
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


def test_pickles_of_a_kernel_load_again(write_repo, function):
    repo = write_repo({"my_kernels/__init__.py": "class A:\n    pass\ndef f(): return 5\n"})
    f = function(repo, "f").load()
    assert pickle.loads(pickle.dumps(f)) is f


def test_a_process_that_registered_nothing_loads_the_pickle_of_a_kernel(write_repo, function):
    repo = write_repo({"my_ker-nels é/my_kernels/__init__.py": "def f(): return 5\n"}) / "my_ker-nels é"
    data = pickle.dumps(function(repo, "f").load())
    program = f"import pickle; print(pickle.loads({data!r})())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "5\n"


def test_a_pickle_of_a_kernel_that_others_can_write_is_refused_too(write_repo, function):
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


@pytest.mark.parametrize("text", ["def f(x): return x.sin() + 1", CLASS])
def test_a_function_kernel_compiles_without_a_graph_break(write_repo, text, function):
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
        [sys.executable, program], capture_output=True, text=True, check=True, env=environ, timeout=240
    )
    assert run.stdout == "[0, 1, 4, 9]\n"
