"""One run of the original or of a kernel, forward and backward, on copies, and what is left of it."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from twinkle.proof.inputs import tensors_of
from twinkle.proof.measure import HIGHER_PRECISION
from twinkle.proof.results import Parts, detached, equal, owners, strides_of, taken_apart
from twinkle.proof.twin import Held, Twin
from twinkle.proof.verdict import Rejected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from twinkle.proof.room import Generators

__all__ = ["Exactly", "Given", "How", "Result", "copied", "exactly", "on_another_stream", "run"]


class How(NamedTuple):
    """The way of a run.

    Attributes:
        gradients: Go backward where gradients are recorded.
        wants: See :class:`twinkle.proof.twin.Twin`.
        cotangents: ``dense``, ``strided`` or ``expanded`` gradients of the results.
        flipped: The layer is in training where it is not in the program, and the other way round.
        again: The results are those of a second call, before which arguments and weights changed in place.
        poisoned: New memory is full of NaN.
        aside: On another stream of the GPU than the current one, which is late with the inputs.
    """

    gradients: bool = True
    wants: str = "all"
    cotangents: str = "dense"
    flipped: bool = False
    again: bool = False
    poisoned: bool = False
    aside: bool = False


class Given(NamedTuple):
    """What both are run on, and how."""

    inputs: Any
    module: nn.Module | None
    plain_class: type | None
    dtype: torch.dtype
    device_type: str
    backward: bool
    generators: Generators
    how: How = How()


class Result(NamedTuple):
    """What is left of a run, without autograd.

    Attributes:
        parts: The results.
        gradients: Those of the inputs and parameters.
        wrote: For each tensor of the arguments, then of the layer, whether the run wrote to it.
        state: These tensors after the run.
        held: The arguments after the run, where it put others among them.
        owners, grads, strides: Of each result: see :func:`twinkle.proof.results.check_memory`.
        hooked: The class names of layers within the layer that have hooks, and how often each was called.
        random: It drew random numbers.
        arguments: How many of ``wrote`` are arguments.
    """

    parts: Parts
    gradients: list[Any]
    wrote: list[bool]
    state: list[Tensor]
    held: Parts | None
    owners: list[int | None]
    grads: list[bool]
    strides: list[tuple[int, ...] | None]
    hooked: list[tuple[str, int]]
    random: bool
    arguments: int

    @property
    def outputs(self) -> list[Any]:
        """The tensors and plain values of the results."""
        return self.parts.leaves


def run(
    function: Callable[..., Any],
    given: Given,
    held: Held,
    *,
    exact: bool = False,
    then: Callable[[tuple[nn.Module, ...], list[Any]], None] | None = None,
) -> Result:
    """Run a function forward and backward on copies, from one state of the random numbers.

    Args:
        function: The original or the kernel.
        given: What it is run on.
        held: The tensors of the layer.
        exact: In higher precision, the original alone.
        then: Called between forward and backward, with the layer if there is one and the results.
    """
    twin, lead, copies = copied(given, held, exact=exact)
    (args, kwargs), how = copies, given.how
    before = tensors_of(copies)  # a run may add to lists among them
    own = _tensors_of_layer(given.module)
    program = [*tensors_of(given.inputs), *own]
    state = [*before, *(_tensors_of_layer(lead[0]) if lead else ())]
    versions = [tensor._version for tensor in state]
    given.generators.rewind()
    with torch.set_grad_enabled(given.backward), _Poison() if how.poisoned else contextlib.nullcontext():
        if how.again:
            function(*lead, *args, **kwargs)
            _change(state)
            versions, program = [tensor._version for tensor in state], [t.clone() for t in state]
            held.forget(own)
        parts = taken_apart(function(*lead, *args, **kwargs))
        drew = given.generators.moved()
        outputs = parts.leaves
        # What a layer keeps may have been replaced by another tensor.
        state = [*before, *(_tensors_of_layer(lead[0]) if lead else ())]
        written = _written(program, state, versions, len(before))
        then_state = [tensor.detach() for tensor in state]
        if then is not None:
            then_state = [t.clone() if w else t for t, w in zip(then_state, written, strict=False)]
        held_then = taken_apart(copies) if [*map(id, tensors_of(copies))] != [*map(id, before)] else None
        hooked = [(call.name, call.count) for call in twin.hooked]
        if then is not None:
            then(lead, outputs)
        gradients: list[Any] = []
        roots = [out for out in outputs if isinstance(out, Tensor) and out.requires_grad]
        if given.backward and how.gradients and roots and twin.leaves and not any(written[: len(before)]):
            gradients = _gradients(roots, twin.leaves, how.cotangents)
    # Checked after backward as well, which may write to what forward kept.
    everything = then is not None
    written = _written(program, state, versions, len(before), everything=everything)
    held.forget(tensor for tensor, w in zip(own, written[len(before) :], strict=False) if w)
    return Result(
        parts=Parts(parts.containers, detached(outputs)),
        gradients=gradients,
        wrote=written,
        state=then_state,
        held=held_then and Parts(held_then.containers, detached(held_then.leaves)),
        owners=owners(outputs, state),
        grads=[isinstance(out, Tensor) and out.requires_grad for out in outputs],
        strides=[*map(strides_of, outputs)],
        hooked=hooked,
        random=drew,
        arguments=len(before),
    )


def _written(
    program: list[Tensor],
    state: list[Tensor],
    versions: list[int],
    arguments: int,
    *,
    everything: bool = False,
) -> list[bool]:
    """Whether each tensor was written to.

    Torch counts most writes. Those of batch norm to its statistics, and of kernels by the address, show in
    the values alone; of parameters these are compared only where everything is to be.
    """
    return [
        now._version != version
        or ((number < arguments or everything or not isinstance(now, nn.Parameter)) and _differs(was, now))
        for number, (was, now, version) in enumerate(zip(program, state, versions, strict=False))
    ]


@contextlib.contextmanager
def on_another_stream() -> Iterator[None]:
    """Work on another stream, which is busy for a while: what a kernel launches elsewhere comes too early."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_CYCLES)
        yield
    stream.synchronize()


def copied(
    given: Given, held: Held, *, exact: bool = False, negated: bool = False
) -> tuple[Twin, tuple[nn.Module, ...], Any]:
    """Copies for one run: who made them, the layer if there is one, and the arguments."""
    dtype = given.dtype if exact else None
    twin = Twin(held, grad=given.backward, dtype=dtype, negated=negated, wants=given.how.wants)
    copies = twin.arguments(given.inputs)
    if given.module is None:
        return twin, (), copies
    layer = twin.layer(given.module, given.plain_class if exact else None)
    if given.how.flipped:
        training = not layer.training
        for module in layer.modules():
            module.training = training
    return twin, (layer,), copies


def exactly(original: Callable[..., Any], dtype: torch.dtype) -> Iterator[Exactly]:
    """Ways to run the original on inputs and a layer in the higher precision, the best first.

    Casts to float32 within go to float64 with the rest, where float32 made in another way does not get into
    the way. A wrapper may dispatch to code that has no such dtype (torch's grouped product has no float64);
    the function it wraps computes the same.
    """
    higher = HIGHER_PRECISION[dtype]
    for function in dict.fromkeys((original, inspect.unwrap(original))):
        for wide in (True, False) if higher == torch.float64 else (False,):
            yield Exactly(function, wide)


class Exactly(NamedTuple):
    """A way to run the original in higher precision; see :func:`exactly`."""

    function: Callable[..., Any]
    wide: bool

    def __call__(self, given: Given, held: Held) -> Result:
        """Run it; see :func:`run`."""
        with _Float32ToFloat64() if self.wide else contextlib.nullcontext():
            return run(self.function, given, held, exact=True)


class _Float32ToFloat64(TorchFunctionMode):
    """Casts to float32 go to float64: most norms compute in float32, whatever they are given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        elif func is torch.Tensor.to or func is torch.Tensor.type:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        wider = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **wider)


_CYCLES = 2_000_000
"""About a millisecond."""
_EMPTY = frozenset(
    (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.empty_permuted)
)


class _Poison(TorchFunctionMode):
    """What is allocated without a value is full of NaN, or of a number that is no index."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _EMPTY and isinstance(made, Tensor) and not made.is_meta:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                if made.is_floating_point() or made.is_complex():
                    made.fill_(float("nan"))
                elif made.dtype is not torch.bool:
                    made.fill_(torch.iinfo(made.dtype).max)
        return made


def _gradients(roots: list[Tensor], leaves: list[Tensor], kind: str) -> list[Any]:
    cotangents = [_cotangent(out, number, kind) for number, out in enumerate(roots)]
    gradients = [*torch.autograd.grad(roots, leaves, cotangents, allow_unused=True)]
    if not equal(cotangents, [_cotangent(out, number, kind) for number, out in enumerate(roots)]):
        raise Rejected("its backward writes to the gradient that it is given")
    return gradients


def _cotangent(out: Tensor, number: int, kind: str) -> Tensor:
    """A random cotangent for an output, the same in every dtype."""
    generator = torch.Generator().manual_seed(number)
    # One row for all: with one number for all, the gradient of a softmax or a norm is nothing but rounding.
    row = out.shape[-1:] if kind == "expanded" else out.shape
    count = min(row.numel(), 1 << 16)
    with torch._C.DisableTorchFunction():  # one that draws float64 in the place of float32 draws others
        values = torch.randn(count, generator=generator, dtype=torch.float32, device="cpu").to(torch.bfloat16)
    repeats = -(-row.numel() // max(count, 1))
    made = values.repeat(repeats)[: row.numel()].reshape(row).to(out.device, out.dtype)
    if kind == "expanded":
        return made.expand(out.shape)
    if kind == "strided" and out.ndim > 1:
        return made.transpose(-1, -2).contiguous().transpose(-1, -2)
    return made


def _change(tensors: list[Tensor]) -> None:
    """Change floating tensors in place, as an optimizer or a static input of a graph does."""
    seen: set[int] = set()
    with torch.no_grad():
        for tensor in tensors:
            if not tensor.is_floating_point() or not tensor.numel() or 0 in tensor.stride():
                continue
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                tensor.mul_(1.25)


def _tensors_of_layer(layer: nn.Module | None) -> list[Tensor]:
    """The parameters and buffers of a layer and those within it, in a fixed order."""
    if layer is None:
        return []
    found: dict[int, Tensor] = {}
    names = [(module, name) for module in layer.modules() for name in (*module._parameters, *module._buffers)]
    for module, name in names:
        tensor = module._parameters.get(name)
        tensor = module._buffers.get(name) if tensor is None else tensor
        if tensor is not None and type(tensor) in (Tensor, nn.Parameter):
            found.setdefault(id(tensor), tensor)
    return list(found.values())


def _differs(before: Tensor, after: Tensor) -> bool:
    """Whether a tensor has other values than before; NaN is equal to NaN."""
    if before is after:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        before = before.detach().to(after.dtype)
        if before.shape != after.shape or torch.equal(before, after):
            return bool(before.shape != after.shape)
        return not equal([before], [after.detach()])
