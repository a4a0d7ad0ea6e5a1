"""Copies of a function: whatever holds one gets the kernel, whenever it was made, or is named."""

from __future__ import annotations

import gc
import importlib
import sys
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch

from twinkle.kernel import apply_function_kernel, register_function_kernel, unapply_function_kernel
from twinkle.swap import holders

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twinkle.registry import Registry

pytestmark = pytest.mark.usefixtures("clean_hooks")

FORMS = {
    "dict": ("H = {'f': f}", "H['f']"),
    "ordered": ("H = collections.OrderedDict(z=1, f=f, a=2)", "H['f']"),
    "default": ("H = collections.defaultdict(list)\nH['x'].append(f)", "H['x'][0]"),
    "subclass": ("H = Table(f=f)", "dict.__getitem__(H, 'f')"),
    "list": ("H = [0, f]", "H[1]"),
    "deque": ("H = collections.deque([f])", "H[0]"),
    "set": ("H = {f, 1}", "next(one for one in H if callable(one))"),
    "frozenset": ("H = frozenset([f])", "next(iter(H))"),
    "tuple": ("H = (f, 1)", "H[0]"),
    "nested": ("H = {'a': [{'b': ((f, 1), 2)}]}", "H['a'][0]['b'][0][0]"),
    "attribute": ("class C: pass\nH = C()\nH.act = f", "H.act"),
    "attribute of an attribute": ("class C: pass\nH = C()\nH.sub = C()\nH.sub.acts = [f]", "H.sub.acts[0]"),
    "slot": ("class C:\n    __slots__ = ('act',)\nH = C()\nH.act = f", "H.act"),
    "of a class": ("class H:\n    act = staticmethod(f)\n    pair = (f, 1)", "H.act"),
    "tuple of a class": ("class H:\n    pair = (f, 1)", "H.pair[0]"),
    "class method": ("class H:\n    made = classmethod(f)", "H.made.__func__"),
    "function's attribute": ("def H(): pass\nH.act = f", "H.act"),
    "partial": ("H = functools.partial(f)", "H.func"),
    "inside a partial": ("H = functools.partial(map, f)", "H.args[0]"),
    "keyword of a partial": ("H = functools.partial(sorted, key=f)", "H.keywords['key']"),
    "default argument": ("def H(x, act=f): return act(x)", "H.__defaults__[0]"),
    "keyword default": ("def H(x, *, act=f): return act(x)", "H.__kwdefaults__['act']"),
    "closure": (
        "def made(act):\n    def inner(x): return act(x)\n    return inner\nH = made(f)",
        "H.__closure__[0].cell_contents",
    ),
    "module of torch": ("H = torch.nn.Identity()\nH.act = f", "H.act"),
    "registry": ("H = {}\ndef register(one):\n    H[one.__name__] = one\nregister(f)", "H['f']"),
    "dataclass": ("@dataclasses.dataclass\nclass C:\n    act: object = f\nH = C()", "H.act"),
}
HEAD = """
import collections, dataclasses, functools
import torch

class Table(dict):
    def __getitem__(self, key): raise RuntimeError('runs code of the program')
    __setitem__ = __contains__ = __iter__ = __getitem__

"""
NAMED = {
    "cache": ("H = functools.lru_cache(f)", "functools._lru_cache_wrapper"),
    "key": ("H = {f: 1}", "H (a key)"),
    "named tuple": ("H = collections.namedtuple('N', 'a b')(f, 1)", ".H"),
    "property": ("class H:\n    act = property(f)", "H.act"),
    "frozen": ("@dataclasses.dataclass(frozen=True)\nclass C:\n    rest: object\nH = {C((f, 1)): 1}", None),
}


def kernel(x: Any) -> Any:
    return x + 1


@pytest.fixture
def clean_modules() -> Iterator[None]:
    before = set(sys.modules)
    yield
    unapply_function_kernel()
    for name in set(sys.modules) - before:
        if name.startswith("tw_held"):
            del sys.modules[name]


def world(write: Any, text: str, *, inside: bool) -> Any:
    """The module that holds the function: the one that defines it, or another one."""
    define = "def f(x):\n    return x + 1\n"
    if inside:
        write({"tw_held.py": f"{HEAD}{define}{text}\n"})
        return importlib.import_module("tw_held")
    write({"tw_held.py": define, "tw_held_by.py": f"{HEAD}from tw_held import f\n{text}\n"})
    return importlib.import_module("tw_held_by")


def notes(registry: Registry) -> str:
    return "; ".join(note for binding in registry.bindings for note in binding.notes)


@pytest.mark.parametrize("order", ["inside", "before", "after"])
@pytest.mark.parametrize("form", FORMS)
def test_a_copy_runs_the_kernel_and_is_put_back(
    write: Any, clean_registry: Registry, clean_modules: None, form: str, order: str
) -> None:
    text, where = FORMS[form]
    register_function_kernel("f", "tw_held", func_impl=kernel)
    if order == "after":
        write({"tw_held.py": "def f(x):\n    return x + 1\n"})
        original = importlib.import_module("tw_held").f
        apply_function_kernel("tw_held")
        write({"tw_held_by.py": f"{HEAD}from tw_held import f\n{text}\n"})
        module = importlib.import_module("tw_held_by")
    else:
        module = world(write, text, inside=order == "inside")
        original = module.f
        assert eval(where, vars(module)) is original
        apply_function_kernel("tw_held")
    placed = module.f
    assert placed is not original
    assert eval(where, vars(module)) is placed
    assert "still holds" not in notes(clean_registry)
    assert placed(torch.ones(2)).tolist() == [2, 2]
    unapply_function_kernel("tw_held")
    assert sys.modules["tw_held"].f is original
    if order != "after":
        assert eval(where, vars(module)) is original


@pytest.mark.parametrize("form", NAMED)
def test_a_copy_that_cannot_be_changed_is_named(
    write: Any, clean_registry: Registry, clean_modules: None, form: str
) -> None:
    text, where = NAMED[form]
    world(write, text, inside=False)
    register_function_kernel("f", "tw_held", func_impl=kernel)
    apply_function_kernel("tw_held")
    assert "still holds the original" in notes(clean_registry)
    assert where is None or where in notes(clean_registry)


def test_methods_have_copies_too(write: Any, clean_registry: Registry, clean_modules: None) -> None:
    write(
        {
            "tw_held.py": """
            class Net:
                def act(self, x): return x + 1
                alias = act
            class Other:
                act = Net.act
            g = Net.act
            net = Net()
            bound = [net.act]
            TABLE = {"act": Net.act}
        """
        }
    )
    module = importlib.import_module("tw_held")
    original, bound = module.g, module.bound[0]
    seen = []

    def counted(self: Any, x: Any) -> Any:
        seen.append(type(self).__name__)
        return x + 1

    register_function_kernel("Net.act", "tw_held", func_impl=counted)
    apply_function_kernel("tw_held", mode="train", device="cpu")
    x = torch.ones(1)
    for call in (
        module.net.act,
        module.net.alias,
        module.Other().act,
        module.bound[0],
        lambda x: module.g(module.net, x),
        lambda x: module.TABLE["act"](module.net, x),
    ):
        before = len(seen)
        assert call(x).item() == 2
        assert len(seen) > before
    unapply_function_kernel("tw_held")
    assert module.g is module.Other.act is module.Net.alias is module.TABLE["act"] is original
    assert module.bound[0] is bound


def test_a_place_that_the_program_changed_meanwhile_is_left(
    write: Any, clean_registry: Registry, clean_modules: None
) -> None:
    module = world(write, "H = {'f': f, 'g': f}\nL = [f, 1]\nT = (f, 2)", inside=False)
    original = module.f
    register_function_kernel("f", "tw_held", func_impl=kernel)
    apply_function_kernel("tw_held")
    module.H["g"], module.T = abs, (1, 2)
    module.L.clear()
    unapply_function_kernel("tw_held")
    assert {"f": original, "g": abs} == module.H
    assert module.L == []
    assert module.T == (1, 2)


def test_what_is_to_give_the_original_back_keeps_it(
    write: Any, clean_registry: Registry, clean_modules: None
) -> None:
    module = world(
        write, "@functools.wraps(f)\ndef H(x): return x\n\nspare = functools.partial(f)", inside=False
    )
    original = module.f
    patch = mock.patch.object(module, "spare", original)
    with patch:
        register_function_kernel("f", "tw_held", func_impl=kernel)
        apply_function_kernel("tw_held")
        assert module.H.__wrapped__ is original
        assert patch.new is original


def test_a_kernel_goes_on_with_its_own_tables_of_originals(
    write: Any, clean_registry: Registry, clean_modules: None
) -> None:
    write(
        {
            "tw_held.py": "def f(x):\n    return x + 1\n",
            "tw_held_kernels.py": """
            import tw_held
            ORIGINALS = {"f": tw_held.f}
            def fast(x, plain=tw_held.f):
                return plain(x) + 0 * ORIGINALS["f"](x)
        """,
        }
    )
    module, kernels = importlib.import_module("tw_held"), importlib.import_module("tw_held_kernels")
    original = module.f
    register_function_kernel("f", "tw_held", func_impl=kernels.fast)
    apply_function_kernel("tw_held")
    assert module.f is not original
    assert module.f(torch.ones(1)).item() == 2
    assert kernels.ORIGINALS["f"] is original
    assert kernels.fast.__defaults__ == (original,)


def test_only_what_a_program_holds_is_found() -> None:
    def original(x: Any) -> Any:
        return x

    def other(x: Any) -> Any:
        return x

    local = {"f": original}
    table: dict[str, Any] = {"local": local}
    globals()["_TABLE"] = table
    try:
        held, named = holders.rebind(original, other)
        assert [one.where for one in held] == [f"{__name__}._TABLE['local']['f']"]
        assert named == []
        assert local["f"] is other
        assert all(one.put_back() for one in held)
        assert local["f"] is original
    finally:
        del globals()["_TABLE"]


def test_what_has_collected_objects_for_long_is_no_hindrance(
    write: Any, clean_registry: Registry, clean_modules: None
) -> None:
    module = world(write, "H = {'f': f}\nH['self'] = H\nL = [H, f]\nL.append(L)", inside=False)
    register_function_kernel("f", "tw_held", func_impl=kernel)
    gc.collect()
    apply_function_kernel("tw_held")
    assert module.H["f"] is module.L[1] is module.f
