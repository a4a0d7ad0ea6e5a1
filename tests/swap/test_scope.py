"""What a function is read for instead of called, in the place of which a generated one stands."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
import types
import typing
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest
import torch

from twinkle.swap.functions import dispatcher, put
from twinkle.swap.scope import dispatch_behind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SOURCE = '''
from __future__ import annotations
import torch
from torch import Tensor, nn

Exception = getattr = None  # as a module may: what is generated must not look here

def double(x: Tensor) -> Tensor:
    return x * 2

def act(x: Tensor, bias: float = 0.0) -> Tensor:
    """Scale."""
    return double(x) + bias

def fast_act(x, bias=0.0):
    return torch.add(x, x) + bias

def fast_closed(x):
    return x + x + x

def times(k: float):
    def inner(x: Tensor) -> Tensor:
        return x * k
    return inner

closed = times(3.0)

def caller(x: Tensor) -> Tensor:
    return act(x) + 1

class Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return act(x) + 1
'''

X = torch.ones(2)


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "net_of_scope.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__("net_of_scope")
    yield module
    del sys.modules["net_of_scope"]


@pytest.fixture(params=["never called", "called"])
def patched(request: Any, net: Any, kit: Any) -> Any:
    """The module with a dispatcher for ``act`` and ``closed``, before and after its first call."""
    net.plain = types.SimpleNamespace(act=net.act, closed=net.closed)
    names = set(vars(net))
    for name in ("act", "closed"):
        candidate = kit.function_candidate(getattr(net, f"fast_{name}"), device="cpu")
        put(net, name, dispatcher(getattr(net, name), [candidate]))
    if request.param == "called":
        net.act(X)
        net.closed(X)
    assert set(vars(net)) == names
    return net


@pytest.mark.parametrize(
    "read",
    [
        inspect.signature,
        inspect.getsource,
        inspect.getsourcefile,
        inspect.getfile,
        inspect.getdoc,
        typing.get_type_hints,
        lambda f: f.__globals__ is vars(sys.modules["net_of_scope"]),
        lambda f: (f.__code__.co_name, f.__code__.co_filename, f.__code__.co_firstlineno),
        lambda f: inspect.getclosurevars(f).globals,
        lambda f: torch.library.infer_schema(f, mutates_args=()),
        lambda f: hasattr(f, "__wrapped__"),
    ],
)
def test_it_reads_as_the_original(patched: Any, read: Callable[[Any], Any]) -> None:
    assert read(patched.act) == read(patched.plain.act)


def test_the_cells_of_the_original_are_its_own(patched: Any) -> None:
    assert inspect.getclosurevars(patched.closed).nonlocals["k"] == 3.0
    assert inspect.getsource(patched.closed) == inspect.getsource(patched.plain.closed)


def test_torch_jit_scripts_the_original(patched: Any) -> None:
    wanted = X * 2
    assert torch.equal(torch.jit.script(patched.act)(X), wanted)
    assert torch.equal(torch.jit.script(patched.caller)(X), wanted + 1)
    assert torch.equal(torch.jit.script(patched.Layer())(X), wanted + 1)
    assert torch.equal(torch.jit.trace(patched.act, (X,))(X), wanted)


def test_a_custom_op_is_made_of_it(patched: Any, request: pytest.FixtureRequest) -> None:
    name = f"twinkle_tests::act{len(request.node.name)}"
    assert torch.equal(torch.library.custom_op(name, patched.act, mutates_args=())(X), X * 2)


def test_it_is_pickled_by_reference(patched: Any) -> None:
    assert pickle.loads(pickle.dumps(patched.act)) is patched.act


@pytest.mark.parametrize("name", ["act", "closed"])
def test_cloudpickle_by_value_loads_without_twinkle(patched: Any, name: str, tmp_path: Path) -> None:
    cloudpickle.register_pickle_by_value(patched)
    try:
        data = cloudpickle.dumps(getattr(patched, name))
    finally:
        cloudpickle.unregister_pickle_by_value(patched)
    (tmp_path / "data").write_bytes(data)
    text = "import pickle, sys, torch; sys.modules['twinkle'] = None\n"
    text += "print(pickle.load(open('data', 'rb'))(torch.ones(2)).tolist())"
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(getattr(patched.plain, name)(X).tolist()), done.stderr


def test_torch_fx_traces_through_it(patched: Any) -> None:
    graph = torch.fx.symbolic_trace(patched.Layer())
    assert torch.equal(graph(X), X * 2 + 1)


def test_what_is_behind_it_is_known(patched: Any) -> None:
    assert dispatch_behind(patched.act).original is patched.plain.act
    assert dispatch_behind(patched.plain.act) is None


def test_a_layer_in_the_place_of_a_function_reads_as_the_function(net: Any) -> None:
    class Fast(torch.nn.Module):
        def forward(self, x: torch.Tensor, bias: float = 0.0) -> torch.Tensor:
            return x + x + bias

    plain = net.act
    put(net, "act", Fast)
    assert typing.get_type_hints(net.act) == typing.get_type_hints(plain)
    assert inspect.getsource(net.act) == inspect.getsource(plain)
    assert torch.equal(torch.jit.script(net.act)(X), net.act(X))
