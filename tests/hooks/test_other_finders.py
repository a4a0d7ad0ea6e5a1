"""Other finders before and after ours: theirs works, ours works, or it is said that it does not."""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import sys

import pytest
import wrapt

from twinkle.hooks import imports
from twinkle.hooks.imports import watch_module


class Rewriting(importlib.machinery.SourceFileLoader):
    """Compiles every number one to a two: what typeguard's loader does to annotations."""

    def source_to_code(self, data, path, *, _optimization=-1):
        tree = ast.parse(data)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value == 1:
                node.value = 2
        return compile(tree, path, "exec", dont_inherit=True)

    def get_code(self, fullname):
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class Executing(Rewriting):
    """Executes by itself, as pytest's assertion rewriting does."""

    def exec_module(self, module):
        exec(self.get_code(module.__name__), vars(module))


class PathFinding:
    """Asks the path finder itself and nobody else, as typeguard's and jaxtyping's finders do."""

    def __init__(self, name, loader=Executing):
        self.name = name
        self.loader = loader

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        spec.loader = self.loader(spec.loader.name, spec.loader.path)
        return spec


class Delegating:
    """Asks all the finders, itself for the time being left out, as wrapt's finder does."""

    def __init__(self, name):
        self.name = name
        self.busy = False

    def find_spec(self, name, path=None, target=None):
        if name != self.name or self.busy:
            return None
        self.busy = True
        try:
            return importlib.util.find_spec(name)
        finally:
            self.busy = False


@pytest.fixture
def target(write):
    write({"tw_target.py": "value = 1\n", "tw_next.py": ""})


def test_a_rewriting_finder_behind_ours_still_rewrites(target, calls):
    watch_module("tw_target", calls)
    sys.meta_path.insert(1, PathFinding("tw_target", Rewriting))
    module = importlib.import_module("tw_target")
    assert (module.value, calls) == (2, ["tw_target"])
    assert type(module.__loader__) is Rewriting


def test_what_a_finder_before_ours_finds_in_a_file_is_seen_all_the_same(target, calls):
    watch_module("tw_target", calls)
    sys.meta_path.insert(0, PathFinding("tw_target", Rewriting))
    assert importlib.import_module("tw_target").value == 2
    assert calls == ["tw_target"]
    assert imports.missed() == []


@pytest.mark.parametrize("entered", [True, False])
def test_a_module_that_is_executed_by_hand_is_seen(write, calls, entered):
    folder = write({"elsewhere/some.py": "value = 1\n"})
    watch_module("tw_by_hand", calls)
    spec = importlib.util.spec_from_file_location("tw_by_hand", folder / "elsewhere/some.py")
    module = importlib.util.module_from_spec(spec)
    if entered:
        sys.modules["tw_by_hand"] = module
    for count in (1, 2):
        spec.loader.exec_module(module)  # anew, as remote code is at each from_pretrained
        assert calls == ["tw_by_hand"] * count


def test_the_import_system_has_its_own_method_back():
    before = importlib.machinery.SourceFileLoader.exec_module
    installed = imports.install()
    assert importlib.machinery.SourceFileLoader.exec_module is not before
    installed.uninstall()
    assert importlib.machinery.SourceFileLoader.exec_module is before


def test_a_finder_before_ours_that_asks_nobody_is_detected(target, calls):
    watch_module("tw_target", calls)
    sys.meta_path.insert(0, PathFinding("tw_target"))
    assert importlib.import_module("tw_target").value == 2
    assert calls == []
    assert imports.missed() == ["tw_target"]
    assert imports.catch_up() == ["tw_target"]
    assert calls == ["tw_target"]
    assert imports.missed() == []
    assert "PathFinding" in imports.bypassed()["tw_target"]
    assert "Executing" in imports.bypassed()["tw_target"]


def test_a_bypassed_target_is_patched_at_the_end_of_the_next_import(target, calls):
    watch_module("tw_target", calls)
    sys.meta_path.insert(0, PathFinding("tw_target"))
    importlib.import_module("tw_target")
    importlib.import_module("tw_next")
    assert calls == ["tw_target"]
    assert list(imports.bypassed()) == ["tw_target"]


def test_a_second_bypassed_target_is_patched_too(write, calls):
    write({f"tw_{name}.py": "" for name in ("first", "second", "a", "b", "c")})
    watch_module("tw_first", calls)
    watch_module("tw_sec*", calls)
    sys.meta_path.insert(0, PathFinding("tw_first"))
    sys.meta_path.insert(0, PathFinding("tw_second"))
    for name in ("first", "a", "b", "second", "c"):
        importlib.import_module(f"tw_{name}")
    assert calls == ["tw_first", "tw_second"]


def test_a_bypassed_target_that_imports_is_patched_when_it_is_finished(write):
    write(
        {
            "tw_target.py": "value = 1\nimport tw_inner\nlast = 1\n",
            "tw_inner.py": "",
            "tw_next.py": "",
        }
    )
    seen = []
    watch_module("tw_target", lambda module, name: seen.append("last" in vars(module)))
    sys.meta_path.insert(0, PathFinding("tw_target"))
    importlib.import_module("tw_target")
    importlib.import_module("tw_next")
    assert seen == [True]


def test_no_module_is_taken_for_bypassed_while_ours_is_first(write, calls):
    write({"tw_makes.py": "import sys, types\nsys.modules['tw_made'] = types.ModuleType('tw_made')"})
    watch_module("tw_made", calls)
    importlib.import_module("tw_makes")
    assert imports.missed() == ["tw_made"]
    assert imports.bypassed() == {}


@pytest.mark.parametrize("place", [0, 1])
def test_a_delegating_finder_before_or_after_ours(target, calls, place):
    watch_module("tw_target", calls)
    sys.meta_path.insert(place, Delegating("tw_target"))
    module = importlib.import_module("tw_target")
    assert calls == ["tw_target"]
    assert type(module.__loader__) is importlib.machinery.SourceFileLoader


class Chained(importlib.machinery.SourceFileLoader):
    def __init__(self, loader):
        self.loader = loader

    def exec_module(self, module):
        self.loader.exec_module(module)


class Vendored(Delegating):
    """A copy of wrapt inside another package: it wraps the loader that the other finders give."""

    def find_spec(self, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        if spec is not None:
            spec.loader = Chained(spec.loader)
        return spec


@pytest.mark.parametrize("place", [0, 1])
def test_a_vendored_copy_of_wrapt_before_or_after_ours(target, calls, place):
    watch_module("tw_target", calls)
    sys.meta_path.insert(place, Vendored("tw_target"))
    importlib.import_module("tw_target")
    assert calls == ["tw_target"]


@pytest.mark.parametrize("place", [0, 1])
def test_a_finder_is_asked_once_and_as_the_import_system_asks(write, calls, place):
    write({"tw_pkg/__init__.py": "", "tw_pkg/sub.py": ""})
    asked = []

    class Asked:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("tw_"):
                asked.append((name, path and list(path), target))

    watch_module("tw_pkg.sub", calls)
    sys.meta_path.insert(place, Asked())
    module = importlib.import_module("tw_pkg.sub")
    importlib.reload(module)
    path = list(sys.modules["tw_pkg"].__path__)
    assert asked == [("tw_pkg", None, None), ("tw_pkg.sub", path, None), ("tw_pkg.sub", path, module)]


def test_a_path_hook_rewrites_as_before(target, calls):
    """beartype's way: no finder of its own but a hook in sys.path_hooks."""
    hook = importlib.machinery.FileFinder.path_hook((Rewriting, [".py"]))
    sys.path_hooks.insert(0, hook)
    try:
        sys.path_importer_cache.clear()
        watch_module("tw_target", calls)
        assert importlib.import_module("tw_target").value == 2
        assert calls == ["tw_target"]
    finally:
        sys.path_hooks.remove(hook)
        sys.path_importer_cache.clear()


def test_a_program_that_pops_its_own_finder_pops_its_own(target, calls):
    watch_module("tw_target", calls)
    theirs = PathFinding("tw_other")
    sys.meta_path.insert(0, theirs)
    importlib.import_module("tw_next")
    assert sys.meta_path.pop(0) is theirs


@pytest.fixture
def theirs():
    """A hook of someone else, and an end to what it leaves in wrapt's table."""
    seen = []
    yield seen
    for name in [name for name in wrapt.importer._post_import_hooks if name.startswith("tw_")]:
        del wrapt.importer._post_import_hooks[name]


def their_finder():
    if not any(type(one).__name__ == "ImportHookFinder" for one in sys.meta_path):
        sys.meta_path.insert(0, wrapt.importer.ImportHookFinder())


def test_hooks_registered_with_wrapt_before_ours_run_once(target, calls, theirs):
    their_finder()
    wrapt.register_post_import_hook(theirs.append, "tw_target")
    watch_module("tw_target", calls)  # in front of wrapt's
    module = importlib.import_module("tw_target")
    assert calls == ["tw_target"]
    assert theirs == [module]


def test_hooks_registered_with_wrapt_after_ours_run_once(target, calls, theirs):
    watch_module("tw_target", calls)
    their_finder()
    wrapt.register_post_import_hook(theirs.append, "tw_target")
    module = importlib.import_module("tw_target")
    assert calls == ["tw_target"]
    assert theirs == [module]
    assert type(module.__loader__) is importlib.machinery.SourceFileLoader


def test_hooks_of_wrapt_on_other_modules_run(target, calls, theirs):
    their_finder()
    watch_module("tw_target", calls)
    wrapt.register_post_import_hook(theirs.append, "tw_next")
    importlib.import_module("tw_target")
    module = importlib.import_module("tw_next")
    assert theirs == [module]


def test_hooks_registered_with_wrapt_after_our_first_match_run_once(python, write):
    folder = write({"tw_target.py": "", "tw_next.py": ""})
    out = python(
        """
        from twinkle.hooks.imports import watch_module
        seen = []
        watch_module("tw_*", lambda module, name: seen.append(("ours", name)))
        import tw_target
        import wrapt
        wrapt.register_post_import_hook(lambda module: seen.append(("theirs", module.__name__)), "tw_next")
        import tw_next
        print(seen)
        """,
        path=str(folder),
    )
    assert out == "[('ours', 'tw_target'), ('ours', 'tw_next'), ('theirs', 'tw_next')]\n"


def test_a_hook_of_someone_else_that_raises_fails_the_import_as_it_does_without_us(target, calls, theirs):
    def broken(module):
        raise ZeroDivisionError

    watch_module("tw_target", calls)
    wrapt.register_post_import_hook(broken, "tw_target")
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("tw_target")
    assert calls == ["tw_target"]


def test_ours_runs_where_wrapt_is_missing(python, write):
    folder = write({"tw_target.py": ""})
    out = python(
        """
        import sys
        sys.modules["wrapt"] = None
        from twinkle.hooks.imports import watch_module
        watch_module("tw_target", lambda module, name: print(name))
        import tw_target
        """,
        path=str(folder),
    )
    assert out == "tw_target\n"


@pytest.mark.parametrize("ours_first", [True, False])
def test_the_assertions_of_a_watched_module_are_rewritten_by_pytest(python, write, ours_first):
    folder = write(
        {
            "tw_plugin.py": """
            from twinkle.hooks.imports import watch_module
            seen = []
            watch_module("tw_helper", lambda module, name: seen.append(name))
            watch_module("test_tw_inner", lambda module, name: seen.append(name))
        """,
            "tw_helper.py": "def check(found):\n    assert found == 2\n",
            "test_tw_inner.py": """
            import pytest
            import tw_helper, tw_plugin
            from twinkle.hooks import imports
            def test_inner():
                with pytest.raises(AssertionError, match="assert 1 == 2"):
                    tw_helper.check(1)
                imports.catch_up()
                print(tw_plugin.seen)
                assert sorted(tw_plugin.seen) == ["test_tw_inner", "tw_helper"]
        """,
            "conftest.py": """
            import sys
            import pytest
            pytest.register_assert_rewrite("tw_helper")
            import tw_plugin
            from twinkle.hooks.finder import Finder
            at = 0 if {first} else len(sys.meta_path)
            ours = next(one for one in sys.meta_path if isinstance(one, Finder))
            sys.meta_path.remove(ours)
            rewriter = next(i for i, one in enumerate(sys.meta_path) if "Rewriting" in type(one).__name__)
            sys.meta_path.insert(rewriter + (0 if {first} else 1), ours)
        """.replace("{first}", str(ours_first)),
        }
    )
    out = python(
        """
        import sys, pytest
        options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", sys.path[1]]
        sys.exit(pytest.main([*options, sys.path[1]]))
        """,
        path=str(folder),
    )
    assert "1 passed" in out


def test_typeguard_before_and_after_ours(write, calls):
    typeguard = pytest.importorskip("typeguard")
    write({f"tw_typed_{i}.py": "def f(x: int) -> int:\n    return x\n" for i in range(2)})
    watch_module("tw_typed_*", calls)
    with typeguard.install_import_hook(["tw_typed_0"]):
        first = importlib.import_module("tw_typed_0")
    hook = typeguard.install_import_hook(["tw_typed_1"])
    finder = sys.meta_path.pop(0)
    sys.meta_path.insert(1, finder)
    second = importlib.import_module("tw_typed_1")
    hook.uninstall()
    imports.catch_up()
    assert sorted(calls) == ["tw_typed_0", "tw_typed_1"]
    for module in (first, second):
        with pytest.raises(typeguard.TypeCheckError):
            module.f("no int")


def test_beartype_with_ours(python, write):
    pytest.importorskip("beartype")
    folder = write({"tw_bear/__init__.py": "", "tw_bear/typed.py": "def f(x: int) -> int:\n    return x\n"})
    out = python(
        """
        from beartype.claw import beartype_package
        from twinkle.hooks.imports import watch_module
        watch_module("tw_bear.typed", lambda module, name: print(name))
        beartype_package("tw_bear")
        import tw_bear.typed
        try:
            tw_bear.typed.f("no int")
        except Exception as error:
            print(type(error).__name__)
        """,
        path=str(folder),
    )
    assert out == "tw_bear.typed\nBeartypeCallHintParamViolation\n"
