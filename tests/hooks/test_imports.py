"""Watches: when callbacks run, how often, and that they harm nobody."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from twinkle.errors import TwinkleWarning
from twinkle.hooks import guard, imports
from twinkle.hooks.imports import watch_module


def test_an_exact_target_is_reported_once_when_it_is_imported(write, calls):
    write({"tw_exact.py": ""})
    watch_module("tw_exact", calls)
    assert calls == []
    importlib.import_module("tw_exact")
    importlib.import_module("tw_exact")
    assert calls == ["tw_exact"]


def test_a_pattern_reports_each_module_it_means(write, calls):
    write({f"tw_models/{name}.py": "" for name in ("__init__", "modeling_a", "modeling_b", "other")})
    watch_module("tw_models.modeling_*", calls)
    for name in ("other", "modeling_a", "modeling_b"):
        importlib.import_module(f"tw_models.{name}")
    assert calls == ["tw_models.modeling_a", "tw_models.modeling_b"]


def test_the_callback_sees_the_finished_module_before_anyone_else(write):
    write({"tw_target.py": "def f(): return 1", "tw_user.py": "from tw_target import f\nfound = f()"})
    watch_module("tw_target", lambda module, name: setattr(module, "f", lambda: 2))
    assert importlib.import_module("tw_user").found == 2


def test_a_module_that_is_imported_already_is_reported_at_once(write, calls):
    write({"tw_there.py": ""})
    importlib.import_module("tw_there")
    watch_module("tw_there", calls)
    assert calls == ["tw_there"]


def test_modules_of_a_pattern_that_are_imported_already_are_reported_at_once(write, calls):
    write({"tw_some/__init__.py": "", "tw_some/x_a.py": "", "tw_some/x_b.py": ""})
    importlib.import_module("tw_some.x_a")
    watch_module("tw_some.x_*", calls)
    assert calls == ["tw_some.x_a"]
    importlib.import_module("tw_some.x_b")
    assert calls == ["tw_some.x_a", "tw_some.x_b"]


def test_a_watch_from_within_the_module_runs_when_the_module_is_finished(write):
    write(
        {
            "tw_within.py": """
            from twinkle.hooks.imports import watch_module
            seen = []
            watch_module("tw_within", lambda module, name: seen.append("last" in vars(module)))
            assert seen == []
            last = 1
        """
        }
    )
    assert importlib.import_module("tw_within").seen == [True]


def test_a_watch_from_within_a_module_that_then_raises_does_not_run(write, calls, monkeypatch):
    write(
        {
            "tw_fails.py": """
            from twinkle.hooks.imports import watch_module
            import tw_fails_calls
            watch_module("tw_fails", tw_fails_calls.calls)
            raise ValueError
        """,
            "tw_fails_calls.py": "",
        }
    )
    importlib.import_module("tw_fails_calls").calls = calls
    with pytest.raises(ValueError):  # noqa: PT011
        importlib.import_module("tw_fails")
    assert calls == []


def test_reload_runs_the_callback_again_on_the_same_module(write):
    seen = []
    write({"tw_again.py": "def f(): return 1"})

    def patch(module, name):
        seen.append(module)
        module.f = lambda: 2

    watch_module("tw_again", patch)
    module = importlib.import_module("tw_again")
    assert importlib.reload(module) is module
    assert seen == [module, module]
    assert module.f() == 2


def test_reload_of_a_module_imported_before_the_watch_runs_the_callback(write, calls):
    write({"tw_before.py": ""})
    module = importlib.import_module("tw_before")
    watch_module("tw_before", calls)
    importlib.reload(module)
    assert calls == ["tw_before", "tw_before"]


def test_a_module_removed_and_imported_again_is_reported_again(write, calls):
    write({"tw_twice.py": ""})
    watch_module("tw_twice", calls)
    importlib.import_module("tw_twice")
    del sys.modules["tw_twice"]
    importlib.import_module("tw_twice")
    assert calls == ["tw_twice", "tw_twice"]


def test_what_stands_in_sys_modules_is_handed_over(write):
    write(
        {
            "tw_replaced.py": """
            import sys, types
            class Lazy(types.ModuleType):
                def __getattr__(self, name):
                    if name.startswith("__"):
                        raise AttributeError(name)
                    raise RuntimeError(f"{name} was loaded")
            sys.modules[__name__] = Lazy(__name__)
        """
        }
    )
    seen = []
    watch_module("tw_replaced", lambda module, name: seen.append(module))
    importlib.import_module("tw_replaced")
    assert seen == [sys.modules["tw_replaced"]]
    assert type(seen[0]).__name__ == "Lazy"
    assert imports.missed() == []


def lazily(name):
    spec = importlib.util.find_spec(name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_a_module_of_lazyloader_is_reported_when_it_loads(write, calls):
    write({"tw_lazy.py": "x = 1"})
    watch_module("tw_lazy", calls)
    module = lazily("tw_lazy")
    assert calls == []
    assert module.x == 1
    assert calls == ["tw_lazy"]


def test_a_lazy_module_that_was_there_before_the_watch_stays_lazy_and_is_reported_when_it_loads(write, calls):
    write({"tw_lazier.py": "x = 1"})
    module = lazily("tw_lazier")
    watch_module("tw_lazier", calls)
    assert imports.missed() == []
    assert calls == []
    assert type(module).__name__ == "_LazyModule"
    assert module.x == 1
    assert calls == ["tw_lazier"]


def test_a_finder_that_makes_modules_lazy_is_followed(write, calls, monkeypatch):
    write({"tw_laziest.py": "x = 1"})

    class Lazily:
        def find_spec(self, name, path=None, target=None):
            if name != "tw_laziest":
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            spec.loader = importlib.util.LazyLoader(spec.loader)
            return spec

    monkeypatch.setattr(sys, "meta_path", [Lazily(), *sys.meta_path])
    watch_module("tw_laziest", calls)
    module = importlib.import_module("tw_laziest")
    assert calls == []
    assert module.x == 1
    assert calls == ["tw_laziest"]


def test_a_namespace_package_is_reported_and_its_modules_are(write, calls):
    write({"tw_names/part.py": ""})
    watch_module("tw_names", calls)
    watch_module("tw_names.*", calls)
    importlib.import_module("tw_names.part")
    assert calls == ["tw_names", "tw_names.part"]


def test_a_namespace_package_that_is_there_already_is_reported_at_once(write, calls):
    write({"tw_names_there/part.py": ""})
    importlib.import_module("tw_names_there.part")
    watch_module("tw_names_there", calls)
    assert calls == ["tw_names_there"]


def test_a_hook_that_raises_leaves_the_program_alone(write, calls):
    write({"tw_broken.py": "x = 1"})

    def broken(module, name):
        raise ZeroDivisionError("oops")

    heard = []
    guard.on_failure(heard.append)
    watch_module("tw_broken", broken, owner="a test")
    watch_module("tw_broken", calls)
    with pytest.warns(TwinkleWarning, match=r"a hook of a test on module tw_broken.*oops") as caught:
        assert importlib.import_module("tw_broken").x == 1
    assert len(caught) == 1
    assert calls == ["tw_broken"]
    assert [one.kind for one in heard] == [ZeroDivisionError]
    assert guard.failures() == tuple(heard)


def test_a_hook_that_raises_leaves_the_program_alone_under_w_error(python, write):
    folder = write({"tw_strict.py": "x = 1"})
    out = python(
        """
        from twinkle.hooks.imports import watch_module
        watch_module("tw_strict", lambda module, name: 1 / 0)
        import tw_strict
        print(tw_strict.x)
        """,
        "-Werror",
        path=str(folder),
    )
    assert out == "1\n"


def test_a_strict_hook_that_raises_fails_the_import(write):
    write({"tw_typed.py": ""})
    watch_module("tw_typed", lambda module, name: 1 / 0, strict=True)
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("tw_typed")


def test_a_cancelled_watch_is_silent(write, calls):
    write({"tw_cancelled.py": ""})
    watch = watch_module("tw_cancelled", calls)
    watch.cancel()
    watch.cancel()
    importlib.import_module("tw_cancelled")
    assert calls == []


def test_a_callback_may_watch_and_import(write, calls):
    write({"tw_one.py": "", "tw_two.py": ""})

    def callback(module, name):
        watch_module("tw_two", calls)
        importlib.import_module("tw_two")

    watch_module("tw_one", callback)
    importlib.import_module("tw_one")
    assert calls == ["tw_two"]


def test_install_and_uninstall_may_be_repeated(write, calls):
    before = list(sys.meta_path)
    imports.install()
    imports.install()
    assert len(sys.meta_path) == len(before) + 1
    imports.uninstall()
    imports.uninstall()
    assert sys.meta_path == before


def test_the_handle_of_install_is_a_context(write, calls):
    write({"tw_context.py": ""})
    before = list(sys.meta_path)
    with imports.install():
        watch_module("tw_context", calls)
    importlib.import_module("tw_context")
    assert calls == []
    assert sys.meta_path == before


def test_the_handle_of_install_takes_back_only_its_own(write, calls):
    write({"tw_outer.py": "", "tw_inner.py": ""})
    watch_module("tw_outer", calls)
    with imports.install() as handle:
        watch_module("tw_inner", calls)
    importlib.import_module("tw_outer")
    importlib.import_module("tw_inner")
    assert calls == ["tw_outer"]
    watch_module("tw_inner", calls)
    handle.uninstall()
    importlib.reload(sys.modules["tw_inner"])
    assert calls == ["tw_outer", "tw_inner", "tw_inner"]


def test_install_comes_back_when_someone_has_replaced_meta_path(write, calls):
    write({"tw_back.py": ""})
    before = list(sys.meta_path)
    watch_module("tw_back", calls)
    sys.meta_path[:] = before
    imports.install()
    importlib.import_module("tw_back")
    assert calls == ["tw_back"]


def test_a_target_of_wrapt_itself_is_reported(python):
    out = python("""
        from twinkle.hooks.imports import watch_module
        seen = []
        for name in ("asyncio", "wrapt", "wrapt.importer", "importlib.metadata"):
            watch_module(name, lambda module, name: seen.append(name))
        import wrapt
        print(sorted(seen))
    """)
    assert out == "['asyncio', 'importlib.metadata', 'wrapt', 'wrapt.importer']\n"
