"""Functions and methods put in place, dispatched and taken out."""

from __future__ import annotations

import functools
import inspect
import pickle
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from twinkle.errors import KernelError, TwinkleWarning
from twinkle.swap.functions import dispatcher, function_at, put, take_out

SOURCE = '''
"""A module to patch."""
import functools

def scale(x, factor=2, *, bias=0):
    """Scale and shift."""
    return x * factor + bias

def first(items, x=None):
    return 0

class Base:
    def inherited(self, x):
        return "original", x

class Ops(Base):
    def method(self, x):
        return "original", x

    @staticmethod
    def static(x):
        return "original", x

    @classmethod
    def make(cls, x):
        return cls.__name__, x

    @property
    def prop(self):
        return 1

number = 3
'''


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = types.ModuleType("ops_of_tests")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(SOURCE, module.__dict__)
    return module


def times(factor: float) -> Any:
    def kernel(x: Any, factor: float = 2, *, bias: float = 0, _by: float = factor) -> Any:
        return x * _by

    return kernel


def test_a_function_is_put_in_place_as_it_is_and_taken_out(ops: Any) -> None:
    original, kernel = ops.scale, times(10)
    placement = put(ops, "scale", kernel)
    assert ops.scale is kernel
    assert placement.original is original
    assert placement.implementation is kernel
    assert take_out(placement)
    assert ops.scale is original
    assert not take_out(placement)


def test_what_someone_else_put_there_later_stays(ops: Any) -> None:
    placement = put(ops, "scale", times(10))
    theirs = ops.scale = times(20)
    assert placement.displaced
    assert not take_out(placement)
    assert ops.scale is theirs


def test_a_method_binds_its_instance(ops: Any) -> None:
    def method(self: Any, x: Any) -> Any:
        return type(self).__name__, x

    placement = put(ops, "Ops.method", method)
    assert ops.Ops().method(1) == ("Ops", 1)
    take_out(placement)
    assert ops.Ops().method(1) == ("original", 1)


def test_a_callable_that_is_no_function_binds_its_instance_too(ops: Any) -> None:
    put(ops, "Ops.method", functools.partial(lambda tag, self, x: (tag, type(self).__name__, x), "partial"))
    assert ops.Ops().method(1) == ("partial", "Ops", 1)


def test_a_static_method_stays_one(ops: Any) -> None:
    before = vars(ops.Ops)["static"]
    placement = put(ops, "Ops.static", lambda x: ("kernel", x))
    assert ops.Ops.static(1) == ops.Ops().static(1) == ("kernel", 1)
    take_out(placement)
    assert vars(ops.Ops)["static"] is before


def test_a_class_method_stays_one(ops: Any) -> None:
    placement = put(ops, "Ops.make", lambda cls, x: (cls, x))
    assert ops.Ops.make(1) == (ops.Ops, 1)
    take_out(placement)
    assert ops.Ops.make(1) == ("Ops", 1)


def test_an_inherited_method_is_inherited_again(ops: Any) -> None:
    placement = put(ops, "Ops.inherited", lambda self, x: ("kernel", x))
    assert ops.Ops().inherited(1) == ("kernel", 1)
    assert ops.Base().inherited(1) == ("original", 1)
    take_out(placement)
    assert "inherited" not in vars(ops.Ops)
    assert ops.Ops().inherited(1) == ("original", 1)


def test_a_function_that_a_lazy_module_makes_is_made_again(ops: Any) -> None:
    ops.__getattr__ = lambda name: ops.scale if name == "lazy" else None
    placement = put(ops, "lazy", times(10))
    assert ops.lazy(1) == 10
    take_out(placement)
    assert "lazy" not in vars(ops)


@pytest.mark.parametrize("name", ["Ops.prop", "number"])
def test_what_cannot_be_called_is_refused(ops: Any, name: str) -> None:
    with pytest.raises(KernelError, match="is no function"):
        put(ops, name, times(10))


@pytest.mark.parametrize(("name", "hint"), [("scael", "scale"), ("Ops.mehtod", "method"), ("Oops.x", "Ops")])
def test_a_misspelt_name_gets_a_hint(ops: Any, name: str, hint: str) -> None:
    with pytest.raises(KernelError, match=f"did you mean '{hint}'"):
        function_at(ops, name)


def test_another_signature_is_refused(ops: Any) -> None:
    with pytest.raises(KernelError, match="'factor'"):
        put(ops, "scale", lambda x: x)
    assert ops.scale(1) == 2


def test_a_layer_class_is_made_once_and_called(ops: Any) -> None:
    made = []

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

        def forward(self, x: Any, factor: float = 2, *, bias: float = 0) -> Any:
            return "layer", x, factor, bias

    placement = put(ops, "scale", Layer)
    assert ops.scale(1, bias=3) == ops.scale(x=1, bias=3) == ("layer", 1, 2, 3)
    assert len(made) == 1
    assert isinstance(ops.scale, types.FunctionType)
    assert placement.implementation is ops.scale


def test_a_layer_class_that_wants_arguments_is_refused(ops: Any) -> None:
    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()

        def forward(self, x: Any, factor: float = 2, *, bias: float = 0) -> Any:
            return x

    with pytest.raises(KernelError, match="cannot be made"):
        put(ops, "scale", Layer)


def test_a_dispatcher_looks_like_the_original(kit: Any, ops: Any) -> None:
    made = dispatcher(ops.scale, [kit.function_candidate(times(10), device="cpu")])
    made(kit.x)
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__", "__defaults__"):
        assert getattr(made, name) == getattr(ops.scale, name)
    assert inspect.signature(made) == inspect.signature(ops.scale)
    assert not hasattr(made, "__wrapped__")


def test_a_dispatcher_over_a_decorated_function_shows_the_inner_signature(kit: Any, ops: Any) -> None:
    inner = ops.scale

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    made = dispatcher(outer, [kit.function_candidate(times(10), device="cpu")])
    assert inspect.signature(made) == inspect.signature(inner)
    assert not hasattr(made, "__wrapped__")
    assert torch.equal(made(kit.x, factor=5), kit.x * 10)


def test_a_dispatcher_is_pickled_by_reference(kit: Any, ops: Any) -> None:
    put(ops, "scale", dispatcher(ops.scale, [kit.function_candidate(times(10), device="cpu")]))
    assert pickle.loads(pickle.dumps(ops.scale)) is ops.scale


def test_a_dispatcher_follows_the_device(kit: Any, ops: Any) -> None:
    made = dispatcher(
        ops.scale,
        [kit.function_candidate(times(10), device="cpu"), kit.function_candidate(times(7), device="cuda")],
    )
    assert torch.equal(made(kit.x), kit.x * 10)
    assert made(kit.x.to("meta")).is_meta
    assert made(3) == 6


def test_a_dispatcher_follows_gradients(kit: Any, ops: Any) -> None:
    made = dispatcher(
        ops.scale,
        [kit.function_candidate(times(10), mode="train"), kit.function_candidate(times(7), mode="inference")],
    )
    for _ in range(2):
        assert torch.equal(made(kit.x), kit.x * 10)
        with torch.no_grad():
            assert torch.equal(made(kit.x), kit.x * 7)


def test_a_dispatcher_knows_inference_only_kernels(kit: Any, ops: Any) -> None:
    made = dispatcher(ops.scale, [kit.function_candidate(times(7), mode="inference")])
    assert torch.equal(made(kit.x), kit.x * 2)


def test_parameters_may_have_the_names_of_our_own_attributes(kit: Any) -> None:
    def plain(items: Any, _original: Any, _dispatch: Any) -> Any:
        return "original"

    wanted = kit.function_candidate(lambda items, _original, _dispatch: [items, _original, _dispatch])
    made = dispatcher(plain, [wanted])
    assert [made(1, 2, 3), made(1, 2, _dispatch=3)] == [[1, 2, 3], [1, 2, 3]]


def test_the_tensor_need_not_come_first(kit: Any, ops: Any) -> None:
    made = dispatcher(ops.first, [kit.function_candidate(lambda items, x=None: 1, device="cpu")])
    assert [made([], kit.x), made([], kit.x), made([kit.x]), made([]), made(items=[], x=kit.x)] == [
        1,
        1,
        1,
        0,
        1,
    ]


def test_a_method_can_be_dispatched(kit: Any, ops: Any) -> None:
    wanted = kit.function_candidate(lambda self, x: ("kernel", x), device="cpu")
    put(ops, "Ops.method", dispatcher(function_at(ops, "Ops.method"), [wanted]))
    assert ops.Ops().method(kit.x)[0] == "kernel"
    assert ops.Ops().method(1)[0] == "original"


def test_a_builtin_can_be_dispatched(kit: Any) -> None:
    made = dispatcher(torch.add, [kit.function_candidate(lambda *a, **k: "kernel", device="cpu")])
    assert made(kit.x, kit.x) == "kernel"
    assert made(kit.x.to("meta"), 1).is_meta


def test_a_kernel_that_raises_at_its_first_call_is_quarantined(kit: Any, ops: Any) -> None:
    def bad(x: Any, factor: float = 2, *, bias: float = 0) -> Any:
        raise ValueError("never")

    wanted = kit.function_candidate(bad, device="cpu")
    made = dispatcher(ops.scale, [wanted])
    with pytest.warns(TwinkleWarning, match="never"):
        assert torch.equal(made(kit.x), kit.x * 2)
    assert wanted.binding.state == "quarantined"
    assert torch.equal(made(kit.x), kit.x * 2)


def test_a_kernel_with_another_signature_fails(kit: Any, ops: Any) -> None:
    wanted = kit.function_candidate(lambda y: y, device="cpu")
    made = dispatcher(ops.scale, [wanted])
    with pytest.warns(TwinkleWarning, match="stands where the original has 'x'"):
        made(kit.x)
    assert wanted.binding.state == "failed"


def test_kernels_are_loaded_at_the_first_call_on_their_device(kit: Any, ops: Any) -> None:
    wanted = kit.function_candidate(times(10), device="cpu")
    made = dispatcher(ops.scale, [wanted])
    made(kit.x.to("meta"))
    assert wanted.kernel.source.loads == 0
    made(kit.x)
    made(kit.x)
    assert wanted.kernel.source.loads == 1


@pytest.mark.parametrize("ran", [True, False])
def test_a_dispatcher_under_a_compiler(kit: Any, ops: Any, ran: bool) -> None:
    def kernel(x: Any, factor: float = 2, *, bias: float = 0) -> Any:
        return torch.tanh(x)

    put(ops, "scale", dispatcher(ops.scale, [kit.function_candidate(kernel, device="cpu")]))
    if ran:
        ops.scale(kit.x)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.scale(x) + ops.scale(x + 1), backend=backend, fullgraph=True)
    out = compiled(kit.x)
    assert torch.equal(compiled(kit.x), out)
    torch.testing.assert_close(out, torch.tanh(kit.x) + torch.tanh(kit.x + 1))
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_a_compile_kernel_runs_under_a_compiler_only(kit: Any, ops: Any) -> None:
    def kernel(x: Any, factor: float = 2, *, bias: float = 0) -> Any:
        return torch.tanh(x)

    made = dispatcher(ops.scale, [kit.function_candidate(kernel, mode="compile")])
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: made(x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(kit.x), torch.tanh(kit.x))
    assert torch.equal(made(kit.x), kit.x * 2)
    torch._dynamo.reset()
