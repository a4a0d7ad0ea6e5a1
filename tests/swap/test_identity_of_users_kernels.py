"""A module with a user's kernels is told from its original by nobody who does not ask Twinkle."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import os
import pickle
import subprocess
import sys
import threading
import typing
import warnings
import weakref
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from twinkle.deferred.forward import reason_against
from twinkle.modes import Mode
from twinkle.swap.layers import original_class, placed, plan, swap_out

X = torch.arange(1.0, 5.0)
HALVES = """
import torch
from torch import nn

class Halves(nn.Module):
    '''Halves.'''

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
        '''Half of it.'''
        return x * self.weight * scale

    def helper(self):
        return 1

class Slotted(Halves):
    __slots__ = ("extra",)

class Guarded(Halves):
    def __setattr__(self, name, value):
        if name.startswith("_tw"):
            raise AttributeError(name)
        super().__setattr__(name, value)

class Freezing(Halves):
    calls = 0

    def train(self, mode=True, *, deep=True):
        super().train(mode)
        self.calls += 1
        return self

class Meta(type):
    def __setattr__(cls, name, value):
        raise TypeError(name)

class OfMeta(Halves, metaclass=Meta):
    pass

class Chosen(Halves):
    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_tw")}

class Reduced(Halves):
    def __reduce__(self):
        return Reduced, ()

class Copying(Halves):
    def __deepcopy__(self, memo):
        return type(self)()

    def __copy__(self):
        return type(self)()
"""
KINDS = ["Halves", "Slotted", "Guarded", "Freezing", "OfMeta", "Chosen", "Reduced", "Copying"]


@pytest.fixture
def net(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of classes that no other test has seen, and whose source can be read."""
    path = tmp_path / "net_of_tests.py"
    path.write_text(HALVES)
    made: Any = ModuleType("net_of_tests")
    made.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "net_of_tests", made)
    exec(compile(HALVES, str(path), "exec"), vars(made))
    return made


def times(number: float, **members: Any) -> Any:
    """A kernel class that gives so many times what the original gives."""

    def forward(self: Any, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
        return number * x * self.weight * scale

    return type(f"Times{number}", (nn.Module,), {"forward": forward, **members})


class Around(nn.Module):
    """Has to stand above the original."""

    def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
        return 2 * super().forward(x, scale)


class WithMembers(nn.Module):
    FACTOR = 2

    def twice(self, x: torch.Tensor) -> torch.Tensor:
        return self.FACTOR * x * self.weight

    def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
        return self.twice(x) * scale


def factor(module: nn.Module) -> float:
    return (module(X) / (X / 2)).mean().item()


def swapped(kit: Any, cls: Any, kernel: Any = None, **options: Any) -> Any:
    module = cls()
    assert kit.swap_in(module, [kit.candidate(kernel or times(2), **options)])
    return module


def pinned(kit: Any, cls: Any) -> Any:
    """A module in training with the inference kernel (5), which was asked for by name; 3 is for training."""
    module = cls()
    kernels = [kit.candidate(times(3), mode="train"), kit.candidate(times(5), mode="inference")]
    assert kit.swap_in(module, kernels, pinned=Mode.parse("inference"))
    return module


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("ran", [True, False])
def test_the_class_is_the_very_class(kit: Any, net: Any, name: str, ran: bool) -> None:
    cls = getattr(net, name)
    plain = cls()
    table = {cls: "found"}
    handler = functools.singledispatch(lambda module: "object")
    handler.register(cls, lambda module: "found")
    for module, gives in ((swapped(kit, cls), 2), (pinned(kit, cls), 5)):
        if ran:
            assert factor(module) == gives
        assert type(module) is cls
        assert module.__class__ is cls
        assert isinstance(module, cls)
        assert (table[type(module)], handler(module)) == ("found", "found")
        assert type(module).__mro__ == type(plain).__mro__
        assert repr(module) == repr(plain)
        assert weakref.ref(module)() is module
        assert original_class(module) is cls
        assert factor(module) == gives
    assert factor(plain) == 1


def test_inspect_sees_the_original(kit: Any, net: Any) -> None:
    cls = net.Halves
    plain = cls.forward

    def seen() -> list[Any]:
        functions = cls.forward, cls().forward
        shown = [[inspect.getsource(f), f.__doc__, f.__name__, f.__qualname__] for f in functions]
        hints = typing.get_type_hints(cls.forward)
        return [*shown, inspect.signature(cls.forward), hints, inspect.getsource(cls), inspect.getmodule(cls)]

    before = seen()
    one, other = swapped(kit, cls), pinned(kit, cls)
    factor(one), factor(other)
    assert seen() == before
    assert inspect.signature(other.train) == inspect.signature(cls().train)
    assert inspect.getsource(cls.train) == inspect.getsource(nn.Module.train)
    assert inspect.unwrap(cls.forward) is plain


@pytest.mark.parametrize("name", KINDS)
def test_taking_the_last_one_out_leaves_nothing_behind(kit: Any, net: Any, name: str) -> None:
    cls = getattr(net, name)
    before, state = dict(vars(cls)), set(vars(cls()))
    modules = [swapped(kit, cls), pinned(kit, cls), swapped(kit, cls, device="cpu")]
    for module in modules:
        factor(module)
    for module in modules:
        assert swap_out(module)
        assert (factor(module), set(vars(module))) == (1, state)
    assert dict(vars(cls)) == before


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("name", KINDS)
def test_copies_keep_class_and_kernels(kit: Any, net: Any, name: str, copying: Any) -> None:
    cls = getattr(net, name)
    for make, gives in ((swapped, 2), (pinned, 5)):
        module = make(kit, cls)
        twin = copying(module)
        again = copying(twin)
        swap_out(module)
        gone = weakref.ref(module)
        del module
        if gone() is not None:  # in a cycle, which a new generation has or all of them
            gc.collect(1)
        if gone() is not None:
            gc.collect()
        assert gone() is None
        assert [type(twin), type(again)] == [cls, cls]
        assert [factor(twin), factor(again)] == [gives, gives]
        swap_out(twin)
        assert [factor(twin), factor(again)] == [1, gives]


@pytest.mark.parametrize("name", KINDS)
def test_files_are_those_of_the_class(kit: Any, net: Any, name: str) -> None:
    cls = getattr(net, name)
    module = swapped(kit, cls)
    factor(module)
    written, saved = pickle.dumps(module), io.BytesIO()
    torch.save(module, saved)
    assert b"twinkle" not in written
    assert b"twinkle" not in saved.getvalue()
    loaded = [pickle.loads(written), torch.load(io.BytesIO(saved.getvalue()), weights_only=False)]
    assert [type(one) for one in loaded] == [cls, cls]
    swap_out(module)  # the marks mean nothing from now on, as in another process
    assert [factor(one) for one in loaded] == [1, 1]


PROGRAM = """
import sys, pickle, torch
for module in pickle.load(open(sys.argv[1], "rb")):
    assert module.train() is module
    print(type(module).__name__, type(module).__module__, module(torch.ones(4)).sum().item())
assert not any(name.partition(".")[0] == "twinkle" for name in sys.modules), "Twinkle was imported"
"""


@pytest.mark.parametrize("kind", ["code", "embedded"])
def test_a_class_that_is_pickled_by_value_needs_nothing_of_twinkle(
    kit: Any, net: Any, kind: str, tmp_path: Any
) -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    classes = [getattr(net, name) for name in KINDS if name != "OfMeta"]
    modules = [cls() for cls in classes for _ in range(3)]
    for number, module in enumerate(modules):
        wanted = [kit.candidate(times(3 + n), mode=mode, kind=kind) for n, mode in enumerate(("train", None))]
        if number % 3:
            kit.swap_in(module, wanted, pinned=Mode.parse("inference") if number % 3 == 2 else None)
            factor(module)
    cloudpickle.register_pickle_by_value(net)
    try:
        (tmp_path / "modules").write_bytes(cloudpickle.dumps(modules))
    finally:
        cloudpickle.unregister_pickle_by_value(net)
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TWINKLE_", "PYTHON"))}
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "modules")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = [line.split() for line in done.stdout.splitlines()]
    assert shown == [[cls.__name__, "net_of_tests", "2.0"] for cls in classes for _ in range(3)]


def test_a_file_opens_with_the_class_as_the_only_thing_allowed(kit: Any, net: Any) -> None:
    module, saved = swapped(kit, net.Halves), io.BytesIO()
    torch.save(module, saved)
    with torch.serialization.safe_globals([net.Halves, set]):
        loaded = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    assert type(loaded) is net.Halves


def test_quantize_dynamic_finds_layers_with_kernels(kit: Any) -> None:
    class Kernel(nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, self.weight, self.bias) + 1

    model = nn.Sequential(nn.Linear(4, 4))
    kit.swap_in(model[0], [kit.candidate(Kernel)])
    model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(quantized[0]) is torch.ao.nn.quantized.dynamic.Linear
    swap_out(model[0])


def test_logits_are_not_deferred_past_a_users_kernel_for_the_head(kit: Any) -> None:
    class Kernel(nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, self.weight, self.bias) + 1

    head = nn.Linear(4, 4)
    assert reason_against(head) is None
    kit.swap_in(head, [kit.candidate(Kernel)])
    assert "kernel of the user's" in str(reason_against(head))
    swap_out(head)
    assert reason_against(head) is None


@pytest.mark.parametrize("how", ["attributes", "compiled"])
def test_copies_of_wrappers_are_wrappers(kit: Any, net: Any, how: str) -> None:
    class Forwarding(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(x)

    module = swapped(kit, net.Halves)
    wrapper: Any = Forwarding(module) if how == "attributes" else torch.compile(module, backend="eager")
    twin = copy.deepcopy(wrapper)
    assert type(twin) is type(wrapper)
    assert [factor(wrapper), factor(twin)] == [2, 2]


def test_what_torch_puts_on_top_keeps_the_kernel(kit: Any, net: Any) -> None:
    class Twice(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    module = pinned(kit, net.Halves)
    parametrize.register_parametrization(module, "weight", Twice())
    assert type(module).__bases__ == (net.Halves,)
    assert factor(module) == 10
    assert factor(copy.deepcopy(module)) == 10
    module.train()
    assert factor(module) == 6
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    assert [type(module), factor(module)] == [net.Halves, 3]
    prune.l1_unstructured(module, "weight", 2)
    assert torch.equal(module(X), 3 * X * module.weight * 0.5)


def test_candidates_for_devices_and_modes(kit: Any, net: Any) -> None:
    module = net.Halves()
    wanted = [
        kit.candidate(times(3), device="cuda", mode="train"),
        kit.candidate(times(5), device="cpu", mode="train"),
        kit.candidate(times(7), device="cpu", mode="inference"),
    ]
    kit.swap_in(module, wanted)
    assert [factor(module.train()), factor(module.eval()), factor(module.train())] == [5, 7, 5]
    assert [candidate.kernel.source.loads for candidate in wanted] == [0, 1, 1]
    assert type(module) is net.Halves


def test_modules_of_a_class_in_other_states_share_no_plan(kit: Any, net: Any) -> None:
    wanted = kit.candidate(times(2))
    marked, plain, other = net.Halves(), net.Halves(), swapped(kit, net.Halves, times(3))
    kit.swap_in(marked, [wanted])
    for first, rest in ((marked, (plain, other)), (plain, (marked, other)), (other, (plain, marked))):
        made = plan(first, [wanted])
        assert not isinstance(made, str)
        assert [made.also(module) for module in rest] == [False, False]


def test_a_copy_is_counted_when_it_is_asked_for(kit: Any, net: Any) -> None:
    wanted = kit.candidate(times(2))
    module = net.Halves()
    kit.swap_in(module, [wanted])
    twin = copy.deepcopy(module)
    kit.swap_in(twin, [wanted])
    assert wanted.binding.instances == 2
    del module
    assert (wanted.binding.instances, factor(twin)) == (1, 2)


def test_other_kernels_for_a_module_and_back(kit: Any, net: Any) -> None:
    module, other = swapped(kit, net.Halves), swapped(kit, net.Halves)
    for number in (3, 5, 7):
        kit.swap_in(module, [kit.candidate(times(number))])
        assert [factor(module), factor(other), type(module)] == [number, 2, net.Halves]
    kit.swap_in(module, [kit.candidate(WithMembers)])
    assert factor(module) == 2
    kit.swap_in(module, [kit.candidate(times(9))])
    assert [factor(module), type(module)] == [9, net.Halves]


@pytest.mark.parametrize("name", ["Halves", "Freezing"])
@pytest.mark.parametrize("setting", ["train", "eval", "of a parent", "as it is"])
def test_a_mode_by_name_holds_until_the_mode_is_set(kit: Any, net: Any, name: str, setting: str) -> None:
    cls = getattr(net, name)
    module, other = pinned(kit, cls), pinned(kit, cls)
    twin = copy.deepcopy(module)
    assert factor(module) == 5
    if setting == "of a parent":
        nn.Sequential(module).train()
    elif setting == "as it is":
        module.train(module.training)
    else:
        getattr(module, setting)()
    assert factor(module) == (5 if setting == "eval" else 3)
    assert [factor(other), factor(twin)] == [5, 5]
    assert [factor(twin.train()), factor(other.eval()), factor(other.train())] == [3, 5, 3]
    assert getattr(module, "calls", 1) == 1


def test_train_is_the_classs_own_once_no_mode_is_asked_for(kit: Any, net: Any) -> None:
    own = vars(net.Freezing)["train"]
    module, plain = pinned(kit, net.Freezing), net.Freezing()
    assert vars(net.Freezing)["train"] is not own
    assert plain.train(False, deep=False) is plain
    module.train()
    swapped(kit, net.Freezing)
    assert vars(net.Freezing)["train"] is own
    pinned(kit, net.Halves).train()
    swapped(kit, net.Halves)
    assert "train" not in vars(net.Halves)


def test_a_train_that_is_no_function_needs_a_class(kit: Any) -> None:
    class Layer(nn.Module):
        train = functools.partialmethod(nn.Module.train)

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            return x * self.weight * scale

    module = pinned(kit, Layer)
    assert [factor(module), factor(module.train())] == [5, 3]
    assert type(module) is Layer


@pytest.mark.parametrize("kernel", [Around, WithMembers])
def test_a_kernel_that_needs_a_class_gets_one_when_that_is_known(kit: Any, net: Any, kernel: Any) -> None:
    wanted = kit.candidate(kernel)
    module, plain = net.Halves(), net.Halves()
    kit.swap_in(module, [wanted])
    before, twin = placed(module), copy.deepcopy(module)
    assert type(module) is net.Halves
    assert [factor(module), factor(module), factor(twin), factor(plain)] == [2, 2, 2, 1]
    assert [type(module) is net.Halves, type(twin) is type(module)] == [False, True]
    assert placed(module) is not before
    assert (wanted.binding.state, wanted.binding.instances) == ("active", 2)
    other = net.Halves()
    kit.swap_in(other, [wanted])
    assert type(other) is type(module)
    for one in (module, twin, other):
        swap_out(one)
    assert dict(vars(module)).keys() == dict(vars(plain)).keys()
    assert [type(module), factor(module), "_tw" in vars(net.Halves)] == [net.Halves, 1, False]


@pytest.mark.parametrize("kernel", [Around, WithMembers])
def test_the_class_has_its_forward_back_once_all_modules_have_their_own(
    kit: Any, net: Any, kernel: Any
) -> None:
    plain, wanted = net.Halves.forward, kit.candidate(kernel)
    modules = [net.Halves() for _ in range(3)]
    for module in modules:
        kit.swap_in(module, [wanted])
    twin = copy.deepcopy(modules[0])
    factor(modules[0])
    assert net.Halves.forward is not plain  # for the copy, which is known by its mark alone
    assert factor(twin) == 2
    assert net.Halves.forward is plain


def test_only_the_modules_of_that_kernel_get_a_class(kit: Any, net: Any) -> None:
    plain, marked, around = net.Halves(), swapped(kit, net.Halves, times(3)), swapped(kit, net.Halves, Around)
    assert [factor(one) for one in (plain, marked, around, marked)] == [1, 3, 2, 3]
    assert [type(one) is net.Halves for one in (plain, marked, around)] == [True, True, False]


def test_a_second_kernel_that_needs_a_class_takes_the_first_along(kit: Any, net: Any) -> None:
    module = net.Halves()
    kernels = [kit.candidate(times(3), mode="train"), kit.candidate(Around, mode="inference")]
    kit.swap_in(module, kernels)
    assert [factor(module), type(module)] == [3, net.Halves]
    assert [factor(module.eval()), factor(module.train()), factor(module.eval())] == [2, 3, 2]
    assert type(module) is not net.Halves


def test_a_mode_by_name_outlives_the_change_to_a_class(kit: Any, net: Any) -> None:
    module = net.Halves()
    kernels = [kit.candidate(times(3), mode="train"), kit.candidate(Around, mode="inference")]
    kit.swap_in(module, kernels, pinned=Mode.parse("inference"))
    assert [factor(module), factor(module), factor(module.train()), factor(module.eval())] == [2, 2, 3, 2]


def test_a_wrapper_stays_around_a_kernel_that_gets_a_class(kit: Any, net: Any) -> None:
    module = net.Halves()
    found = module.forward
    module.forward = lambda x: found(x) + 1
    kit.swap_in(module, [kit.candidate(WithMembers)])
    for _ in range(2):
        assert torch.equal(module(X), X + 1)


def test_an_instance_that_the_kernel_does_not_suit_keeps_its_class(kit: Any, net: Any) -> None:
    class Kernel(WithMembers):
        def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            return self.twice(x) * scale * self.bonus

    one, other = net.Halves(), net.Halves()
    one.bonus = 1
    wanted = kit.candidate(Kernel)
    for module in (one, other):
        kit.swap_in(module, [wanted])
    assert [factor(one), factor(other), factor(one)] == [2, 1, 2]
    assert [type(one) is net.Halves, type(other)] == [False, net.Halves]


def test_a_class_that_cannot_be_subclassed_keeps_the_original_with_a_reason(kit: Any) -> None:
    class Final(type):
        def __new__(mcs, name: str, bases: Any, space: Any) -> Any:
            if any(type(base) is Final for base in bases):
                raise TypeError("final")
            return super().__new__(mcs, name, bases, space)

    class Layer(nn.Module, metaclass=Final):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            return x * self.weight * scale

    assert factor(swapped(kit, Layer)) == 2
    wanted, module = kit.candidate(Around), Layer()
    kit.swap_in(module, [wanted])
    with pytest.warns(UserWarning, match="cannot be subclassed: final"):
        assert factor(module) == 1
    assert wanted.binding.state == "failed"


def test_a_kernel_that_calls_the_original_by_its_class_comes_to_the_original(kit: Any, net: Any) -> None:
    def through(x: Any, module: Any) -> Any:
        return net.Halves.forward(module, x)

    class ByName(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            return 2 * net.Halves.forward(self, x, scale)

    class ByAnother(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            return 2 * through(x, self)

    class ByString(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            return 2 * getattr(net.Halves, "forward")(self, x, scale)  # noqa: B009

    class Below(net.Halves):  # type: ignore[misc, name-defined]
        def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            return 2 * net.Halves.forward(self, x, scale)

    marked = swapped(kit, net.Halves, times(3))
    held = net.Halves.forward

    class ByHeld(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            return 2 * held(self, x, scale)

    for kernel in (ByName, ByAnother, ByString, Below, ByHeld):
        module = swapped(kit, net.Halves, kernel)
        assert [factor(module), factor(module), factor(marked)] == [2, 2, 3]


class Tripled(torch.autograd.Function):
    """What kernels are made of: its own ``forward`` is nobody's name."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return 3 * gradients[0]


def test_a_kernel_with_a_function_of_autograd_needs_no_class(kit: Any, net: Any) -> None:
    class Kernel(nn.Module):
        can_torch_compile = True
        has_backward = True
        weight: torch.Tensor

        def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            return Tripled.apply(x * self.weight) * scale  # type: ignore[no-any-return, no-untyped-call]

    module = swapped(kit, net.Halves, Kernel)
    assert [factor(module), type(module)] == [3, net.Halves]


def test_the_forward_of_the_class_takes_what_is_like_a_module(kit: Any, net: Any) -> None:
    class Like:
        __slots__ = ("weight",)

    module, like = swapped(kit, net.Halves), Like()
    like.weight = module.weight
    for _ in range(2):
        assert torch.equal(net.Halves.forward(like, X), X / 2)
        assert torch.equal(net.Halves.forward(module, X), X)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        net.Halves.forward(module)


def test_a_proof_compares_with_the_original(kit: Any, net: Any) -> None:
    class Same(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            return x * scale * self.weight

    for kernel, state in ((Same, "active"), (times(2), "failed")):
        wanted = kit.candidate(kernel)
        wanted = type(wanted)(wanted.kernel, wanted.binding, proofs=1)
        module = net.Halves()
        kit.swap_in(module, [wanted])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert [factor(module), factor(module)] == [1, 1]
        assert (wanted.binding.state, type(module)) == (state, net.Halves)


@pytest.mark.parametrize("kernel", [times(2), Around, WithMembers])
def test_two_threads_at_the_first_call(kit: Any, net: Any, kernel: Any) -> None:
    wanted = kit.candidate(kernel)
    modules = [net.Halves() for _ in range(8)]
    for module in modules:
        kit.swap_in(module, [wanted])
    together, found = threading.Barrier(4), []

    def run(number: int) -> None:
        together.wait()
        found.extend(factor(module) for module in modules[number % 2 :: 2])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # While one thread moves a module to its class, another may come to the original.
    assert set(found) <= {1, 2}
    assert [factor(module) for module in modules] == [2] * 8
    assert wanted.kernel.source.loads == 1


class Graphs(list[Any]):
    """A backend that keeps the graphs it is given."""

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.append(graph)
        return graph

    def compile(self, module: Any) -> Any:
        return torch.compile(module, backend=self, fullgraph=True)


@pytest.fixture
def graphs() -> Any:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


class Tanh(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
        return torch.tanh(x) * self.weight * scale


class Plus(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
        return x + 100


class TanhAround(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
        return torch.tanh(super().forward(x, scale))


class TanhHelper(nn.Module):
    def helped(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)

    def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
        return self.helped(x) * self.weight * scale


@pytest.mark.parametrize("kernel", [Tanh, TanhAround, TanhHelper])
def test_a_model_that_was_compiled_before_sees_the_kernel(
    kit: Any, net: Any, graphs: Graphs, kernel: Any
) -> None:
    class Stays(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    model, unrelated = nn.Sequential(net.Halves(), net.Halves()), nn.Sequential(Stays())
    compiled, other = graphs.compile(model), graphs.compile(unrelated)
    before = compiled(X), other(X)
    for module in model:
        kit.swap_in(module, [kit.candidate(kernel)])
    for _ in range(2):
        torch.testing.assert_close(compiled(X), model(X))
        assert "tanh" in graphs[-1].code
    assert torch.equal(other(X), before[1])
    assert len(graphs) == 3  # the unrelated model has kept its graph
    for module in model:
        swap_out(module)
    assert torch.equal(compiled(X), before[0])


def test_a_compiled_model_sees_a_kernel_come_and_go_any_number_of_times(
    kit: Any, net: Any, graphs: Graphs
) -> None:
    module, wanted = net.Halves(), kit.candidate(times(2))
    compiled = graphs.compile(nn.Sequential(module))
    for _ in range(12):
        assert factor(compiled) == 1
        kit.swap_in(module, [wanted])
        assert factor(compiled) == 2
        swap_out(module)
    assert len(graphs) == 3  # without the mark, with it, and where it is asked for and not there


def test_a_compiled_model_sees_kernels_for_many_classes(kit: Any, graphs: Graphs) -> None:
    def made(number: int) -> Any:
        def forward(self: Any, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            return x + number

        return type(f"Layer{number}", (nn.Module,), {"forward": forward})()

    model = nn.Sequential(*(made(number) for number in range(12)))
    compiled = graphs.compile(model)
    for module in model:
        before = compiled(X)
        kit.swap_in(module, [kit.candidate(Plus)])
        torch.testing.assert_close(compiled(X), model(X))
        assert not torch.equal(compiled(X), before)
    assert len(graphs) == 13


@pytest.mark.parametrize(
    "lacking", ["guards.DeletedGuardManagerWrapper", "eval_frame._debug_get_cache_entry_list"]
)
def test_a_torch_with_another_inside_forgets_all_graphs(
    kit: Any, net: Any, graphs: Graphs, lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = net.Halves()
    compiled = graphs.compile(nn.Sequential(module))
    compiled(X)
    with monkeypatch.context() as patch:
        patch.delattr(f"torch._dynamo.{lacking}")
        kit.swap_in(module, [kit.candidate(times(3))])
    assert factor(compiled) == 3


def test_a_single_layer_that_was_compiled_before_sees_the_kernel(kit: Any, net: Any, graphs: Graphs) -> None:
    wrapped, in_place = net.Halves(), net.Halves()
    compiled = graphs.compile(wrapped)
    in_place.compile(backend=graphs, fullgraph=True)
    compiled(X), in_place(X)
    for module in (wrapped, in_place):
        kit.swap_in(module, [kit.candidate(times(3))])
    assert [factor(compiled), factor(in_place)] == [3, 3]


def test_a_subclass_that_was_compiled_before_sees_the_kernel(kit: Any, net: Any, graphs: Graphs) -> None:
    class Inherits(net.Halves):  # type: ignore[misc, name-defined]
        pass

    model = nn.Sequential(Inherits())
    compiled = graphs.compile(model)
    compiled(X)
    kit.swap_in(model[0], [kit.candidate(times(3))])
    assert factor(compiled) == 3


@pytest.mark.parametrize("kernel", [TanhAround, TanhHelper])
@pytest.mark.parametrize("of", ["the model", "a copy"])
def test_a_kernel_that_needs_a_class_is_in_the_first_graph(
    kit: Any, net: Any, graphs: Graphs, kernel: Any, of: str
) -> None:
    model = nn.Sequential(net.Halves(), net.Halves())
    for module in model:
        kit.swap_in(module, [kit.candidate(kernel)])
    traced = model if of == "the model" else copy.deepcopy(model)
    compiled = graphs.compile(traced)
    given = compiled(X)
    assert "tanh" in graphs[-1].code
    torch.testing.assert_close(traced(X), given)
    compiled(X)
    assert len(graphs) == 1


@pytest.mark.parametrize("strict", [True, False])
def test_a_kernel_that_needs_a_class_is_exported(kit: Any, net: Any, strict: bool) -> None:
    model = nn.Sequential(swapped(kit, net.Halves, TanhHelper))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (X,), strict=strict)
    assert "tanh" in exported.graph_module.code


def test_a_compiled_model_follows_the_modes(kit: Any, net: Any, graphs: Graphs) -> None:
    model = nn.Sequential(pinned(kit, net.Halves), pinned(kit, net.Halves))
    compiled = graphs.compile(model)
    assert factor(compiled) == 5 * 5 / 2
    assert factor(compiled.train()) == 3 * 3 / 2
    assert factor(compiled.eval()) == 5 * 5 / 2
    assert len(graphs) == 3
    assert factor(compiled.train()) == 3 * 3 / 2
    assert len(graphs) == 3
