"""The finder: what it says yes to, and that what it lets through is as it was."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.resources
import importlib.util
import inspect
import pickle
import subprocess
import sys
import sysconfig
import traceback
import warnings
import zipfile
from pathlib import Path

import pytest

from twinkle.hooks.finder import Finder
from twinkle.hooks.imports import watch_module


def finder(exact=(), patterns=()):
    found = Finder(lambda name, module: None)
    found.watch(exact, list(patterns))
    return found


@pytest.mark.parametrize(
    ("name", "watched"),
    [
        ("pkg.exact", True),
        ("pkg.exact.sub", False),
        ("pkg", False),
        ("models.llama.modeling_llama", True),
        ("models.llama.deep.modeling_llama", False),
        ("models.llama.configuration_llama", False),
        ("xmodels.llama.modeling_llama", False),
        ("models_llama_modeling_x", False),
        ("any.depth.at.all.layers", True),
        ("v1_ops", True),
        ("v12_ops", False),
    ],
)
def test_a_name_is_watched_when_it_or_a_pattern_says_so(name, watched):
    found = finder(["pkg.exact"], ["models.*.modeling_*", "any.**.layers", "v?_ops"])
    assert found.is_watched(name) is watched
    assert found.is_watched(name) is watched  # from the cache


def test_a_name_that_is_not_watched_is_declined_without_asking_anyone(monkeypatch):
    found = finder(["pkg.exact"])

    class Untouchable:
        def find_spec(self, *_):
            raise AssertionError("asked")

    monkeypatch.setattr(sys, "meta_path", [found, Untouchable()])
    assert found.find_spec("something.else") is None


def test_the_verdict_follows_what_is_watched():
    found = finder(["first"])
    assert found.is_watched("first")
    assert not found.is_watched("second")
    found.watch(["second"], [])
    assert not found.is_watched("first")
    assert found.is_watched("second")


def test_importlib_util_find_spec_is_never_called(write, calls, monkeypatch):
    write({"tw_pkg/__init__.py": "", "tw_pkg/sub.py": ""})

    def refuse(*_):
        raise AssertionError("it takes the parent's import lock again")

    monkeypatch.setattr(importlib.util, "find_spec", refuse)
    watch_module("tw_pkg.sub", calls)
    importlib.import_module("tw_pkg.sub")
    assert calls == ["tw_pkg.sub"]


def test_the_module_sees_its_own_loader_while_it_runs_and_afterwards(write, calls):
    write({"tw_own.py": "kinds = [type(__loader__), type(__spec__.loader)]"})
    watch_module("tw_own", calls)
    module = importlib.import_module("tw_own")
    assert module.kinds == [importlib.machinery.SourceFileLoader] * 2
    assert type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
    assert module.__loader__ is module.__spec__.loader


def test_a_spec_that_is_only_looked_at_shows_a_loader_of_the_original_class(write, calls):
    write({"tw_looked.py": "x = 1"})
    watch_module("tw_looked", calls)
    spec = importlib.util.find_spec("tw_looked")
    loader = spec.loader
    assert isinstance(loader, importlib.machinery.SourceFileLoader)
    assert loader.get_source("tw_looked") == "x = 1"
    assert not loader.is_package("tw_looked")
    assert loader == importlib.machinery.SourceFileLoader("tw_looked", spec.origin)
    assert pickle.loads(pickle.dumps(loader)).get_filename() == spec.origin
    assert calls == []


def test_a_spec_executed_by_hand_is_reported(write, calls):
    write({"tw_hand.py": "x = 1"})
    watch_module("tw_hand", calls)
    spec = importlib.util.find_spec("tw_hand")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tw_hand"] = module
    spec.loader.exec_module(module)
    assert calls == ["tw_hand"]


def test_the_deprecated_load_module_is_reported(write, calls):
    write({"tw_load.py": "x = 1"})
    watch_module("tw_load", calls)
    loader = importlib.util.find_spec("tw_load").loader
    if not hasattr(loader, "load_module"):
        pytest.skip("gone in this Python")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loader.load_module("tw_load")
    assert calls == ["tw_load"]


def test_source_and_resources_are_found(write, calls):
    write({"tw_res/__init__.py": "def f():\n    return 1\n", "tw_res/data.txt": "hello"})
    watch_module("tw_res", calls)
    module = importlib.import_module("tw_res")
    assert inspect.getsource(module.f) == "def f():\n    return 1\n"
    assert importlib.resources.files("tw_res").joinpath("data.txt").read_text() == "hello"
    assert calls == ["tw_res"]


def test_a_module_in_a_zip(tmp_path, monkeypatch, calls):
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("tw_zipped/__init__.py", "import inspect\ndef f():\n    return 1\n")
        file.writestr("tw_zipped/data.txt", "hello")
    monkeypatch.syspath_prepend(str(archive))
    watch_module("tw_zipped", calls)
    module = importlib.import_module("tw_zipped")
    assert calls == ["tw_zipped"]
    assert inspect.getsource(module.f) == "def f():\n    return 1\n"
    assert importlib.resources.files("tw_zipped").joinpath("data.txt").read_text() == "hello"


def test_an_extension_module(calls):
    if "_zoneinfo" in sys.modules or importlib.util.find_spec("_zoneinfo").origin == "built-in":
        pytest.skip("no extension module to import")
    try:
        watch_module("_zoneinfo", calls)
        module = importlib.import_module("_zoneinfo")
        assert type(module.__spec__.loader) is importlib.machinery.ExtensionFileLoader
        assert calls == ["_zoneinfo"]
    finally:
        sys.modules.pop("_zoneinfo", None)


def test_built_in_and_frozen_modules(python):
    out = python("""
        import sys
        from twinkle.hooks.imports import watch_module
        seen = []
        for name in ("__hello__", "_symtable"):
            sys.modules.pop(name, None)
            watch_module(name, lambda module, name: seen.append(name))
        import __hello__, _symtable
        print(seen, __hello__.__spec__.loader.__name__, _symtable.__spec__.loader.__name__)
    """)
    # before Python 3.11, __hello__ says hello
    assert out.splitlines()[-1] == "['__hello__', '_symtable'] FrozenImporter BuiltinImporter"


def test_a_namespace_package_is_the_same_as_without_a_watch(write, calls):
    write({"tw_plain/part.py": "", "tw_space/part.py": ""})
    plain = importlib.import_module("tw_plain")
    watch_module("tw_space", calls)
    space = importlib.import_module("tw_space")
    assert calls == ["tw_space"]
    assert type(space.__spec__) is importlib.machinery.ModuleSpec
    assert type(space.__loader__) is type(plain.__loader__)
    assert space.__spec__.loader is space.__loader__
    assert vars(space).keys() == vars(plain).keys()
    assert importlib.import_module("tw_space.part").__name__ == "tw_space.part"


def test_a_loader_without_exec_module_keeps_its_way(write, calls, monkeypatch):
    if sys.version_info >= (3, 15):
        pytest.skip("gone in this Python")

    class Old:
        def load_module(self, name):
            module = sys.modules[name] = type(sys)(name)
            module.__loader__ = self
            module.x = 1
            return module

    class OldFinder:
        def find_spec(self, name, path=None, target=None):
            return importlib.machinery.ModuleSpec(name, Old()) if name == "tw_old" else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, OldFinder()])
    watch_module("tw_old", calls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)
        module = importlib.import_module("tw_old")
    assert module.x == 1
    assert calls == ["tw_old"]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python dropped find_module")
def test_a_finder_of_before_find_spec_is_asked(calls, monkeypatch):
    class Loader:
        def create_module(self, spec):
            return None

        def exec_module(self, module):
            module.x = 1

    class Finder:
        def find_module(self, name, path=None):
            return Loader() if name == "tw_ancient" else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder()])
    watch_module("tw_ancient", calls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert importlib.import_module("tw_ancient").x == 1
    assert calls == ["tw_ancient"]


RAISES = """
def fail():
    raise {error}
fail()
"""


@pytest.mark.parametrize("error", ["ValueError('no')", "ImportError('no')", "KeyboardInterrupt()"])
def test_the_traceback_of_a_target_that_raises_is_the_one_without_us(write, calls, error):
    write({"tw_raises.py": RAISES.format(error=error)})

    def lines():
        try:
            import tw_raises  # noqa: F401
        except BaseException:
            return traceback.format_exc()

    plain = lines()
    watch_module("tw_raises", calls)
    assert lines() == plain
    assert calls == []


class Passing(importlib.machinery.SourceFileLoader):
    """A loader with a frame of its own, as pytest's and typeguard's have."""

    def exec_module(self, module):
        super().exec_module(module)


class PassingFinder:
    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and name.startswith("tw_"):
            spec.loader = Passing(spec.loader.name, spec.loader.path)
        return spec


@pytest.mark.skipif(sys.version_info < (3, 11), reason="a raise without arguments restores the old traceback")
def test_the_traceback_through_a_loader_of_someone_else_is_the_one_without_us(write, calls, monkeypatch):
    write({"tw_raises.py": RAISES.format(error="ValueError('no')")})
    monkeypatch.setattr(sys, "meta_path", [PassingFinder(), *sys.meta_path])

    def lines():
        try:
            import tw_raises  # noqa: F401
        except ValueError:
            return traceback.format_exc()

    plain = lines()
    watch_module("tw_raises", calls)
    assert lines() == plain


def test_a_target_that_raises_runs_the_hook_when_it_later_succeeds(write, calls):
    folder = write({"tw_later.py": "raise ValueError"})
    watch_module("tw_later", calls)
    with pytest.raises(ValueError):  # noqa: PT011
        importlib.import_module("tw_later")
    assert "tw_later" not in sys.modules
    assert calls == []
    (folder / "tw_later.py").write_text("x = 'now it works'")
    importlib.invalidate_caches()
    assert importlib.import_module("tw_later").x
    assert calls == ["tw_later"]


def test_a_missing_target_is_missing_as_before(calls):
    watch_module("tw_not_there", calls)
    with pytest.raises(ModuleNotFoundError, match="No module named 'tw_not_there'"):
        importlib.import_module("tw_not_there")


def test_a_warning_of_the_target_points_at_its_importer(write, calls):
    write({"tw_warns.py": "import warnings\nwarnings.warn('old', stacklevel=2)"})
    watch_module("tw_warns", calls)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import tw_warns  # noqa: F401
    assert [Path(one.filename).name for one in caught] == ["test_finder.py"]


def test_a_target_runs_as_a_program(write, tmp_path):
    write({"tw_program.py": "if __name__ == '__main__':\n    print(__spec__.name, __file__[-13:])"})
    code = (
        "import runpy; from twinkle.hooks.imports import watch_module;"
        "watch_module('tw_program', lambda *_: None); runpy.run_module('tw_program', run_name='__main__')"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{root}", "PATH": sysconfig.get_path("scripts")},
        timeout=240,
    )
    assert done.stdout == "tw_program tw_program.py\n", done.stderr
