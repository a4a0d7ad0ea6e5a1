"""The room that comparisons are made in: what happens there is neither seen nor left behind outside.

Whoever compares a kernel with its original enters :func:`clean_room`, and works there on private copies
(:mod:`twinkle.proof.twin`). Where the circumstances of a call leave no such room (a transform, a tracer, a
mode that is in force) :class:`NotNow` says why, and the next call asks again.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from twinkle.ops.cuda_graphs import is_capturing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = [
    "Generators",
    "NotNow",
    "clean_room",
    "comparing",
    "is_recomputing",
    "reason_against",
]

_autograd: Any = torch._C._autograd
_ACCELERATORS = ("cuda", "xpu", "mps")
_AUTOCAST = ("cpu", "cuda")


class NotNow(Exception):
    """No comparison can be made for the call at hand; the message says why. It is no word on the kernel."""


class _Occupied(threading.local):
    """Whether this thread is in the room."""

    now = False


_occupied = _Occupied()


def comparing() -> bool:
    """Whether this thread makes a comparison."""
    return _occupied.now


def reason_against(tensors: Iterable[torch.Tensor] = (), *, traced: bool = False) -> str | None:
    """Why no comparison can be made now, in words that follow "not compared yet"; None where one can.

    Args:
        tensors: Those of the call.
        traced: The question comes from a compiler's trace, for which made-up inputs are compared: its
            modes are taken out of the way.
    """
    if _occupied.now:
        return "inside another comparison"
    if torch._C._are_functorch_transforms_active():
        return "inside torch.func"
    if forward_ad._current_level >= 0:
        return "inside forward-mode autograd"
    if torch._C._get_tracing_state() is not None:
        return "inside torch.jit.trace"
    if is_capturing():
        return "while a CUDA graph is captured"
    if is_recomputing():
        return "while checkpointed activations are computed again"
    if not traced:
        if torch.compiler.is_compiling():
            return "while a compiler traces"
        symbolic = sys.modules.get("torch.fx._symbolic_trace")
        if symbolic is not None and symbolic._is_fx_tracing_flag:
            return "inside torch.fx.symbolic_trace"
        if (mode := _mode_in_force()) is not None:
            return f"under {mode}"
    with torch._C.DisableTorchFunctionSubclass():  # a tensor of a class of its own may note these looks
        for tensor in tensors:
            if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ or tensor.is_meta:
                return f"for a {type(tensor).__name__} whose values are not in memory"
    parametrize = sys.modules.get("torch.nn.utils.parametrize")
    if parametrize is not None and parametrize._cache_enabled:
        return "inside parametrize.cached()"  # which would keep what the copies compute, by their ids
    return None


def is_recomputing() -> bool:
    """Whether backward computes again what a checkpoint dropped: forward ran the original, so this does.

    Torch compares what the two save for backward, and raises where a kernel comes between.
    """
    top = getattr(_autograd, "_top_saved_tensors_default_hooks", None)
    return torch._C._current_graph_task_id() != -1 and top is not None and top(False) is not None


def _mode_in_force() -> str | None:
    """The name of a mode that would see the operations of a comparison, or whose results it would get.

    The default device is a mode that only says where tensors are made. Those of selective checkpointing
    are in force at every call of a layer, so that no other one comes: they are taken out of the way.
    """
    modes: list[Any] = [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()]
    for mode in modes:
        if not isinstance(mode, DeviceContext) and type(mode).__module__ != "torch.utils.checkpoint":
            return type(mode).__name__.lstrip("_")
    return None


@contextlib.contextmanager
def clean_room(tensors: Iterable[torch.Tensor] = (), *, traced: bool = False) -> Iterator[Generators]:
    """Hold a comparison, or made-up inputs for one, apart from the program.

    Hooks on saved tensors, modes, profilers and traces of Python do not see what happens inside. The random
    generators of Python, numpy, the CPU and all devices in use, and the flags that a forward may set, are
    afterwards as they were before.

    Args:
        tensors: Those of the call; a GPU of theirs is the current one inside.
        traced: See :func:`reason_against`.

    Yields:
        The random generators, which can be brought back to where they were at the start.

    Raises:
        NotNow: No comparison can be made now.
    """
    given = list(tensors)
    reason = reason_against(given, traced=traced)
    if reason is not None:
        raise NotNow(reason)
    with torch._C.DisableTorchFunctionSubclass():
        device = next((tensor.device for tensor in given if tensor.is_cuda), None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_occupying())
        stack.enter_context(_unseen())
        generators = Generators()
        stack.callback(generators.rewind)
        stack.callback(_flags())
        stack.enter_context(torch.inference_mode(False))
        if device is not None:
            stack.enter_context(torch.cuda.device(device))
        # It would keep casts of the copies' weights until the program's own autocast ends.
        torch.set_autocast_cache_enabled(False)
        yield generators


@contextlib.contextmanager
def _occupying() -> Iterator[None]:
    _occupied.now = True
    try:
        yield
    finally:
        _occupied.now = False


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Nobody sees the operations and calls of this thread: no mode, hook, profiler or trace."""
    tracer, profiler = sys.gettrace(), sys.getprofile()
    with contextlib.ExitStack() as stack:
        # Others (coverage, cProfile) are no functions, and could not be put back.
        if isinstance(tracer, (FunctionType, MethodType)):
            stack.callback(sys.settrace, tracer)
            sys.settrace(None)
        if isinstance(profiler, (FunctionType, MethodType)):
            stack.callback(sys.setprofile, profiler)
            sys.setprofile(None)
        stack.callback(_autograd._enable_record_function, True)
        _autograd._enable_record_function(False)
        stack.enter_context(_disable_current_modes())
        modes = _get_current_function_mode_stack()
        if not all(isinstance(mode, DeviceContext) for mode in modes):
            for _ in modes:
                stack.enter_context(_pop_mode_temporarily())
        if _autograd._saved_tensors_hooks_is_enabled():
            # Under checkpointing torch counts the tensors that are kept for backward: none of these.
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_itself, _itself))
        yield


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Generators:
    """The states of all random generators that a program shares with its layers."""

    def __init__(self) -> None:
        shared = [torch.default_generator]
        for name in _ACCELERATORS:
            module = getattr(torch, name, None)
            if module is not None and getattr(module, "is_initialized", lambda: False)():
                shared += getattr(module, "default_generators", ())
            elif name == "mps" and torch.backends.mps.is_available():
                shared.append(torch.mps._get_default_mps_generator())
        self._torch = [(generator, generator.get_state()) for generator in shared]
        self._python = random.getstate()
        self._numpy: Any = getattr(sys.modules.get("numpy"), "random", None)
        self._of_numpy = self._numpy.get_state() if self._numpy is not None else None

    def rewind(self) -> None:
        """Bring them back to these states."""
        for generator, state in self._torch:
            generator.set_state(state)
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy.set_state(self._of_numpy)

    def moved(self) -> bool:
        """Whether random numbers were drawn since they were last at these states."""
        if any(not torch.equal(generator.get_state(), state) for generator, state in self._torch):
            return True
        if random.getstate() != self._python:
            return True
        # The algorithm's name, its numbers, where it is in them, and a number kept for the next call.
        numbers = self._numpy.get_state() if self._numpy is not None else ()
        return any(
            str(now) != str(then) if not hasattr(now, "tobytes") else now.tobytes() != then.tobytes()
            for now, then in zip(numbers, self._of_numpy or (), strict=True)
        )


def _flags() -> Callable[[], None]:
    """A function that sets the flags of thread and process, which a forward may change, as they are now."""
    grad = torch.is_grad_enabled()
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cached = torch.is_autocast_cache_enabled()
    autocast = [(name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in _AUTOCAST]

    def restore() -> None:
        torch._C._set_grad_enabled(grad)
        torch.set_autocast_cache_enabled(cached)
        for name, on, into in autocast:
            torch.set_autocast_enabled(name, on)
            torch.set_autocast_dtype(name, into)
        if torch.get_default_dtype() is not dtype:
            torch.set_default_dtype(dtype)
        # Not `torch.use_deterministic_algorithms`, which imports inductor.
        torch._C._set_deterministic_algorithms(deterministic, warn_only=warn_only)

    return restore
