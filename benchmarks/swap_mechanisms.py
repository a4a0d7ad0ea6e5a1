"""Compare ways to put a kernel in the place of a layer's ``forward``: cost a call, and what else they do.

    python benchmarks/swap_mechanisms.py [--rounds 25] [--calls 20000]

Times are medians of interleaved rounds, as the difference to a class that simply overrides ``forward``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import pickle
import statistics
import time
import weakref
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from twinkle.modes import Mode
from twinkle.records import Binding, LayerKernel
from twinkle.swap.candidate import Candidate
from twinkle.swap.functions import dispatcher
from twinkle.swap.layers import plan

if TYPE_CHECKING:
    from collections.abc import Callable


class Layer(nn.Module):
    """As cheap as a layer can be, so that the call is what is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Kernel(nn.Module):
    """Distinct from the original by its graph (a tanh) only where the input asks for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.ndim == 1 else torch.tanh(x)


def kernel_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x if x.ndim == 1 else torch.tanh(x)


class KernelWithMembers(Kernel):
    """A kernel that modules need a class of their own for."""

    FACTOR = 1


class Overridden(Layer):
    """The baseline: what a user would write by hand."""

    forward = kernel_forward


def overridden() -> nn.Module:
    return Overridden()


def instance_attribute() -> nn.Module:
    """``module.forward = bound method``."""
    module = Layer()
    module.forward = MethodType(kernel_forward, module)  # type: ignore[method-assign]
    return module


def instance_dispatcher() -> nn.Module:
    """The same with a dispatcher on device and mode."""
    module = Layer()

    def choose(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            return x
        return kernel_forward(self, x) if self.training else x

    module.forward = MethodType(choose, module)  # type: ignore[method-assign]
    return module


class ClassPatched(Layer):
    """Has its own ``forward`` replaced for all instances by one that looks the instance up."""


_chosen: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()


def _class_level(self: Any, x: torch.Tensor) -> Any:
    return _chosen.get(self, Layer.forward)(self, x)


ClassPatched.forward = _class_level  # type: ignore[method-assign]


def class_dispatcher() -> nn.Module:
    """A dispatcher in the class; which instances are meant stands in a weak table."""
    module = ClassPatched()
    _chosen[module] = kernel_forward
    return module


class _Source:
    kind = "code"

    def __init__(self, kernel: type[nn.Module] = Kernel) -> None:
        self.kernel = kernel

    def describe(self) -> str:
        return "benchmark"

    def load(self) -> object:
        return self.kernel


def _candidate(device: str | None, mode: str | None, kernel_class: type[nn.Module] = Kernel) -> Candidate:
    parsed = Mode.parse(mode)
    kernel = LayerKernel("K", _Source(kernel_class), device=device, mode=parsed)
    return Candidate(kernel, Binding("layer", "m:Layer", "K", "benchmark", device=device, mode=parsed))


def _generated(*wanted: tuple[str | None, str | None]) -> Callable[[], nn.Module]:
    candidates = [_candidate(device, mode, KernelWithMembers) for device, mode in wanted]

    def make() -> nn.Module:
        module = Layer()
        plan(module, candidates).commit()
        module(torch.ones(4))  # it is known when the kernel is loaded
        return module

    return make


def _marked(*wanted: tuple[str | None, str | None], unmarked: bool = False) -> Callable[[], nn.Module]:
    """A mark in the instance, and one function in the class for all marks."""
    candidates = [_candidate(device, mode) for device, mode in wanted]
    # A class for each row: the rows would share the function.
    name = f"Marked{len(wanted)}{'Other' if unmarked else wanted[0]}"
    owner: Any = type(name, (Layer,), {"forward": lambda self, x: x, "__module__": __name__})
    globals()[name] = owner  # for pickle
    kept = []

    def make() -> nn.Module:
        module: nn.Module = owner()
        plan(module, candidates).commit()
        if unmarked:
            module(torch.ones(4))
            kept.append(module)
            return owner()  # type: ignore[no-any-return]
        return module

    return make


MECHANISMS: dict[str, Callable[[], nn.Module]] = {
    "overridden in a subclass (baseline)": overridden,
    "instance attribute": instance_attribute,
    "instance attribute, device and mode": instance_dispatcher,
    "class-level dispatcher, weak table": class_dispatcher,
    "generated subclass, any device and mode": _generated((None, None)),
    "generated subclass, one device": _generated(("cpu", None)),
    "generated subclass, two modes": _generated((None, "train"), (None, "inference")),
    "generated subclass, two devices and modes": _generated(
        ("cuda", "train"), ("cuda", "inference"), ("cpu", "train"), ("cpu", "inference")
    ),
    "mark, any device and mode": _marked((None, None)),
    "mark, one device": _marked(("cpu", None)),
    "mark, two modes": _marked((None, "train"), (None, "inference")),
    "mark, two devices and modes": _marked(
        ("cuda", "train"), ("cuda", "inference"), ("cpu", "train"), ("cpu", "inference")
    ),
    "the original, of a class without marks": Layer,
    "the original, of a class with marks": _marked((None, None), unmarked=True),
}


def per_call(things: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, float]:
    """Median nanoseconds of CPU time a call, the rounds of all things interleaved."""
    loop = range(calls)
    taken: dict[str, list[float]] = {name: [] for name in things}
    for _ in range(rounds):
        for name, call in things.items():
            start = time.thread_time_ns()
            for _ in loop:
                call()
            taken[name].append((time.thread_time_ns() - start) / calls)
    return {name: statistics.median(times) for name, times in taken.items()}


def behaviour(make: Callable[[], nn.Module]) -> list[str]:
    """What a mechanism does besides running the kernel, in short words."""
    x, wide = torch.ones(4), torch.ones(2, 4)
    module = make()
    module(x)
    said = [
        "kept" if torch.equal(copy.deepcopy(module)(wide), torch.tanh(wide)) else "lost",
        _pickled(module),
        ", ".join(k for k in module.__dict__ if k not in Layer().__dict__) or "nothing",
    ]
    gc.disable()
    try:
        gone = weakref.ref(module)
        del module
        said.append("at once" if gone() is None else "by the collector")
    finally:
        gc.enable()
    said.append(_compiled(make))
    return said


def _pickled(module: nn.Module) -> str:
    try:
        data = pickle.dumps(module)
        return "needs twinkle" if b"twinkle" in data else type(pickle.loads(data)).__name__
    except Exception as error:
        return type(error).__name__


def _compiled(make: Callable[[], nn.Module]) -> str:
    """Graphs made for a model of four layers: the first call, then after an eager one."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    model = nn.Sequential(*(make() for _ in range(4)))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    wide = torch.ones(2, 4)
    try:
        compiled(wide)
        first = len(graphs)
        model(wide)
        compiled(wide)
    except Exception as error:
        return type(error).__name__
    finally:
        torch._dynamo.reset()
    return f"{first} + {len(graphs) - first}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--calls", type=int, default=20_000)
    options = parser.parse_args()
    x = torch.ones(4)
    calls: dict[str, Callable[[], Any]] = {}
    forwards: dict[str, Callable[[], Any]] = {}
    for name, make in MECHANISMS.items():
        module = make()
        module(x)
        calls[name] = lambda module=module: module(x)
        forwards[name] = lambda forward=module.forward: forward(x)
    whole = per_call(calls, options.rounds, options.calls)
    times = per_call(forwards, options.rounds, options.calls)
    base = times["overridden in a subclass (baseline)"]
    print(f"torch {torch.__version__}, {options.rounds} rounds of {options.calls} calls, ns\n")
    print(f"{'mechanism':<44}{'module(x)':>10}{'forward(x)':>12}{'more':>8}{'ratio':>8}")
    for name, nanoseconds in times.items():
        more, ratio = nanoseconds - base, nanoseconds / base
        print(f"{name:<44}{whole[name]:>10.0f}{nanoseconds:>12.0f}{more:>+8.0f}{ratio:>8.2f}")
    print(f"\n{'mechanism':<44}{'deepcopy':<10}{'pickle of':<14}{'in __dict__':<13}{'freed':<18}{'graphs'}")
    for name, make in MECHANISMS.items():
        copied, pickled, residue, freed, graphs = behaviour(make)
        print(f"{name:<44}{copied:<10}{pickled:<14}{residue:<13}{freed:<18}{graphs}")
    functions(options.rounds, options.calls)


def functions(rounds: int, calls: int) -> None:
    """The cost of a function dispatcher."""
    from twinkle.records import FunctionKernel
    from twinkle.swap.candidate import FunctionCandidate

    def plain(x: torch.Tensor) -> torch.Tensor:
        return x

    def calls_by_name(x: torch.Tensor) -> torch.Tensor:
        return x if x.ndim else importlib.import_module("m").f(x)

    def wanted(device: str | None, mode: str | None, loaded: Callable[..., Any] = plain) -> FunctionCandidate:
        class Source(_Source):
            def load(self) -> object:
                return loaded

        parsed = Mode.parse(mode)
        kernel = FunctionKernel("f", "m", Source(), device=device, mode=parsed)
        return FunctionCandidate(kernel, Binding("function", "m:f", "f", "", device=device, mode=parsed))

    x = torch.ones(4)
    made: dict[str, Callable[..., Any]] = {
        "the function itself": plain,
        "dispatcher, one device": dispatcher(plain, [wanted("cpu", None)]),
        "dispatcher, one device and mode": dispatcher(plain, [wanted("cpu", "train")]),
        "dispatcher, two devices and modes": dispatcher(
            plain, [wanted(d, m) for d in ("cuda", "cpu") for m in ("train", "inference")]
        ),
        "dispatcher, with a compile kernel": dispatcher(
            plain, [wanted("cpu", None), wanted("cpu", "compile")]
        ),
        "dispatcher, a kernel under its mark": dispatcher(plain, [wanted("cpu", None, calls_by_name)]),
    }
    for function in made.values():
        function(x)
    times = per_call({n: (lambda f=f: f(x)) for n, f in made.items()}, rounds, calls)
    base = times["the function itself"]
    print(f"\n{'function':<44}{'ns a call':>10}{'more':>8}{'ratio':>8}")
    for name, nanoseconds in times.items():
        print(f"{name:<44}{nanoseconds:>10.0f}{nanoseconds - base:>+8.0f}{nanoseconds / base:>8.2f}")


if __name__ == "__main__":
    main()
