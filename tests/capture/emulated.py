"""Recordings on a CPU: what a graph would launch is run again, and written to where it was written first."""

from __future__ import annotations

import contextlib
import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from twinkle.capture import block as the_module
from twinkle.capture.block import BlockCall
from twinkle.capture.kinds import Stack
from twinkle.capture.pool import Pool
from twinkle.capture.state import StackRecord
from twinkle.ops.cuda_graphs import is_capturing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["EmulatedGraphs", "put_in"]


class EmulatedGraphs:
    """As ``CudaGraphs``, without a device.

    The memory that a graph needs while it runs may lie where the results of any later one do: a replay writes
    to all of them.
    """

    memory = 1 << 40
    short = 0
    waits = True
    """Whether what is recorded may read numbers, as it may not on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.recorded = 0
        self.replayed = 0
        self._graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        run = functools.partial(_captured, run)
        state = torch.get_rng_state()
        with contextlib.nullcontext() if self.waits else _nothing_is_read():
            first = run()
        torch.set_rng_state(state)  # a graph that is recorded draws nothing
        self.recorded += 1
        graph = _Graph(self, run, first)
        self._graphs.add(graph)
        return graph.replay, first

    def spoil(self, number: int) -> None:
        """Write to what the graphs recorded after one have written."""
        self.replayed += 1
        with torch.no_grad():
            for graph in self._graphs:
                if graph.number > number:
                    for one in graph.written:
                        one.fill_(float("nan") if one.is_floating_point() else 1)

    def allocated(self) -> int:
        return 0

    def held(self) -> int:
        return self.recorded * 1000

    def free(self) -> int:
        return self.memory // 16 if self.short == 1 else self.memory

    def spare(self) -> int:
        return self.free()

    def total(self) -> int:
        return self.memory

    def shortages(self) -> int:
        return self.short

    def stream(self) -> Any:
        return "the only one"

    def generators(self) -> int:
        return 0

    def random(self) -> Any:
        return bytes(torch.get_rng_state().numpy())

    def set_random(self, state: Any) -> None:
        torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


class _Graph:
    """One of them."""

    def __init__(self, graphs: EmulatedGraphs, run: Callable[[], Any], first: Any) -> None:
        self.number = graphs.recorded
        self.written = [one.detach() for one in _tensors(first)]
        self._graphs, self._run, self._first = graphs, run, first
        self._mode = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()

    def replay(self) -> None:
        self._graphs.spoil(self.number)
        with torch.inference_mode(self._inference), torch.set_grad_enabled(self._mode):
            again = self._run()
        with torch.no_grad():
            for old, new in zip(self.written, _tensors(again), strict=True):
                old.copy_(new)
        if isinstance(self._first[-1], list):
            self._first[-1][:] = again[-1]


@contextlib.contextmanager
def _nothing_is_read() -> Iterator[None]:
    def refuse(self: Tensor) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    names = ("item", "__bool__", "__int__", "__float__", "__index__")
    new = [name for name in names if name not in vars(Tensor)]  # others answer already
    for name in new:
        setattr(Tensor, name, refuse)
    try:
        yield
    finally:
        for name in new:
            delattr(Tensor, name)


def _captured(run: Callable[[], Any]) -> Any:
    """What is called in here is told that a graph is captured."""
    the_module.is_capturing = lambda: True
    try:
        return run()
    finally:
        the_module.is_capturing = is_capturing


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [one for part in value for one in _tensors(part)]
    return []


def put_in(blocks: Iterable[nn.Module], *, limit: int = 1 << 40, is_trunk: bool = False) -> Stack:
    """Give blocks that are no part of a watched model their slot."""
    blocks = list(blocks)
    record = StackRecord("Net", "blocks", type(blocks[0]).__name__, len(blocks), is_trunk=is_trunk)
    stack = Stack(record, Pool(torch.device("cpu"), limit, EmulatedGraphs))
    for block in blocks:
        block._compiled_call_impl = BlockCall(block, stack)
    assert weakref.getweakrefcount(blocks[0])
    return stack
