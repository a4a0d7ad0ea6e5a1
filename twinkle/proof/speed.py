"""Whether a kernel is worth its place: measured at the first call of each size, beside the original.

A size is the power of two that the first tensor's number of elements is below. A kernel that passed its proof
is timed on copies of the call at hand, in the room where comparisons are made, and the way that is not slower
takes the calls of that size from then on. What was measured is kept on disk as verdicts are.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from twinkle import forks
from twinkle.files import read_bounded
from twinkle.ops.plain import at_measured_size
from twinkle.proof.cache import proofs
from twinkle.proof.cache_key import cache_key
from twinkle.proof.clocks import FEWEST, Cost, clock_for, in_turns
from twinkle.proof.inputs import tensors_of
from twinkle.proof.results import taken_apart
from twinkle.proof.room import NotNow, clean_room, reason_against
from twinkle.proof.twin import Held, Twin
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from twinkle.proof.first_use import Subject

__all__ = [
    "KERNEL",
    "ORIGINAL",
    "SMALL_TOO",
    "TOO_LONG",
    "Speed",
    "Unmeasured",
    "processor",
    "size_of",
    "speed_at_call",
]

ORIGINAL, KERNEL, SMALL_TOO = "original", "kernel", "kernel, small inputs too"
"""The ways of a call; the last one is the kernel without the sizes that its code begins at."""

_SECONDS, _SECONDS_IN_ALL = 0.25, 1.5
"""What one size may take, and all of them in a process: the first steps are to be no later than 2 s."""
_TEMPORARY = 16
"""Times the memory of the inputs that both need, by and large, for results, gradients and steps between."""
_MOST_ON_CPU = 1 << 28
"""Bytes of inputs: more are not copied on a CPU."""
_MOST_BYTES = 1 << 22
"""Of what a system says of its processors: about 1500 bytes for each of them."""


class Speed(NamedTuple):
    """What was measured for calls of one size.

    Attributes:
        way: What runs: one of the ways above.
        ratio: Times as fast as the original, in the middle round: of the way that runs, else of the best.
        low: The same in the round that a quarter are below, which decides.
        original: What a call of the original costs, in seconds.
        kernel: The same of the kernel.
        at: What was measured, in words: ``4x512x1024 bfloat16``, ``with gradients`` for forward and backward.
        date: The day, where it is not today's.
    """

    way: str
    ratio: float
    low: float
    original: Cost
    kernel: Cost
    at: str
    date: str | None = None


class Unmeasured(NamedTuple):
    """Why nothing was measured.

    Attributes:
        reason: In words.
        for_good: It will not be at later calls of that size either; otherwise the next call asks again.
    """

    reason: str
    for_good: bool


TOO_LONG = Unmeasured("its calls take too long to measure", for_good=True)


class _Measurements:
    """What measuring has taken in this process; one measurement at a time."""

    def __init__(self) -> None:
        self.turn = forks.lock()
        self.seconds = 0.0

    @property
    def left(self) -> float:
        """Seconds that the next one may take."""
        return min(_SECONDS, _SECONDS_IN_ALL - self.seconds)


def size_of(tensor: Tensor) -> int:
    """The size that a call with such a first tensor counts as."""
    return int(tensor.numel()).bit_length()


def speed_at_call(
    subject: Subject, args: Sequence[Any], kwargs: Mapping[str, Any], *, grad: bool
) -> Speed | Unmeasured:
    """Measure a kernel beside its original on copies of a call, or recall what was measured.

    Args:
        subject: The kernel and where it stands.
        args: The arguments of the call, the layer first where there is one.
        kwargs: Its keyword arguments.
        grad: Gradients are recorded: forward and backward are measured.
    """
    module = args[0] if subject.layer_class is not None else None
    inputs = (tuple(args if module is None else args[1:]), dict(kwargs))
    tensors = tensors_of(inputs)
    reason = reason_against(tensors)
    if reason is not None:
        return Unmeasured(reason, for_good=False)
    with torch._C.DisableTorchFunctionSubclass():
        key = _key(subject, inputs, module, grad)
    if key is not None and subject.recall and (known := proofs().figures_of(key)) is not None:
        return _recalled(known)
    measurements = runtime.of(_Measurements)
    # Whoever is within a backward waits for nobody: the other one's may need this very thread.
    within = torch._C._current_graph_task_id() != -1
    if not (measurements.turn.acquire(blocking=False) if within else measurements.turn.acquire(timeout=5)):
        return Unmeasured("another measurement goes on", for_good=False)
    began = time.perf_counter()
    try:
        if measurements.left <= 0:
            return Unmeasured(f"measurements have taken {_SECONDS_IN_ALL} s", for_good=True)
        with clean_room(tensors):
            measured = _measured(subject, inputs, module, measurements, grad=grad)
    except NotNow as now:
        return Unmeasured(str(now), for_good=False)
    except Exception as error:
        # Out of memory, perhaps: the program's own call is made as ever.
        return Unmeasured(f"{type(error).__name__} when it was measured", for_good=True)
    finally:
        measurements.seconds += time.perf_counter() - began
        measurements.turn.release()
    if key is not None and isinstance(measured, Speed):
        proofs().keep_figures(key, measured._asdict())
    return measured


def _measured(
    subject: Subject, inputs: Any, module: nn.Module | None, measurements: _Measurements, *, grad: bool
) -> Speed | Unmeasured:
    with torch._C.DisableTorchFunctionSubclass():
        first = tensors_of(inputs)[0]
        clock = clock_for(first.device)
        if clock is None:
            return Unmeasured(f"there is no clock for {first.device.type}", for_good=True)
        if (reason := _no_room(inputs, module, first.device)) is not None:
            return Unmeasured(reason, for_good=True)
    held = Held(module)
    small_too, mattered = at_measured_size(subject.kernel)
    functions = {ORIGINAL: subject.original, KERNEL: subject.kernel, SMALL_TOO: small_too}
    ways: dict[str, Callable[[], object]] = {}
    with torch.set_grad_enabled(grad):
        for name, function in functions.items():
            made = _call(function, inputs, module, held, backward=grad)
            took = _seconds(made)
            if name == KERNEL:  # it may be compiled then, which it would be without a measurement as well
                measurements.seconds -= took
            if name == SMALL_TOO and not mattered():
                continue
            ways[name] = made
            if 2 * FEWEST * min(_seconds(made), _seconds(made)) > measurements.left:
                return TOO_LONG
        found = in_turns(ways, clock, seconds=measurements.left)
    if found is None:  # something else had the machine
        return TOO_LONG._replace(for_good=False)
    original = found.pop(ORIGINAL)
    # The way with the best figure, which is then held against the bound.
    way, best = max(found.items(), key=lambda item: item[1].low)
    runs = way if best.is_not_slower else ORIGINAL
    return Speed(runs, best.ratio, best.low, original.cost, best.cost, _at(first, grad=grad))


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _at(tensor: Tensor, *, grad: bool) -> str:
    text = f"{'x'.join(map(str, tensor.shape)) or 'a number'} {str(tensor.dtype).removeprefix('torch.')}"
    if torch.is_autocast_enabled(tensor.device.type):
        text += " under autocast"
    return f"{text} with gradients" if grad else text


def _call(
    function: Callable[..., Any], inputs: Any, module: nn.Module | None, held: Held, *, backward: bool
) -> Callable[[], object]:
    """A call on copies of its own, with a backward where the program's would have one."""
    twin = Twin(held, grad=False)
    args, kwargs = twin.arguments(inputs)
    lead: tuple[Any, ...] = () if module is None else (twin.layer(module),)
    if not backward:
        return lambda: function(*lead, *args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        pairs = [*zip(tensors_of(inputs), tensors_of((args, kwargs)), strict=True)]
        if module is not None:
            pairs += zip(module.parameters(), lead[0].parameters(), strict=True)
        floating = [(own, copy) for own, copy in pairs if own.is_floating_point()]
        leaves = list({id(copy): copy for own, copy in floating if own.requires_grad}.values())
        # The first of many layers, behind frozen ones: the next one's input has a gradient.
        leaves = leaves or [copy for _, copy in floating[:1]]
        for leaf in leaves:
            leaf.requires_grad_()
    cotangents: list[Tensor] = []

    def call() -> object:
        result = function(*lead, *args, **kwargs)
        parts = (result,) if isinstance(result, Tensor) else result
        if not isinstance(parts, tuple):
            parts = taken_apart(result).leaves
        roots = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
        if not roots:
            return result
        if not cotangents:
            cotangents.extend(torch.ones_like(root) for root in roots)
        return torch.autograd.grad(roots, leaves, cotangents, allow_unused=True)

    return call


def _no_room(inputs: Any, module: nn.Module | None, device: torch.device) -> str | None:
    """Why there is no memory for copies and what is computed from them; None where there is."""
    given = sum(tensor.nbytes for tensor in tensors_of(inputs))
    own = sum(parameter.nbytes for parameter in module.parameters()) if module is not None else 0
    if device.type == "cpu":
        return "its inputs are too large to be copied" if given > _MOST_ON_CPU else None
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return "there is not enough free memory for copies" if 2 * (_TEMPORARY * given + 2 * own) > free else None


# What is kept.


def _key(subject: Subject, inputs: Any, module: nn.Module | None, grad: bool) -> dict[str, Any] | None:
    """What a measurement depends on: all that a verdict does, the size, the original, and the host."""
    source = subject.source
    if source.kind != "embedded" or not hasattr(source, "op"):
        return None
    key = cache_key(source, *inputs, module=module, backward=grad)
    if key is None:
        return None
    tensors = tensors_of(inputs)
    return {
        **key,
        "size": size_of(tensors[0]) if tensors else 0,
        "trained": [tensor.requires_grad for tensor in tensors] if grad else None,
        "original": _digest_of(subject.original),
        "host": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def _digest_of(function: Any) -> str:
    """A digest of the code of a function: two of one op may be written in ways of which one is slow."""
    code = getattr(function, "__code__", None)
    if code is None:
        return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
    return hashlib.sha256(code.co_code + repr((code.co_names, code.co_varnames)).encode()).hexdigest()[:16]


@functools.cache
def processor() -> str:
    """The model of the processor: what is issued from a slower one may take longer than it saves."""
    try:
        text = read_bounded("/proc/cpuinfo", _MOST_BYTES).decode("utf-8", errors="replace")
        names = (
            line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")
        )
        return next(names)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _recalled(known: Mapping[str, Any]) -> Speed:
    costs = {name: Cost(*known[name]) for name in ("original", "kernel")}
    return Speed(**{**known, **costs})
