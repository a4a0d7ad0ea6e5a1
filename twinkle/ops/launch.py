"""How the embedded kernels are reached: eagerly, as an op of ``torch.library``, or not at all.

An op of ``torch.library`` with a derivative costs four to six times the host time of a bare
``autograd.Function`` (150 us against 26 us on one loaded core, torch 2.13), which is more than a small
kernel takes on the device. So eager calls launch from a ``Function``; compilers and tracers see the op.
:func:`define_op` makes both.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from enum import Enum
from importlib import import_module
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Any

    from torch import Tensor

__all__ = [
    "CUSTOM_OP",
    "DEVICE_TYPES",
    "EAGER",
    "REFERENCE",
    "Derivative",
    "DispatchPath",
    "Launcher",
    "apply_of",
    "base_of",
    "cdiv",
    "define_op",
    "dispatch_path",
    "fresh",
    "lazy_module",
    "like",
    "memory_order",
    "multiprocessors",
    "on_device",
    "power_of_2",
    "rows_of",
    "shared_memory",
    "through_definition",
    "tl_dtype",
]


class DispatchPath(Enum):
    """What computes a call.

    Attributes:
        EAGER: The kernel itself, launched from an autograd ``Function``.
        REFERENCE: The definition in plain torch.
        CUSTOM_OP: The op of ``torch.library``, for compilers and tracers.
    """

    EAGER = "eager"
    REFERENCE = "reference"
    CUSTOM_OP = "custom op"


# As globals: a look-up in the class of an Enum at each call takes longer.
EAGER, REFERENCE, CUSTOM_OP = DispatchPath

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_library = torch.library.Library("twinkle", "FRAGMENT")


def _kinds() -> frozenset[str]:
    if importlib.util.find_spec("triton") is None:
        return frozenset()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return frozenset({"cuda", "cpu"}) if interpreted else frozenset({"cuda"})


DEVICE_TYPES = _kinds()
"""Device types whose kernels triton runs here; the CPU with ``TRITON_INTERPRET=1``, as the tests do."""


def dispatch_path(x: Tensor, *others: Tensor | None) -> DispatchPath:
    """What computes with these tensors.

    Args:
        x: The tensor that says the device.
        others: Further inputs; None is skipped.

    Returns:
        `EAGER` for plain tensors outside every transform; `CUSTOM_OP` under a compiler, a tracer or a fake
        mode; `REFERENCE` where no kernel runs: another device, no triton, another dtype, a tensor
        subclass (its own rules apply to plain torch), a transform of ``torch.func``.
    """
    device = x.device
    if device.type not in DEVICE_TYPES or x.dtype not in _DTYPES:
        return REFERENCE
    compiling = torch.compiler.is_compiling()
    traced = compiling or torch._C._len_torch_dispatch_stack() > 0
    if not compiling and torch._C._are_functorch_transforms_active():
        return REFERENCE
    for tensor in (x, *others):
        if tensor is None:
            continue
        if tensor.device != device or tensor.dtype not in _DTYPES:
            return REFERENCE
        if not traced and type(tensor) not in _PLAIN:
            return REFERENCE
    if traced:
        return CUSTOM_OP
    return EAGER


class _Here:
    """The device is current already."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass


_HERE = _Here()


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the device of ``tensor`` current: triton launches on the current one, wherever the data are."""
    device = tensor.device
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _HERE
    return torch.cuda.device(device)  # type: ignore[no-any-return]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; 4 in the interpreter, to have several."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have, less what reductions want."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return int(getattr(properties, "shared_memory_per_block_optin", 65536)) - 8192


class Launcher:
    """A triton kernel whose repeated launches skip triton's own look-up.

    A training step repeats the same launches; triton binds and specialises all arguments again each time.
    Here the compiled kernel is found by the numbers themselves, and by whether all tensors are aligned.

    The kernel takes its tensors first, then its numbers, then its constants.
    """

    _MOST = 512  # Kept launches; shapes that vary without end go through triton.

    def __init__(self, jitted: Any) -> None:
        self.jitted = jitted
        self._known: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __call__(
        self, grid: tuple[int, ...], tensors: tuple[Tensor, ...], numbers: tuple[float, ...], **constants: Any
    ) -> None:
        """Launch on the current device.

        Args:
            grid: One to three sizes.
            tensors: The first arguments.
            numbers: The next.
            constants: The rest, and options such as ``num_warps``.
        """
        device = tensors[0].device
        aligned = device.type == "cuda"
        for tensor in tensors:
            if tensor.data_ptr() & 15:
                aligned = False
        if not aligned:
            self.jitted[grid](*tensors, *numbers, **constants)
            return
        key = (device.index, numbers, *[tensor.dtype for tensor in tensors], *constants.values())
        known = self._known.get(key)
        if known is not None:
            compiled, rest = known
            compiled[(*grid, 1, 1)[:3]](*tensors, *numbers, *rest)
            return
        compiled = self.jitted[grid](*tensors, *numbers, **constants)
        if len(self._known) < self._MOST and hasattr(compiled, "function"):
            given = len(tensors) + len(numbers)
            self._known[key] = compiled, tuple(constants[name] for name in self.jitted.arg_names[given:])


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up; triton's own takes 14 us on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next power of two; triton's own takes 14 us on the host."""
    return 1 << max(0, n - 1).bit_length()


def rows_of(tensor: Tensor, order: tuple[int, ...] | None = None) -> Tensor:
    """``tensor`` as ``[rows, width]`` with adjacent channels; a view where there is one.

    Args:
        tensor: ``[..., width]``.
        order: The order of the leading dimensions in memory, for a tensor that is not contiguous.
    """
    if tensor.dim() == 2 and order is None and tensor.stride(1) == 1:
        return tensor
    width = tensor.shape[-1]
    if order is not None:
        tensor = tensor.permute(order)
    rows = tensor.reshape(tensor.numel() // width if width else 0, width)
    return rows if rows.stride(-1) == 1 or width == 1 else rows.contiguous()


def base_of(tensor: Tensor, order: tuple[int, ...] | None = None) -> tuple[Tensor, int]:
    """A tensor whose memory begins where the first row does, and the elements from one row to the next.

    As :func:`rows_of`, without making a view of what is contiguous: a view takes longer than the numbers.

    Args:
        tensor: ``[..., width]``.
        order: As for :func:`rows_of`.
    """
    if order is None and tensor.is_contiguous():
        return tensor, tensor.shape[-1]
    rows = rows_of(tensor, order)
    return rows, rows.stride(0)


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for plain tensors outside every transform, as `EAGER` says they are.

    Torch's own first looks at each argument for what a transform of ``torch.func`` may have left in it.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply
    return apply


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions of a dense tensor from outermost to innermost in memory, the last one kept last.

    None for a contiguous one, and for one whose channels are not innermost.
    """
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    last = tensor.dim() - 1
    order = (*sorted(range(last), key=lambda d: -strides[d]), last)
    return order if tensor.permute(order).is_contiguous() else None


def fresh(tensor: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, tuple[int, ...] | None]:
    """An empty tensor with the strides that elementwise torch gives; dense, with adjacent channels.

    Returns:
        The tensor, and the order of its dimensions in memory; see :func:`memory_order`.
    """
    out = torch.empty_like(tensor, dtype=dtype)
    if out.is_contiguous():
        return out, None
    order = memory_order(out)
    if order is None:
        out = torch.empty(tensor.shape, dtype=out.dtype, device=out.device)
    return out, order


def like(tensor: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, tuple[int, ...] | None]:
    """As :func:`fresh`, with the same memory as ``[rows, width]`` between the two."""
    out, order = fresh(tensor, dtype)
    return out, rows_of(out, order), order


def lazy_module(name: str) -> Callable[[], Any]:
    """A function that gives a module, imported at its first call: one with Triton's kernels takes a while."""
    return functools.cache(functools.partial(import_module, name))


class Derivative:
    """How an op is differentiated: what is kept from the forward, and the gradients that follow from it.

    By default the first ``tensors`` inputs are saved, all the others are ``ctx.rest``, and each of the saved
    ones has a gradient. ``ctx`` is that of an autograd ``Function``.

    Args:
        schema: Of the op that computes the gradients, as for ``torch.library.define``.
        backward: Launches its kernel; may return None for a gradient that is not wanted.
        fake: Makes empty gradients of the same shapes, dtypes and strides.
        op_backward: As ``backward`` with results that share no memory, where those of ``backward`` do.
        tensors: How many inputs, from the first one on, are tensors with gradients.
        auxiliary: All results of the forward but the first one are for backward alone.
        keep: ``keep(ctx, inputs, results)`` saves what backward wants, in the place of the default.
        gradients: ``gradients(ctx, backward, *cotangents)`` gives one gradient an input; ``backward`` is the
            function itself or the op, whose absent gradients are empty tensors.
        reference: The definition, of the saved inputs and ``ctx.rest``: for gradients with a graph.
        again: ``again(ctx, *cotangents)`` gives gradients with a graph, in the place of the default.
    """

    def __init__(
        self,
        schema: str,
        backward: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        op_backward: Callable[..., Any] | None = None,
        tensors: int = 0,
        auxiliary: bool = False,
        keep: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        gradients: Callable[..., tuple[Tensor | None, ...]] | None = None,
        reference: Callable[..., Any] | None = None,
        again: Callable[..., tuple[Tensor | None, ...]] | None = None,
    ) -> None:
        self.backward = backward
        self.op = _define(schema, _without_none(op_backward or backward), _without_none(fake))
        self.auxiliary = auxiliary
        self.keep = keep or self._keep_inputs
        self.gradients = gradients or _gradients_of_inputs
        self.again = again or self._again_by_reference
        self._tensors = tensors
        self._reference = reference

    def _keep_inputs(self, ctx: Any, inputs: tuple[Any, ...], results: Any) -> None:
        ctx.save_for_backward(*inputs[: self._tensors], *(results[1:] if self.auxiliary else ()))
        ctx.rest = inputs[self._tensors :]

    def _again_by_reference(self, ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        assert self._reference is not None
        definition = functools.partial(_with_rest, self._reference, ctx.rest)
        found = through_definition(definition, ctx.saved_tensors[: self._tensors], cotangents)
        return (*found, *[None] * len(ctx.rest))

    def set_up(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """The op's part of ``keep``."""
        if self.auxiliary:
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*output[1:])
        self.keep(ctx, inputs, output)

    def of_op(self, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients, computed by the op."""
        if self.auxiliary:
            if cotangents[0] is None:
                return (None,) * len(ctx.needs_input_grad)
            cotangents = cotangents[:1]
        return self.gradients(ctx, self.op, *cotangents)


def define_op(
    name: str,
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    derivative: Derivative,
) -> tuple[Callable[..., Any], Any]:
    """Make one differentiable function of a forward and a backward: eager, and as an op of ``twinkle``.

    Args:
        name: Of the step in a graph of autograd.
        schema: Of the op, as for ``torch.library.define``.
        forward: Launches the kernel.
        fake: Makes empty results of the same shapes, dtypes and strides.
        derivative: How it is differentiated.

    Returns:
        The function for plain tensors outside every transform (see :func:`apply_of`), which returns the
        first result alone where the others are auxiliary; and the op.
    """
    keep, auxiliary = derivative.keep, derivative.auxiliary
    backward, gradients, again = derivative.backward, derivative.gradients, derivative.again
    op = _define(schema, forward, fake, setup=derivative.set_up, backward=derivative.of_op)

    def eager_forward(ctx: Any, *inputs: Any) -> Any:
        results = forward(*inputs)
        keep(ctx, inputs, results)
        return results[0] if auxiliary else results

    def eager_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return again(ctx, *cotangents)
        return gradients(ctx, backward, *cotangents)

    members = {"forward": staticmethod(eager_forward), "backward": staticmethod(eager_backward)}
    return apply_of(type(torch.autograd.Function)(name, (torch.autograd.Function,), members)), op


def _gradients_of_inputs(ctx: Any, function: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    found = function(*cotangents, *ctx.saved_tensors, *ctx.rest)
    return (*(found if isinstance(found, tuple) else (found,)), *[None] * len(ctx.rest))


def _with_rest(reference: Callable[..., Any], rest: tuple[Any, ...], *tensors: Tensor | None) -> Any:
    return reference(*tensors, *rest)


def _without_none(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The same with an empty tensor for every None: an op returns tensors."""

    def call(*inputs: Any) -> Any:
        found = backward(*inputs)
        if not isinstance(found, tuple):
            return found
        like = next(x for x in inputs if isinstance(x, torch.Tensor))
        return tuple(like.new_empty(0) if x is None else x for x in found)

    return call


def _define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register an op for the devices that Triton serves; without ``backward`` its derivative is refused."""
    name = schema.split("(", 1)[0]
    full = f"twinkle::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for kind in ("cuda", "cpu"):
        torch.library.impl(full, kind, implementation, lib=_library)
    torch.library.register_fake(full, fake, lib=_library)

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            f"twinkle::{name} has no derivative: as ops, embedded kernels can be differentiated once. "
            "For second derivatives under a compiler run with TWINKLE_KERNELS=off."
        )

    torch.library.register_autograd(
        full, backward if backward is not None else refuse, setup_context=setup, lib=_library
    )
    return getattr(torch.ops.twinkle, name).default


def through_definition(
    function: Callable[..., Any], inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: autograd's own, of the definition.

    Backward of a `Function` calls this when its caller asked for a graph of it (``create_graph=True``).

    Args:
        function: The definition, of these inputs alone.
        inputs: What the forward was given; None stays None.
        gradients: Of the results; None for a result without.

    Returns:
        One gradient an input, None where none is wanted.
    """
    # Aliases, so that an input that depends on another one is not followed any further.
    aliases = [None if x is None else x.view_as(x) for x in inputs]
    wanted = [x for x in aliases if x is not None and x.requires_grad]
    results = function(*aliases)
    results = results if isinstance(results, tuple) else (results,)
    pairs = [(y, g) for y, g in zip(results, gradients, strict=True) if g is not None and y.requires_grad]
    found: Any = (None,) * len(wanted)
    if pairs and wanted:
        outs, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(outs, wanted, grads, create_graph=True, allow_unused=True)
    left = iter(found)
    return [next(left) if x is not None and x.requires_grad else None for x in aliases]


_CODES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@functools.cache
def tl_dtype(dtype: torch.dtype) -> Any:
    """The dtype of triton."""
    import triton.language as tl

    return getattr(tl, _CODES[dtype])
