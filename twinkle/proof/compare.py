"""Comparison of a kernel with its original on the same inputs, measured by the original in higher precision.

The measure is the original's own rounding: each result is compared with that of the original in the next
higher precision (float32 for half precision, float64 for float32), and the error of a kernel may be twice
that of the original, and a little. A kernel that is off by one percent is caught in bfloat16 as well.

All runs are made on copies, in a room apart from the program (:mod:`twinkle.proof.room`).

Between its forward and its backward the kernel is called once more, with its first input negated: results
or saved tensors that live in a buffer shared by all calls are overwritten then, and that shows.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from twinkle.ops.plain import at_every_size
from twinkle.proof.inputs import fewer, tensors_of
from twinkle.proof.room import NotNow, clean_room
from twinkle.proof.twin import Held, Twin

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

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
        text: The errors or the reason against the kernel, for the report; why there is no outcome yet.
        errors: The largest relative error of the results, that of the original there, and the same two of
            the gradients; NaN where nothing was compared.
        conclusive: Both ran and were compared. Otherwise something failed, memory perhaps, that says
            nothing of the next time.
        pending: There is no outcome: the original is to run for the call at hand, and the next one to be
            compared.
        tried: A comparison was begun.
        date: The day of the comparison, where it is not today's: ``2026-01-31``.
    """

    __slots__ = ("conclusive", "date", "errors", "ok", "pending", "text", "tried")

    def __init__(
        self,
        ok: bool,
        text: str,
        *,
        errors: tuple[float, float, float, float] = _UNKNOWN,
        conclusive: bool = True,
        pending: bool = False,
        tried: bool = True,
        date: str | None = None,
    ) -> None:
        self.ok = ok
        self.text = text
        self.errors = errors
        self.conclusive = conclusive and not pending
        self.pending = pending
        self.tried = tried
        self.date = date

    @classmethod
    def not_yet(cls, reason: object) -> Verdict:
        """No comparison can be made in the circumstances of the call."""
        return cls(False, str(reason), pending=True, tried=False)

    def __str__(self) -> str:
        word = "proven" if self.ok else "not compared yet" if self.pending else "rejected"
        return f"{word} (cached, {self.date}): {self.text}" if self.date else f"{word}: {self.text}"

    def __repr__(self) -> str:
        return f"<Verdict {self}>"


class _Rejected(Exception):
    """The kernel does not compute the same; the message says in what way."""

    def __init__(self, reason: str, *, conclusive: bool = True) -> None:
        super().__init__(reason)
        self.conclusive = conclusive


class _Undecided(Exception):
    """The runs of this call cannot be compared; the message says why."""


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
    traced: bool = False,
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
        traced: A compiler's trace asks: see :func:`twinkle.proof.room.reason_against`.

    Returns:
        The verdict; a pending one where the comparison cannot be made.
    """
    given = [*tensors_of((tuple(args), dict(kwargs)))]
    try:
        with clean_room(given, traced=traced) as rewind, at_every_size():
            with torch._C.DisableTorchFunctionSubclass():
                inputs = (tuple(args), dict(kwargs))
                if rows is not None:
                    inputs = fewer(inputs, rows)
                dtype, device = dtype_of(inputs, module), _device_type(inputs)
            both = _Given(inputs, module, plain_class, dtype, device, backward, rewind)
            return _compare(original, kernel, both)
    except NotNow as reason:
        return Verdict.not_yet(reason)
    except _Rejected as rejected:
        return Verdict(False, str(rejected), conclusive=rejected.conclusive)
    except Exception as error:
        return Verdict(False, _in_a_line(error), pending=True)


class _Given(NamedTuple):
    """What both are run on."""

    inputs: Any
    module: nn.Module | None
    plain_class: type | None
    dtype: torch.dtype
    device_type: str
    backward: bool
    rewind: Callable[[], None]


def _compare(original: Callable[..., Any], kernel: Callable[..., Any], given: _Given) -> Verdict:
    held = Held(given.module)
    theirs = _run(original, given, held)
    try:
        ours = _run(kernel, given, held, original=original)
    except (NotNow, _Rejected, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _Rejected(f"it raises {_in_a_line(error)}", conclusive=False) from error
    del held
    if ours.wrote and not theirs.wrote:
        raise _Rejected("it writes to its input")
    for passed_by, called in zip(ours.hooked, theirs.hooked, strict=True):
        if passed_by != called:
            raise _Undecided(
                f"it passes by the hooks, or a forward of its own, of a {called[0]} within the layer"
            )
    dtype, backward = given.dtype, given.backward
    with torch.autocast(given.device_type, enabled=False):
        exact = _run_in_higher_precision(original, given)
    outputs = _worst("result", ours.outputs, theirs.outputs, exact.outputs, _SLACK[dtype])
    gradients = (math.nan, math.nan)
    text = f"error {outputs[0]:.1e} (original {outputs[1]:.1e})"
    if backward:
        gradients = _worst("gradient", ours.gradients, theirs.gradients, exact.gradients, _SLACK[dtype])
        text += f", gradients {gradients[0]:.1e} ({gradients[1]:.1e})"
    text += f" in {str(dtype).removeprefix('torch.')}"
    return Verdict(True, text, errors=(*outputs, *gradients))


def _in_a_line(error: Exception) -> str:
    if isinstance(error, _Undecided):
        return str(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _run_in_higher_precision(original: Callable[..., Any], given: _Given) -> _Result:
    """Run the original on inputs and a layer in the higher precision.

    Casts to float32 within go to float64 with the rest, where float32 made in another way does not get into
    the way. A wrapper may dispatch to code that has no such dtype (torch's grouped product has no float64);
    the function it wraps computes the same.
    """
    higher = HIGHER_PRECISION[given.dtype]
    held = Held(given.module, higher)
    functions = dict.fromkeys((original, inspect.unwrap(original)))
    attempts = [(f, wide) for f in functions for wide in (True, False) if higher == torch.float64 or not wide]
    for function, wide in attempts:
        try:
            with _Float32ToFloat64() if wide else contextlib.nullcontext():
                return _run(function, given, held, exact=True)
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


class _Result(NamedTuple):
    """What is left of a run, without autograd.

    Attributes:
        outputs: The results.
        gradients: Those of the inputs and parameters.
        wrote: It wrote to its inputs.
        hooked: The class names of layers within the layer that have hooks, and how often each was called.
    """

    outputs: list[Any]
    gradients: list[Any]
    wrote: bool
    hooked: list[tuple[str, int]]


def _run(
    function: Callable[..., Any],
    given: _Given,
    held: Held,
    *,
    original: Callable[..., Any] | None = None,
    exact: bool = False,
) -> _Result:
    """Run a function forward and backward on copies, from one state of the random numbers.

    Args:
        function: The original or the kernel.
        given: What it is run on.
        held: The tensors of the layer.
        original: That of a kernel, whose second call is checked before the backward of the first.
        exact: In higher precision, the original alone.
    """
    twin, lead, copies = _copied(given, held, exact=exact)
    (args, kwargs), backward = copies, given.backward
    before = tensors_of(copies)  # a run may add to lists among them
    given.rewind()
    with torch.set_grad_enabled(backward):
        outputs = tree_flatten(function(*lead, *args, **kwargs))[0]
        wrote = _differs(tensors_of(given.inputs), before)
        hooked = [(call.name, call.count) for call in twin.hooked]
        if original is not None:
            _check_second_call(function, original, given, held, lead, outputs)
        gradients: list[Any] = []
        roots = [out for out in outputs if isinstance(out, torch.Tensor) and out.requires_grad]
        if backward and roots and twin.leaves and not wrote:
            cotangents = [_cotangent(out, number) for number, out in enumerate(roots)]
            gradients = list(torch.autograd.grad(roots, twin.leaves, cotangents, allow_unused=True))
    # Checked after backward, which may write to what forward kept.
    wrote = _differs(tensors_of(given.inputs), before)
    return _Result(_detached(outputs), gradients, wrote, hooked)


def _copied(
    given: _Given, held: Held, *, exact: bool = False, negated: bool = False
) -> tuple[Twin, tuple[nn.Module, ...], Any]:
    """Copies for one run: who made them, the layer if there is one, and the arguments."""
    twin = Twin(held, grad=given.backward, dtype=given.dtype if exact else None, negated=negated)
    copies = twin.arguments(given.inputs)
    if given.module is None:
        return twin, (), copies
    return twin, (twin.layer(given.module, given.plain_class if exact else None),), copies


def _check_second_call(
    kernel: Callable[..., Any],
    original: Callable[..., Any],
    given: _Given,
    held: Held,
    lead: tuple[nn.Module, ...],
    outputs: list[Any],
) -> None:
    """Call a kernel again, with its first input negated.

    Args:
        kernel: The kernel, which gave ``outputs`` for the inputs before.
        original: The function that it replaces.
        given: What both are run on.
        held: The tensors of the layer.
        lead: The copy of the layer that the kernel was called with, for a layer.
        outputs: The results of the first call.

    Raises:
        _Rejected: The second call overwrites the results of the first, or its own are stale.
    """
    before = [out.detach().clone() if isinstance(out, torch.Tensor) else out for out in outputs]
    args, kwargs = Twin(held, grad=given.backward, negated=True).arguments(given.inputs)
    after = _detached(tree_flatten(kernel(*lead, *args, **kwargs))[0])
    if not _equal(_detached(outputs), before):
        raise _Rejected("a second call overwrites the results of the first: they share a buffer")
    stale = [_close(now, then) for now, then in zip(after, before, strict=False)]
    if any(stale):
        # There are functions that do not see a sign, or not in each result: then the original's are the same.
        theirs = []
        for negated in (True, False):
            _, lead, (args, kwargs) = _copied(given, held, negated=negated)
            theirs.append(_detached(tree_flatten(original(*lead, *args, **kwargs))[0]))
        if any(is_stale and not _close(*pair) for is_stale, *pair in zip(stale, *theirs, strict=False)):
            raise _Rejected("a second call, with other inputs, returns the results of the first")


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
    with torch._C.DisableTorchFunction():  # one that draws float64 in the place of float32 draws others
        values = torch.randn(count, generator=generator, dtype=torch.float32, device="cpu").to(torch.bfloat16)
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


def _device_type(inputs: Any) -> str:
    tensors = tensors_of(inputs)
    return tensors[0].device.type if tensors else "cpu"


def dtype_of(inputs: Any, module: nn.Module | None) -> torch.dtype:
    """The dtype that a call computes in: of the first floating input, or parameter where there is none."""
    candidates = [*tensors_of(inputs), *(module.parameters() if module is not None else ())]
    return next((t.dtype for t in candidates if t.dtype in HIGHER_PRECISION), torch.float32)


def _differs(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        pairs = zip(before, after, strict=True)
        return any(not torch.equal(a.to(b.dtype), b) and bool((a == a).all()) for a, b in pairs)
