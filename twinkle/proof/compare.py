"""Does a kernel compute what the original computes? Both run on the same inputs, beside a finer original.

The measure is the original's own rounding: each result is compared with the original run in the next
finer dtype (float32 for half precision, float64 for float32), and a kernel may be off by twice what the
original is, and a little. A kernel that is off by one percent is caught in bfloat16 as well.

Between its forward and its backward the kernel is called once more, with its first input negated: results
or saved tensors that live in a buffer shared by all calls are overwritten then, and that shows.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from twinkle.ops.plain import at_every_size
from twinkle.proof.inputs import duplicate, fewer, tensors_of

__all__ = ["FINER", "Verdict", "compare", "dtype_of"]

FINER = {
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
    """What a comparison gave.

    Attributes:
        ok: The kernel may run.
        text: Why, with the errors, for the report.
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
    pass


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
        plain_class: The class of the layer without Twinkle, for the finer copy.
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
    ours = _run(kernel, inputs, module, backward, state, shaken=original)
    if ours.wrote and not theirs.wrote:
        raise _Rejected("it writes to its input")
    finer = FINER[dtype]
    twin = _finer(module, plain_class, finer)
    if module is not None and twin is None:
        best = theirs
    else:
        with torch.autocast(_device_type(inputs), enabled=False):
            best = _run_finer(original, _cast(inputs, dtype, finer), twin, backward, state, finer)
    outputs = _worst("result", ours.outputs, theirs.outputs, best.outputs, _SLACK[dtype])
    gradients = (math.nan, math.nan)
    text = f"error {outputs[0]:.1e} (original {outputs[1]:.1e})"
    if backward:
        gradients = _worst("gradient", ours.gradients, theirs.gradients, best.gradients, _SLACK[dtype])
        text += f", gradients {gradients[0]:.1e} ({gradients[1]:.1e})"
    text += f" in {str(dtype).removeprefix('torch.')}"
    return Verdict(True, text, errors=(*outputs, *gradients))


def _run_finer(
    original: Callable[..., Any],
    inputs: Any,
    twin: nn.Module | None,
    backward: bool,
    state: torch.Tensor,
    finer: torch.dtype,
) -> _Result:
    """Run the original in the finer dtype.

    Casts to float32 within go to float64 with the rest, where float32 made in another way does not get into
    the way. A wrapper may dispatch to code that has no such dtype (torch's grouped product has no float64);
    the function it wraps computes the same.
    """
    functions = dict.fromkeys((original, inspect.unwrap(original)))
    attempts = [(f, wide) for f in functions for wide in (True, False) if finer == torch.float64 or not wide]
    for function, wide in attempts:
        try:
            with _Wider() if wide else contextlib.nullcontext():
                return _run(function, inputs, twin, backward, state)
        except RuntimeError:
            if (function, wide) == attempts[-1]:
                raise
    raise AssertionError("unreachable")


class _Wider(TorchFunctionMode):
    """Casts to float32 go to float64: most norms compute in float32 by name, whatever they are given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        elif func is torch.Tensor.to or func is torch.Tensor.type:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        wider = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **wider)


class _Result:
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
    shaken: Callable[..., Any] | None = None,
) -> _Result:
    """Run on copies, from one state of the random numbers.

    With ``shaken``, the original, another call comes between, which must change nothing of this one.
    """
    leaves: list[torch.Tensor] = []

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        leaf, twin = duplicate(value, grad=backward and value.is_floating_point())
        if leaf.requires_grad:
            leaves.append(leaf)
        return twin

    lead = () if module is None else (module,)
    with _unchanged(module), torch.inference_mode(False), torch.set_grad_enabled(backward):
        args, kwargs = tree_map(fresh, inputs)
        torch.random.set_rng_state(state)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(0)
        outputs = tree_flatten(function(*lead, *args, **kwargs))[0]
        wrote = _differs(inputs, (args, kwargs))
        if shaken is not None:
            _shake(function, shaken, inputs, lead, outputs)
        if wrote or not backward:
            return _Result(_plain(outputs), [], wrote)
        leaves += [p for p in module.parameters() if p.requires_grad] if module is not None else []
        pulled = [out for out in outputs if isinstance(out, torch.Tensor) and out.requires_grad]
        gradients: list[Any] = []
        if pulled and leaves:
            pushes = [_push(out, number) for number, out in enumerate(pulled)]
            gradients = list(torch.autograd.grad(pulled, leaves, pushes, allow_unused=True))
    # Checked after backward, which may write to what forward kept.
    return _Result(_plain(outputs), gradients, _differs(inputs, (args, kwargs)))


@contextlib.contextmanager
def _unchanged(module: nn.Module | None) -> Iterator[None]:
    """What the layer counts in its buffers is not counted for a comparison."""
    held = [(buffer, buffer.clone()) for buffer in module.buffers()] if module is not None else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in held:
                buffer.copy_(before)


def _shake(
    kernel: Callable[..., Any],
    original: Callable[..., Any],
    inputs: Any,
    lead: tuple[Any, ...],
    outputs: list[Any],
) -> None:
    """Call a kernel again, with its first input negated.

    Raises:
        _Rejected: It changed what the call before returned, or returns the very same again.
    """
    before = [out.detach().clone() if isinstance(out, torch.Tensor) else out for out in outputs]
    again = _plain(tree_flatten(_again(kernel, inputs, lead, True))[0])
    if not _equal(_plain(outputs), before):
        raise _Rejected("a second call overwrites the results of the first: they share a buffer")
    stuck = [_near(now, then) for now, then in zip(again, before, strict=False)]
    if any(stuck):
        # The original is asked as well: there are functions that do not see a sign, or not in each result.
        theirs = [_plain(tree_flatten(_again(original, inputs, lead, sign))[0]) for sign in (True, False)]
        if any(is_stuck and not _near(*pair) for is_stuck, *pair in zip(stuck, *theirs, strict=False)):
            raise _Rejected("a second call, with other inputs, returns the results of the first")


def _again(function: Callable[..., Any], inputs: Any, lead: tuple[Any, ...], negate: bool) -> Any:
    """Call on copies; negate the first floating input."""
    done = not negate

    def fresh(value: Any) -> Any:
        nonlocal done
        if not isinstance(value, torch.Tensor):
            return value
        floating = value.is_floating_point()
        leaf, twin = duplicate(value, grad=floating and torch.is_grad_enabled())
        if floating and not done:
            done = True
            with torch.no_grad():
                leaf.neg_()
        return twin

    args, kwargs = tree_map(fresh, inputs)
    return function(*lead, *args, **kwargs)


def _equal(some: list[Any], others: list[Any]) -> bool:
    """Bit for bit, with NaN equal to NaN."""
    pairs = zip(some, others, strict=False)
    return len(some) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in pairs
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    )


def _near(some: Any, other: Any) -> bool:
    """Two tensors alike to a thousandth of their norm; negating an input does more."""
    if not (isinstance(some, torch.Tensor) and isinstance(other, torch.Tensor) and some.is_floating_point()):
        return False
    return some.shape == other.shape and bool((some - other).float().norm() <= 1e-3 * other.float().norm())


def _plain(outputs: list[Any]) -> list[Any]:
    return [out.detach() if isinstance(out, torch.Tensor) else out for out in outputs]


def _push(out: torch.Tensor, number: int) -> torch.Tensor:
    """A cotangent that is the same in every dtype."""
    generator = torch.Generator().manual_seed(number)
    count = min(out.numel(), 1 << 16)
    values = torch.randn(count, generator=generator).to(torch.bfloat16)
    repeats = -(-out.numel() // max(count, 1))
    return values.repeat(repeats)[: out.numel()].reshape(out.shape).to(out.device, out.dtype)


def _worst(
    what: str, ours: list[Any], theirs: list[Any], best: list[Any], slack: float
) -> tuple[float, float]:
    """The largest error of the kernel and the original's own there.

    ``slack`` is that of the inputs: a float32 loss of bfloat16 logits is no better than these, and the error
    of a single number may happen to be none.

    Raises:
        _Rejected: They are of another kind, or the error is too large.
    """
    if len(ours) != len(theirs):
        raise _Rejected(f"it gives {len(ours)} {what}s where the original gives {len(theirs)}")
    worst = (0.0, 0.0)
    for mine, other, fine in zip(ours, theirs, best, strict=True):
        if not isinstance(other, torch.Tensor):
            if type(mine) is not type(other):
                raise _Rejected(f"a {what} is {type(mine).__name__}, the original's {type(other).__name__}")
            continue
        if not isinstance(mine, torch.Tensor):
            raise _Rejected(f"a {what} is {'missing' if mine is None else type(mine).__name__}")
        if mine.dtype != other.dtype or mine.shape != other.shape:
            raise _Rejected(f"a {what} is {_kind(mine)}, the original's {_kind(other)}")
        if not other.is_floating_point():
            if not torch.equal(mine, other):
                raise _Rejected(f"a {what} of whole numbers differs")
            continue
        error, own = _error(mine, fine), _error(other, fine)
        allowed = 2 * own + max(_SLACK[other.dtype], slack)
        if not error <= allowed:  # also when it is NaN
            if own != own:
                continue  # the original is NaN here too
            raise _Rejected(f"{what} off by {error:.1e}, where the original is off by {own:.1e}")
        worst = max(worst, (error, own))
    return worst


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _error(value: torch.Tensor, fine: torch.Tensor) -> float:
    wide = torch.float64 if fine.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(fine.to(wide))
    off = torch.linalg.vector_norm(value.to(wide) - fine.to(wide))
    return float(off / norm) if norm > 0 else float(off)


def _finer(module: nn.Module | None, plain_class: type | None, dtype: torch.dtype) -> nn.Module | None:
    """A copy of the layer in a finer dtype; ``None`` where it cannot be copied (sharded layers)."""
    if module is None:
        return None
    cls: Any = plain_class or type(module)
    try:
        # Not a copy of the module itself: that would be one more swapped layer.
        twin: nn.Module = cls.__new__(cls)
        twin.__dict__.update(copy.deepcopy(module.__dict__, {id(module): twin}))
    except Exception:
        return None
    return twin.to(dtype)


def _cast(inputs: Any, dtype: torch.dtype, finer: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        return value.to(finer) if isinstance(value, torch.Tensor) and value.dtype == dtype else value

    return tree_map(cast, inputs)


def _device_type(inputs: Any) -> str:
    tensors = tensors_of(inputs)
    return tensors[0].device.type if tensors else "cpu"


def dtype_of(inputs: Any, module: nn.Module | None) -> torch.dtype:
    """The dtype of a call: that of the first floating input, or parameter where there is none."""
    candidates = [*tensors_of(inputs), *(module.parameters() if module is not None else ())]
    return next((t.dtype for t in candidates if t.dtype in FINER), torch.float32)


def _differs(before: Any, after: Any) -> bool:
    pairs = zip(tensors_of(before), tensors_of(after), strict=True)
    return any(not torch.equal(a, b) and bool((a == a).all()) for a, b in pairs)
