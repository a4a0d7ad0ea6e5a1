"""What the implementations in plain torch share: when they may run, and how rows are cut into chunks.

On a CPU an elementwise op on a large tensor costs what it costs to bring it from memory and back, and the
pages of its result. In chunks of rows that stay in the cache the same ops take a half to a quarter of the
time.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, NamedTuple

import torch

from twinkle.ops import machine
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from torch import Tensor

__all__ = [
    "CHUNK",
    "FORCED",
    "SHARED_CHUNK",
    "Least",
    "at_every_size",
    "at_measured_size",
    "chunk_rows",
    "chunks",
    "paying_from",
    "pays",
    "runs_eagerly",
]

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
CHUNK, SHARED_CHUNK = 1 << 16, 1 << 22
"""Elements in a chunk. For one thread 256 KiB in float32, two or three of which fit its core's own cache.

Several threads wait for each other at the end of each op. Where a machine has more to do than cores to do
it with, that wait is milliseconds, and small chunks were ten times slower than none: so few and large ones.
"""


class _Sizes(threading.local):
    """Whether this thread takes small inputs for large ones.

    Attributes:
        every: In a proof.
        measured: In a call whose size was measured.
        mattered: Some tensor was taken for a large one because of that.
    """

    every = False
    measured = False
    mattered = False


_sizes = _Sizes()
FORCED: list[bool] = []
"""Has an item for each thread that takes small inputs for large ones now: empty, which 5 ns tell, in nearly
every call, where a thread's own flag takes 45."""


class Least(NamedTuple):
    """Sizes below which a kernel runs the definition of its op, as its original does with fewer calls.

    Attributes:
        argument: The name of the parameter whose elements count.
        elements: So many, where gradients are recorded.
        without_gradients: So many elsewhere.
    """

    argument: str
    elements: int
    without_gradients: int


def paying_from(
    kernel: Callable[..., Any], argument: object, elements: int, without_gradients: int
) -> Callable[..., Any]:
    """Note on a kernel from which size on it pays, so that nobody calls it below; returns it.

    Args:
        kernel: A function.
        argument: The name of its parameter whose elements count; nothing is noted where it is none.
        elements: See :class:`Least`.
        without_gradients: See :class:`Least`.
    """
    if isinstance(argument, str) and argument.isidentifier():
        kernel.__dict__["least"] = Least(argument, elements, without_gradients)
    return kernel


@contextlib.contextmanager
def at_every_size() -> Iterator[None]:
    """Let small inputs take the way of large ones: a proof on a few rows is to be about that one."""
    before = _sizes.every
    _sizes.every = True
    FORCED.append(True)
    try:
        yield
    finally:
        _sizes.every = before
        FORCED.pop()


def at_measured_size(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[[], bool]]:
    """A kernel without its fixed sizes, for calls that were measured: it runs, however small they are.

    Args:
        function: The kernel.

    Returns:
        The kernel for such calls, and whether that made a difference to the last one in this thread.
    """

    def measured(*args: Any, **kwargs: Any) -> Any:
        before = _sizes.measured
        _sizes.measured, _sizes.mattered = True, False
        try:
            return function(*args, **kwargs)
        finally:
            _sizes.measured = before

    return measured, lambda: _sizes.mattered


def pays(tensor: Tensor, least: int) -> bool:
    """Whether a tensor has ``least`` elements, or is to be taken for one that has.

    The fixed size is for calls that nobody measured (:mod:`twinkle.proof.speed`): under a compiler, say. The
    setting ``sizes = "all"`` takes every tensor of the process for a large one, :func:`at_every_size` and
    :func:`at_measured_size` those of their thread.
    """
    count = tensor.numel()
    return count >= least or (count > 0 and (_every_size() or _is_measured()))


def _is_measured() -> bool:
    if _sizes.measured:
        _sizes.mattered = True
        return True
    return False


def _every_size() -> bool:
    return _sizes.every or runtime.options.sizes == "all"


def runs_eagerly(*tensors: Tensor | None, wide: tuple[Tensor, ...] = ()) -> bool:
    """Whether an implementation with in-place steps may run: plain CPU tensors, outside every transform.

    Under a compiler the definition is what it fuses best; tracers, fake modes, the transforms of
    ``torch.func`` and tensor subclasses follow the definition as well.

    Args:
        tensors: In float32, bfloat16 or float16; None is skipped.
        wide: Others, which may be float64 as well.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    for tensor in (*tensors, *wide):
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or not tensor.is_cpu:
            return False
    if any(tensor is not None and tensor.dtype not in _DTYPES for tensor in tensors):
        return False
    if any(tensor.dtype not in _DTYPES and tensor.dtype != torch.float64 for tensor in wide):
        return False
    return torch._C._get_tracing_state() is None


def chunks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Where chunks of rows begin and end; of one size but for the last one."""
    step = chunk_rows(rows, width)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def chunk_rows(rows: int, width: int) -> int:
    """Rows in a chunk."""
    elements = CHUNK if machine.one_thread() else SHARED_CHUNK
    step = max(1, min(rows, elements // max(width, 1)))
    if step >= rows and _every_size():  # several chunks, the last one shorter, as large inputs have
        return max(1, 2 * rows // 5)
    return step
