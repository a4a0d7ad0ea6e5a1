"""Comparison of a kernel with its original on the same inputs, measured by the original in higher precision.

The measure is the original's own rounding: each result is compared with that of the original in the next
higher precision (float32 for half precision, float64 for float32), and the error of a kernel may be twice
that of the original, and a little. A kernel that is off by one percent is caught in bfloat16 as well.

Between its forward and its backward the kernel is called once more, with its first input negated: results
or saved tensors that live in a buffer shared by all calls are overwritten then, and that shows.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from twinkle.ops.plain import at_every_size
from twinkle.proof.inputs import duplicate, fewer, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["HIGHER_PRECISION", "Verdict", "compare", "dtype_of"]

HIGHER_PRECISION = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
    torch.float64: torch.float64,
}
"""The dtype that a result is compared in, from that of the inputs."""
# What a kernel may add to twice the original's error, as a share of the result's norm.
_SLACK = {torch.bfloat16: 2e-3, torch.float16: 1e-3, torch.float32: 2e-6, torch.float64: 1e-12}
_UNKNOWN = (math.nan,) * 4


class Verdict:
    """The outcome of a comparison.

    Attributes:
        ok: The kernel may run.
        text: The errors or the reason against the kernel, for the report.
        errors: The largest relative error of the results, that of the original there, and the same two of
            the gradients; NaN where nothing was compared.
        conclusive: Both ran and were compared. Otherwise something failed, memory perhaps, that says
            nothing of the next time.
        date: The day of the comparison, where it is not today's: ``2026-01-31``.
    """

    __slots__ = ("conclusive", "date", "errors", "ok", "text")

    def __init__(
        self,
        ok: bool,
        text: str,
        *,
        errors: tuple[float, float, float, float] = _UNKNOWN,
        conclusive: bool = True,
        date: str | None = None,
    ) -> None:
        self.ok = ok
        self.text = text
        self.errors = errors
        self.conclusive = conclusive
        self.date = date

    def __str__(self) -> str:
        word = "proven" if self.ok else "rejected"
        return f"{word} (cached, {self.date}): {self.text}" if self.date else f"{word}: {self.text}"

    def __repr__(self) -> str:
        return f"<Verdict {self}>"


class _Rejected(Exception):
    """The kernel does not compute the same; the message says in what way."""


def compare(
    original: Callable[..., Any],
    kernel: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    module: nn.Module | None = None,
    plain_class: type | None = None,
    backward: bool = False,
    rows: int | None = None,
) -> Verdict:
    """Run a kernel and its original on copies of the same inputs.

    Args:
        original: The function that the kernel replaces; with ``module`` it takes that first.
        kernel: The same for the kernel.
        args: The arguments of the call at hand, without the module.
        kwargs: Its keyword arguments.
        module: The layer, when they are ``forward`` functions.
        plain_class: The class of the layer without Twinkle, for the upcast copy.
        backward: Compare the gradients of the inputs and parameters as well.
        rows: At most so many tokens of at most two sequences, where that can be told from the inputs;
            see :func:`twinkle.proof.inputs.fewer`.

    Returns:
        The verdict. A comparison that cannot be made is a rejection that says why.
    """
    inputs = (tuple(args), dict(kwargs))
    if rows is not None:
        inputs = fewer(inputs, rows)
    dtype = dtype_of(inputs, module)
    state = torch.random.get_rng_state()
    devices = sorted({t.device.index or 0 for t in tensors_of(inputs) if t.device.type == "cuda"})
    try:
        # Under checkpointing torch counts the tensors that are kept for backward: these are none of its own.
        own = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)
        with torch.random.fork_rng(devices), own, at_every_size():
            return _compare(original, kernel, inputs, module, plain_class, dtype, backward, state)
    except _Rejected as rejected:
        return Verdict(False, str(rejected))
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        return Verdict(
            False, f"the comparison could not be made: {type(error).__name__}: {text}", conclusive=False
        )


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _compare(
    original: Callable[..., Any],
    kernel: Callable[..., Any],
    inputs: Any,
    module: nn.Module | None,
    plain_class: type | None,
    dtype: torch.dtype,
    backward: bool,
    state: torch.Tensor,
) -> Verdict:
    theirs = _run(original, inputs, module, backward, state)
    ours = _run(kernel, inputs, module, backward, state, original=original)
    if ours.wrote and not theirs.wrote:
        raise _Rejected("it writes to its input")
    higher = HIGHER_PRECISION[dtype]
    upcast = _upcast_copy(module, plain_class, higher)
    if module is not None and upcast is None:
        exact = theirs
    else:
        with torch.autocast(_device_type(inputs), enabled=False):
            exact = _run_in_higher_precision(
                original, _cast(inputs, dtype, higher), upcast, backward, state, higher
            )
    outputs = _worst("result", ours.outputs, theirs.outputs, exact.outputs, _SLACK[dtype])
    gradients = (math.nan, math.nan)
    text = f"error {outputs[0]:.1e} (original {outputs[1]:.1e})"
    if backward:
        gradients = _worst("gradient", ours.gradients, theirs.gradients, exact.gradients, _SLACK[dtype])
        text += f", gradients {gradients[0]:.1e} ({gradients[1]:.1e})"
    text += f" in {str(dtype).removeprefix('torch.')}"
    return Verdict(True, text, errors=(*outputs, *gradients))


def _run_in_higher_precision(
    original: Callable[..., Any],
    inputs: Any,
    module: nn.Module | None,
    backward: bool,
    state: torch.Tensor,
    higher: torch.dtype,
) -> _Result:
    """Run the original on inputs and a module that are in the higher precision already.

    Casts to float32 within go to float64 with the rest, where float32 made in another way does not get into
    the way. A wrapper may dispatch to code that has no such dtype (torch's grouped product has no float64);
    the function it wraps computes the same.
    """
    functions = dict.fromkeys((original, inspect.unwrap(original)))
    attempts = [(f, wide) for f in functions for wide in (True, False) if higher == torch.float64 or not wide]
    for function, wide in attempts:
        try:
            with _Float32ToFloat64() if wide else contextlib.nullcontext():
                return _run(function, inputs, module, backward, state)
        except RuntimeError:
            if (function, wide) == attempts[-1]:
                raise
    raise AssertionError("unreachable")


class _Float32ToFloat64(TorchFunctionMode):
    """Casts to float32 go to float64: most norms compute in float32, whatever they are given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        elif func is torch.Tensor.to or func is torch.Tensor.type:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        wider = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **wider)


class _Result:
    """The outputs and gradients of a run, without autograd, and whether it wrote to its inputs."""

    def __init__(self, outputs: list[Any], gradients: list[Any], wrote: bool) -> None:
        self.outputs = outputs
        self.gradients = gradients
        self.wrote = wrote


def _run(
    function: Callable[..., Any],
    inputs: Any,
    module: nn.Module | None,
    backward: bool,
    state: torch.Tensor,
    original: Callable[..., Any] | None = None,
) -> _Result:
    """Run a function forward and backward on copies, from one state of the random numbers.

    With ``original`` the function is a kernel, whose second call is checked before the backward of the first.
    """
    leaves: list[torch.Tensor] = []

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        leaf, duplicated = duplicate(value, grad=backward and value.is_floating_point())
        if leaf.requires_grad:
            leaves.append(leaf)
        return duplicated

    lead = () if module is None else (module,)
    with _unchanged(module), torch.inference_mode(False), torch.set_grad_enabled(backward):
        args, kwargs = tree_map(fresh, inputs)
        torch.random.set_rng_state(state)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(0)
        outputs = tree_flatten(function(*lead, *args, **kwargs))[0]
        wrote = _differs(inputs, (args, kwargs))
        if original is not None:
            _check_second_call(function, original, inputs, lead, outputs)
        if wrote or not backward:
            return _Result(_detached(outputs), [], wrote)
        leaves += [p for p in module.parameters() if p.requires_grad] if module is not None else []
        roots = [out for out in outputs if isinstance(out, torch.Tensor) and out.requires_grad]
        gradients: list[Any] = []
        if roots and leaves:
            cotangents = [_cotangent(out, number) for number, out in enumerate(roots)]
            gradients = list(torch.autograd.grad(roots, leaves, cotangents, allow_unused=True))
    # Checked after backward, which may write to what forward kept.
    return _Result(_detached(outputs), gradients, _differs(inputs, (args, kwargs)))


@contextlib.contextmanager
def _unchanged(module: nn.Module | None) -> Iterator[None]:
    """Restore the buffers of a layer afterwards: it may count its calls in them."""
    held = [(buffer, buffer.clone()) for buffer in module.buffers()] if module is not None else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in held:
                buffer.copy_(before)


def _check_second_call(
    kernel: Callable[..., Any],
    original: Callable[..., Any],
    inputs: Any,
    lead: tuple[Any, ...],
    outputs: list[Any],
) -> None:
    """Call a kernel again, with its first input negated.

    Args:
        kernel: The kernel, which gave ``outputs`` for ``inputs`` before.
        original: The function that it replaces.
        inputs: Arguments and keyword arguments.
        lead: The module, for a layer.
        outputs: The results of the first call.

    Raises:
        _Rejected: The second call overwrites the results of the first, or its own are stale.
    """
    before = [out.detach().clone() if isinstance(out, torch.Tensor) else out for out in outputs]
    after = _detached(tree_flatten(_call_on_copies(kernel, inputs, lead, negate=True))[0])
    if not _equal(_detached(outputs), before):
        raise _Rejected("a second call overwrites the results of the first: they share a buffer")
    stale = [_close(now, then) for now, then in zip(after, before, strict=False)]
    if any(stale):
        # There are functions that do not see a sign, or not in each result: then the original's are the same.
        theirs = [
            _detached(tree_flatten(_call_on_copies(original, inputs, lead, negate=negate))[0])
            for negate in (True, False)
        ]
        if any(is_stale and not _close(*pair) for is_stale, *pair in zip(stale, *theirs, strict=False)):
            raise _Rejected("a second call, with other inputs, returns the results of the first")


def _call_on_copies(function: Callable[..., Any], inputs: Any, lead: tuple[Any, ...], *, negate: bool) -> Any:
    """Call a function on copies of its inputs; with ``negate`` the first floating one is negated."""
    done = not negate

    def fresh(value: Any) -> Any:
        nonlocal done
        if not isinstance(value, torch.Tensor):
            return value
        floating = value.is_floating_point()
        leaf, duplicated = duplicate(value, grad=floating and torch.is_grad_enabled())
        if floating and not done:
            done = True
            with torch.no_grad():
                leaf.neg_()
        return duplicated

    args, kwargs = tree_map(fresh, inputs)
    return function(*lead, *args, **kwargs)


def _equal(some: list[Any], others: list[Any]) -> bool:
    """Whether tensors are equal bit for bit, with NaN equal to NaN."""
    pairs = zip(some, others, strict=False)
    return len(some) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in pairs
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    )


def _close(some: Any, other: Any) -> bool:
    """Whether two tensors differ by no more than a thousandth of their norm; negating an input does more."""
    if not (isinstance(some, torch.Tensor) and isinstance(other, torch.Tensor) and some.is_floating_point()):
        return False
    return some.shape == other.shape and bool((some - other).float().norm() <= 1e-3 * other.float().norm())


def _detached(outputs: list[Any]) -> list[Any]:
    return [out.detach() if isinstance(out, torch.Tensor) else out for out in outputs]


def _cotangent(out: torch.Tensor, number: int) -> torch.Tensor:
    """A random cotangent for an output, the same in every dtype."""
    generator = torch.Generator().manual_seed(number)
    count = min(out.numel(), 1 << 16)
    values = torch.randn(count, generator=generator).to(torch.bfloat16)
    repeats = -(-out.numel() // max(count, 1))
    return values.repeat(repeats)[: out.numel()].reshape(out.shape).to(out.device, out.dtype)


def _worst(
    what: str, ours: list[Any], theirs: list[Any], exact: list[Any], slack: float
) -> tuple[float, float]:
    """The largest relative error of the kernel, and the original's own there.

    Args:
        what: ``result`` or ``gradient``, for messages.
        ours: Of the kernel.
        theirs: Of the original.
        exact: Of the original in higher precision.
        slack: That of the inputs' dtype: a float32 loss of bfloat16 logits is no better than these, and the
            error of a single number may happen to be none.

    Raises:
        _Rejected: Number, type, dtype or shape differ, or the error is too large.
    """
    if len(ours) != len(theirs):
        raise _Rejected(f"it gives {len(ours)} {what}s where the original gives {len(theirs)}")
    worst = (0.0, 0.0)
    for mine, other, reference in zip(ours, theirs, exact, strict=True):
        if not isinstance(other, torch.Tensor):
            if type(mine) is not type(other):
                raise _Rejected(f"a {what} is {type(mine).__name__}, the original's {type(other).__name__}")
            continue
        if not isinstance(mine, torch.Tensor):
            raise _Rejected(f"a {what} is {'missing' if mine is None else type(mine).__name__}")
        if mine.dtype != other.dtype or mine.shape != other.shape:
            raise _Rejected(f"a {what} is {_dtype_and_shape(mine)}, the original's {_dtype_and_shape(other)}")
        if not other.is_floating_point():
            if not torch.equal(mine, other):
                raise _Rejected(f"a {what} of whole numbers differs")
            continue
        error, own = _error(mine, reference), _error(other, reference)
        allowed = 2 * own + max(_SLACK[other.dtype], slack)
        if not error <= allowed:  # also when it is NaN
            if own != own:
                continue  # the original is NaN here too
            raise _Rejected(f"{what} off by {error:.1e}, where the original is off by {own:.1e}")
        worst = max(worst, (error, own))
    return worst


def _dtype_and_shape(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the difference over the norm of ``exact``; the difference alone where that is zero."""
    wide = torch.float64 if exact.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(exact.to(wide))
    off = torch.linalg.vector_norm(value.to(wide) - exact.to(wide))
    return float(off / norm) if norm > 0 else float(off)


def _upcast_copy(module: nn.Module | None, plain_class: type | None, dtype: torch.dtype) -> nn.Module | None:
    """A copy of the layer in a higher precision; ``None`` where it cannot be copied (sharded layers)."""
    if module is None:
        return None
    cls: Any = plain_class or type(module)
    try:
        # Not a copy of the module itself: that would be one more swapped layer.
        copied: nn.Module = cls.__new__(cls)
        copied.__dict__.update(copy.deepcopy(module.__dict__, {id(module): copied}))
    except Exception:
        return None
    return copied.to(dtype)


def _cast(inputs: Any, dtype: torch.dtype, to: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        return value.to(to) if isinstance(value, torch.Tensor) and value.dtype == dtype else value

    return tree_map(cast, inputs)


def _device_type(inputs: Any) -> str:
    tensors = tensors_of(inputs)
    return tensors[0].device.type if tensors else "cpu"


def dtype_of(inputs: Any, module: nn.Module | None) -> torch.dtype:
    """The dtype that a call computes in: of the first floating input, or parameter where there is none."""
    candidates = [*tensors_of(inputs), *(module.parameters() if module is not None else ())]
    return next((t.dtype for t in candidates if t.dtype in HIGHER_PRECISION), torch.float32)


def _differs(before: Any, after: Any) -> bool:
    pairs = zip(tensors_of(before), tensors_of(after), strict=True)
    return any(not torch.equal(a, b) and bool((a == a).all()) for a, b in pairs)
