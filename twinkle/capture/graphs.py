"""CUDA graphs that share memory: recording on a stream of their own, without a wait for the device."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from typing import TYPE_CHECKING, Any

import torch

from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CudaGraphs"]


class Generators:
    """How often the states of generators were taken from all graphs that had been recorded."""

    def __init__(self) -> None:
        self.lost = 0


class CudaGraphs:
    """Records functions as graphs, on one device and in one pool of memory.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)
        self._spare = torch.zeros(1, device=device)
        self._underway = False
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """Record what a function launches; it computes nothing yet.

        Returns:
            The replay, and what the function returned: its tensors lie where replays write.

        Raises:
            Exception: What the function raised, or what it did cannot be recorded.
        """
        collecting = gc.isenabled()
        gc.disable()  # An object that goes now might free memory of the graph or destroy another graph.
        try:
            return self._record(run)
        except BaseException:
            self._end()
            raise
        finally:
            if collecting:
                gc.enable()

    def _record(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        if not self._alive:
            # The allocator forgets a pool whose last graph goes, and does not take its handle again.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._alive.add(graph)
        current = torch.cuda.current_stream(self.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            self._underway = True
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = run()
            except BaseException:
                with contextlib.suppress(Exception):
                    graph.capture_end()
                    self._underway = False
                raise
            graph.capture_end()
            self._underway = False
        current.wait_stream(self._side)
        # Past the method in Python, which adds nothing for graphs made here.
        return functools.partial(torch._C._CUDAGraph.replay, graph), result

    def _end(self) -> None:
        """Put right what torch leaves undone where a recording is broken off by the device.

        The allocator goes on giving memory of the pool, and the generator of random numbers counts what it
        draws for a graph: both until a recording ends as it should.
        """
        if not self._underway:
            return
        self._underway = False
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self._index(), self._pool)
        self._pool = torch.cuda.graph_pool_handle()  # the old one stays with the graphs that it has
        self._side = torch.cuda.Stream(self.device)
        with contextlib.suppress(Exception):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(self._side):
                graph.capture_begin(capture_error_mode="thread_local")
                self._spare.zero_()
                graph.capture_end()
        self._check_random()

    def _check_random(self) -> None:
        """See that the program can draw random numbers; where not, all graphs lose the generator for it."""
        state = self.random()
        try:
            self._spare.uniform_()
            self.set_random(state)
        except RuntimeError:
            # A copy of the state is in no graph: the program draws what it would have, and no graph draws.
            generator = torch.cuda.default_generators[self._index()]
            generator.graphsafe_set_state(generator.clone_state())
            runtime.of(Generators).lost += 1

    def generators(self) -> int:
        """A number that changes when graphs recorded before no longer draw the program's random numbers."""
        return runtime.of(Generators).lost

    def allocated(self) -> int:
        """Bytes that tensors of this process have of it."""
        return int(torch.cuda.memory_allocated(self.device))

    def held(self) -> int:
        """Bytes that the device has given to this process for tensors."""
        return int(torch.cuda.memory_reserved(self.device))

    def free(self) -> int:
        """Bytes that no process has taken of the device."""
        return int(torch.cuda.mem_get_info(self.device)[0])

    def spare(self) -> int:
        """Bytes that tensors of this process may still have: what is free, and what they gave back."""
        return self.free() + self.held() - self.allocated()

    def total(self) -> int:
        """Bytes of the device's memory."""
        return int(torch.cuda.mem_get_info(self.device)[1])

    def shortages(self) -> int:
        """How often the device had no memory left and the allocator took back what it had cached."""
        return int(torch._C._cuda_memoryStats(self._index())["num_alloc_retries"])

    def stream(self) -> Any:
        """The current stream: what is replayed on another would not wait for what was there before."""
        return torch._C._cuda_getCurrentRawStream(self._index())

    def random(self) -> Any:
        """The state of the device's generator of random numbers, as :meth:`set_random` takes it."""
        generator = torch.cuda.default_generators[self._index()]
        return generator.initial_seed(), generator.get_offset()

    def set_random(self, state: Any) -> None:
        """Put the generator back to a state."""
        generator = torch.cuda.default_generators[self._index()]
        generator.manual_seed(state[0])
        generator.set_offset(state[1])

    def _index(self) -> int:
        index: int | None = self.device.index
        return torch.cuda.current_device() if index is None else index
